"""The peers' own Python environments, made when first asked for."""

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# FedJAX's last release calls `jax.tree_map`, which today's JAX lacks: a late JAX that still
# has it, and one with the former CPU runtime, on which it is often faster.
FEDJAX = {
    "FedJAX on JAX 0.5": (
        "fedjax==0.0.17",
        "jax==0.5.3",
        "jaxlib==0.5.3",
        "dm-haiku==0.0.14",
        "optax==0.2.4",
        "chex==0.1.89",
    ),
    "FedJAX on JAX 0.4": (
        "fedjax==0.0.17",
        "jax==0.4.30",
        "jaxlib==0.4.30",
        "numpy==1.26.4",
        "scipy==1.13.1",
        "optax==0.2.3",
        "dm-haiku==0.0.12",
        "chex==0.1.86",
    ),
}
MINORS = (12, 11, 10)
# The compiler for TPUs, and what steps and rounds are traced by.
LIBTPU = "libtpu==0.0.52"
TRACED_BY = ("jax", "jaxlib", "optax", "chex", "flax", "numpy")


def make_environment(requirements, cache=None):
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


def with_libtpu():
    """Return the Python of an environment with what is installed here, and the compiler for TPUs.

    Raises:
      RuntimeError: as `make_environment` does.
    """
    return make_environment((*(f"{name}=={version(name)}" for name in TRACED_BY), LIBTPU))


def _python():
    """Return a Python that these versions have builds for: this one, one on the path, or one of pyenv's."""
    if sys.version_info[1] in MINORS:
        return sys.executable
    for minor in MINORS:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        for python in (shutil.which(f"python3.{minor}"), *sorted(pyenv.glob(f"3.{minor}.*/bin/python"))):
            # A shim on the path may stand for a Python that is not there.
            if python and not subprocess.run([python, "-m", "venv", "--help"], capture_output=True).returncode:
                return python
    raise RuntimeError("FedJAX's environment needs Python 3.10, 3.11 or 3.12, and none is on the path or among pyenv's")
