"""Memory: how much is used and available, returning freed pages, and out-of-memory errors.

psutil does not know the limit of a control group, which is what counts in a container, nor glibc's
malloc; so the few lines of /proc, /sys and the C library that are needed are read here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from magr_fx.errors import MagRError, OutOfMemoryError, first_line

FREED_FROM = 2**20  # bytes
# Parts of the messages of allocators that raise a RuntimeError: of the CPU, MPS, CUDA's libraries.
_PHRASES = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory",
            "alloc_failed")  # fmt: skip
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def high_water_mark(device: torch.device) -> float:
    """The peak memory so far in MiB: allocated on a CUDA device, else resident in the process.

    Neither counter is reset, because a reset would change the caller's own measurements. NaN on
    platforms without :mod:`resource`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


def return_freed_memory_at_once() -> None:
    """Make glibc return freed memory to the system at once; does nothing with other C libraries.

    glibc returns only blocks above a threshold, and raises that threshold, up to 32 MB, whenever
    a larger block is freed. Smaller freed blocks stay as holes between blocks in use: the
    temporaries of a search over a few million numbers then take twice the memory that they need.
    The cost is that the system fills new pages with zeros, which is about a fifth of the time of a
    small model. The matrices of a large model are above 32 MB anyway.

    The setting affects the whole process, and cannot be read or undone: call it in a process that
    magr-fx has for itself.
    """
    mallopt = _c_library_function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, FREED_FROM)
        mallopt(_TRIM_THRESHOLD, FREED_FROM)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or a device is out of memory.

    torch has an error class for devices; its CPU allocator raises a plain RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):  # of a memory map
        return error.errno == errno.ENOMEM
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(phrase in said for phrase in _PHRASES)


@contextlib.contextmanager
def out_of_memory_told(report: Callable[[], Any]) -> Iterator[None]:
    """Turn every out-of-memory error into :class:`OutOfMemoryError`, with a remedy.

    Args:
        report: returns the model's MagRReport, or None. The message says how many weights it lists
            as rewritten.
    """
    before = report()
    try:
        yield
    except Exception as error:
        if isinstance(error, MagRError) or not is_out_of_memory(error):
            raise
        now = report()
        count = 0 if now is None or now is before else len(now.rewritten)
        done = (
            f"{count} weights are rewritten already (see magr_report): load the model again"
            if count
            else "Nothing was changed"
        )
        raise OutOfMemoryError(
            f"out of memory: {type(error).__name__}: {first_line(error)}. {done}. Calibrate with "
            "smaller or shorter batches, keep activations on a disk (spill_dir), or offload the "
            "model (device_map with accelerate)"
        ) from error


def available(device: torch.device) -> float:
    """Bytes that can still be allocated on the device; infinite if the platform does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    if device.type != "cpu":
        return math.inf
    return min(_system_memory(), _group_memory())


def _system_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return float(line.split()[1]) * 2**10
    except (OSError, StopIteration, ValueError, IndexError):  # not Linux
        return math.inf


def _group_memory() -> float:
    """The memory limit of the process's control group, which counts its page cache as used."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return math.inf


def trim() -> None:
    """Make glibc return its free memory to the system now; does nothing with other C libraries.

    glibc keeps freed blocks of up to 32 MB. Together they can reach the size of a small model.
    """
    malloc_trim = _c_library_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _c_library_function(name: str) -> Any:
    """A function of the process's C library; None if the library does not have it."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows, where a process can have several
        return None
