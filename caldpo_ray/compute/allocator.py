"""What the C library does with memory that a policy worker frees."""

import ctypes
from contextlib import suppress

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next use, in threads that start from here on; does nothing elsewhere.

    On a CPU the activations of every micro-batch are allocated and freed. glibc gives arrays of that size back to the kernel,
    which clears each page again when it comes back: 3 % of a step.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
