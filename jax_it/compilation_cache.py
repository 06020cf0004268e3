"""JAX's persistent compilation cache, in the cache directory: what was compiled once is read the next time."""

import hashlib
import platform
from pathlib import Path

import jax

MAX_BYTES = 4_000_000_000  # programs that were not used for longest are removed


def folder() -> str:
    """Return where compiled programs are kept; "": nowhere."""
    return jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]


def enable(cache_dir: str) -> None:
    """Keep compiled programs in a folder of `cache_dir`, or wherever JAX's own settings say.

    Must be called before anything is compiled. Several CPU devices have none: collectives of programs that were read
    from a cache can deadlock there, with JAX 0.10.
    """
    on_cpu = jax.default_backend() == "cpu"
    if folder() or (on_cpu and jax.device_count() > 1):
        return
    # Machines may share a home directory, and a program for one CPU can crash another. JAX's keys tell GPUs and TPUs
    # apart, but not CPUs.
    path = Path(cache_dir).expanduser() / "compiled" / (_cpu() if on_cpu else jax.default_backend())
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to is no reason to fail
        return
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(path))


def _cpu() -> str:
    """Return a name for CPUs with the same instructions as this one."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
