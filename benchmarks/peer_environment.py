"""The peers' own Python environments, made when first asked for."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# The newest JAX that still has `jax.tree_map`, which FedJAX's last release calls, and
# what goes with it.
FEDJAX = ("fedjax==0.0.17", "jax==0.5.3", "jaxlib==0.5.3", "dm-haiku==0.0.14", "optax==0.2.4", "chex==0.1.89")
PYTHONS = ((3, 10), (3, 13))


def make_environment(requirements=FEDJAX, cache=None):
    """Return the Python of an environment with these packages.

    Raises:
      RuntimeError: if there is no suitable Python, or a package cannot be installed.
    """
    cache = Path(cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "functional-optimodules"
    folder = cache / hashlib.sha256(" ".join(requirements).encode()).hexdigest()[:12]
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    print(f"installing {' '.join(requirements)} into a virtual environment in the cache", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    for command in ([_python(), "-m", "venv", folder], [python, "-m", "pip", "install", "--quiet", *requirements]):
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")
    done.touch()
    return python


def _python():
    """Return a Python that JAX 0.5 has a build for: this one, or one on the path."""
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return sys.executable
    for minor in range(PYTHONS[1][1], PYTHONS[0][1] - 1, -1):
        if found := shutil.which(f"python3.{minor}"):
            return found
    raise RuntimeError("FedJAX's environment needs Python 3.10 to 3.13, and none of these is on the path")
