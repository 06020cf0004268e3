"""The C library's allocator, told to keep the memory that a training step needs again and again."""

import ctypes

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_memory() -> None:
    """Keep freed memory in this process, on CPUs with glibc.

    By default a step's gigabytes go back to the system at its end, which clears them, page by page, in the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or jax.default_backend() != "cpu":
        return
    mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap
    mallopt(_M_TRIM_THRESHOLD, -1)  # whose end is not given back
    mallopt(_M_ARENA_MAX, 1)  # other arenas than the first cannot hold large blocks
