"""The resident set of this process, and its peak since a moment of choice. Linux only."""

import ctypes
import gc
import pathlib

STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc(5)
MMAP_THRESHOLD, MMAP_MAX = -3, -4  # glibc's malloc.h, see mallopt(3)


def follow_what_lives():
    """Makes glibc map each array of 64 KiB or more by itself, from here on.

    What is freed goes back to the system at once then. Otherwise it may stay resident in an arena:
    a step that needs 194 MB was measured at 297 MB. An array takes longer to come by.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 64 * 1024)
        mallopt(MMAP_MAX, 1_000_000)


def settled():
    """Returns the bytes resident now, after giving back to the system what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: what was freed may otherwise stay resident and hide later use
        trim(0)
    return _status("VmRSS")


def reset_peak():
    """Makes `peak` count from here on."""
    CLEAR.write_text(RESET_PEAK)


def peak():
    """Returns the most bytes that were resident at once since `reset_peak`."""
    return _status("VmHWM")


def _status(field):
    if not STATUS.exists():
        raise SystemExit("Resident memory is read from /proc/self/status, which only Linux has.")
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])
