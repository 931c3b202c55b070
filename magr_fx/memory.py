"""The memory high-water mark, where the platform knows it."""

from __future__ import annotations

import math
import sys

import torch


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
