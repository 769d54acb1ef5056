"""What the C library does with memory that is freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's mallopt


def keep_freed_memory() -> None:
    """Keeps it for the next tensor, where the library is glibc.

    By default every large tensor is a mapping of its own, given back when it is freed and cleared by the kernel, page
    by page, when the next one is made: a fifth of an update's time on the machine this was measured on.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
