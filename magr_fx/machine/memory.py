"""What the platform knows of memory: the high-water mark, and how to have freed pages back."""

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
# What allocators that raise a RuntimeError say: those of a CPU, of MPS, of libraries of CUDA.
_PHRASES = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory",
            "alloc_failed")  # fmt: skip
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def high_water_mark(device: torch.device) -> float:
    """MiB: the most that was allocated on a CUDA device, else the most resident memory so far.

    Neither counter is reset, which would change what the caller's own measurements see. NaN on
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


def give_back_what_is_freed() -> None:
    """Have the C library return what is freed to the system at once; nothing where it is no glibc.

    By itself glibc raises the size from which it does so with every large piece that is freed, up
    to 32 MB, and keeps what is smaller, in holes between what is still used: the temporaries of a
    search over a few million numbers then take up twice the memory that they need. The price is
    that the system fills fresh pages with zeros, about a fifth of the time of a small model; the
    matrices of a large one are above that size anyway.

    For a process of one's own: the setting is the whole process's, and cannot be read or undone.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, FREED_FROM)
        mallopt(_TRIM_THRESHOLD, FREED_FROM)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, of the host or of a device.

    torch has a class of its own for devices; its allocator for the CPU raises a RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):  # of a memory map
        return error.errno == errno.ENOMEM
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(phrase in said for phrase in _PHRASES)


@contextlib.contextmanager
def out_of_memory_told(report: Callable[[], Any]) -> Iterator[None]:
    """Raise :class:`OutOfMemoryError`, with a remedy, for whatever says that memory is used up.

    Args:
        report: gets the model's MagRReport, or None: whether weights are rewritten by then.
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
            f"{count} weights are rewritten already (see magr_report): load the model anew"
            if count
            else "Nothing was changed"
        )
        raise OutOfMemoryError(
            f"out of memory: {type(error).__name__}: {first_line(error)}. {done}. Calibrate with "
            "smaller or shorter batches, keep activations on a disk (spill_dir), or offload the "
            "model (device_map with accelerate)"
        ) from error


def available(device: torch.device) -> float:
    """Bytes that can still be allocated there, as far as the platform tells; else infinite."""
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
    """The most that the control group of the process may have; its cache counts as used there."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return math.inf


def trim() -> None:
    """Have the C library return what is free to the system now; nothing where it is no glibc.

    It keeps what was freed in pieces of up to 32 MB, which adds up to the size of a small model.
    """
    malloc_trim = _of_c_library("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _of_c_library(name: str) -> Any:
    """A function of the C library that the process runs on; None where it has none such."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows, where a process has several
        return None
