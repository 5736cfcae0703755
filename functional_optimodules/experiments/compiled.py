"""Programs that were compiled, kept in a folder for the processes to come."""

import tempfile
from pathlib import Path

import jax


def keep_programs(folder: Path) -> None:
    """Let this process keep each program that it compiles, and take those that another has kept.

    To be called before anything is compiled. It is JAX's persistent cache, which finds a
    program by its code, its options, the devices and the versions of JAX and XLA. By
    default JAX keeps only what takes a second or more.

    Args:
      folder: where; it is made if there is none.

    Raises:
      OSError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # JAX would only warn, once a program
    except OSError as error:
        raise type(error)(f"cannot keep compiled programs in {folder}: {error.strerror}") from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
