"""Makes glibc's allocator keep freed memory for the next tensors."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER = 2**31 - 1  # bytes: the largest int
_LARGE = 2**25  # bytes: the most that every version of glibc takes


def keep_freed_memory() -> bool:
    """Makes glibc keep the memory that this process frees, except blocks of over 32 MiB, for later allocations.

    By default it returns the end of its heap to the system whenever some megabytes of it are free, and the system
    clears the same pages again for the next layer: tens of thousands of them in the forward pass of a long batch. Call
    it before large tensors are made; it applies to the rest of the process. The peak of memory hardly changes, but it
    is held until the process ends.

    The commands call it when they start. Importing the package does not, because how memory is allocated is for the
    program to decide.

    Returns:
        Whether it had an effect: not if the environment has settings for glibc (``MALLOC_...``, ``GLIBC_TUNABLES``),
        another allocator is preloaded, or the C library is another one.
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
