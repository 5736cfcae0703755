"""What every test needs: JAX on the CPU, keys that are the same in each run, and cheap compilation.

Compilation is most of what these tests cost, so there is less of it, in two ways.

Programs are compiled quickly rather than well: LLVM does not optimize them, and has each in one piece, and XLA emits
the code of fusions in its older, cheaper way. They run slower than what users get and round a little differently, and
two of them agree to the last bit more often; what is traced, donated and kept is the same. What looks at the text or
the memory of a compiled program, or runs for long, asks for the fixture `optimized`. `make test XLA_FLAGS=` compiles
everything as users have it, in twice the time.

Compiled programs are kept in `.jax_cache` for the next run, for the other workers, and for the processes that
tests start. JAX finds them by the program, the options, its own version and XLA's.
"""

import contextlib
import gc
import importlib.metadata
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

CHEAP = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
)
CACHE = Path(__file__).parents[1] / ".jax_cache"
MOST_BYTES = 2**28
MOST_MAPPINGS = 2**14

platform = os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA ends the process over a flag that it does not know, so that only versions that were tried get them.
if platform == "cpu" and importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", CHEAP)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402  (it reads these as it is imported)

# Flower's processes import it, and Flower need not be there.
collect_ignore = ["integrations/flower_app"]


def pytest_configure(config: pytest.Config) -> None:
    # JAX could bound the cache itself, but would list the whole folder for each program that it adds.
    if not hasattr(config, "workerinput"):
        total, entries = 0, []
        for path in CACHE.rglob("*-cache"):
            with contextlib.suppress(FileNotFoundError):  # another run may be at it too
                entries.append((path.stat().st_mtime, path.stat().st_size, path))
        for _, size, path in sorted(entries, reverse=True):
            total += size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # With the slow ones first, the workers end together.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="module")
def mappings() -> Iterator[None]:
    """Compiled programs are forgotten before there are too many of them.

    Each maps memory of its own, and Linux allows a process some 65,000 mappings: beyond that, XLA ends it.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def entropy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that would come from the operating system come from the name of the test."""
    monkeypatch.setattr("secrets.randbits", random.Random(request.node.nodeid).getrandbits)


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Return the options by which XLA makes the program that users get; processes that are started get it anyway.

    They leave LLVM out, which comes after what the text and the memory of a program tell.
    """
    if os.environ.get("XLA_FLAGS") != CHEAP:
        return {}
    monkeypatch.delenv("XLA_FLAGS")
    return {"xla_cpu_use_fusion_emitters": True}
