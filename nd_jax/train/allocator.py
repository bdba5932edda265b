"""glibc's allocator, told to keep the memory that a train step frees.

XLA's CPU client allocates a step's temporaries anew at every call. Blocks of that size go back to the kernel when they
are freed, and the kernel zeroes their pages again, 4 KiB at a time, when the next step asks for them: a third of all
CPU time of the tiny teacher's training.
"""

import ctypes
import sys

# Of malloc.h; the values are ints.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
# The largest int is not enough: a step of 3 GB of temporaries would give all of it back, and zero it, at every call.
_NEVER = -1
_TOP_PAD_BYTES = 1 << 28


def keep_freed_memory() -> bool:
    """Keeps freed memory at the end of the heap instead of giving it back; whether the C library can be told so.

    Call it before the first large allocation, in a process that repeats the same work. The peak of memory is unchanged,
    but is held until the process ends. Other C libraries than glibc are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No blocks outside the heap, and one heap: the others of glibc end at 64 MiB.
    settings = {_MMAP_MAX: 0, _ARENA_MAX: 1, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _TOP_PAD_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
