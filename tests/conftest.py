"""What every test needs: JAX on the CPU, wherever the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
