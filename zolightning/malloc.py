"""The allocator of a process on Linux, told to keep what was freed for the next tensors."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER = 2**31 - 1  # bytes: the largest int
_LARGE = 2**25  # bytes: the most that every version of glibc takes


def keep_freed_memory() -> bool:
    """Has glibc keep what this process frees, except blocks of over 32 MiB, for what it allocates next.

    By itself it gives the end of its heap back to the system whenever some megabytes of it are free, and the system
    clears the same pages anew for the next layer: tens of thousands of them in the forward pass of a long batch. To be
    called before large tensors are made; holds for the rest of the process. The most that a process holds hardly
    changes, but it holds it to its end.

    The commands call it at their start. Importing the package does not: how memory is allocated is for the program to
    say.

    Returns:
        Whether it does. Not where the environment has settings of glibc's (``MALLOC_...``, ``GLIBC_TUNABLES``), where
        another allocator is preloaded, or without glibc.
    """
    is_set = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or is_set:
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # of musl
        return False
    if _address(libc.malloc) != _address(ctypes.CDLL(None).malloc):  # what the process really calls
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]  # any function of a library
