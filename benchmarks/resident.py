"""Seconds of the processor and peak memory of one call, in this process. Linux."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Cost(NamedTuple):
    """What a call cost."""

    wall_seconds: float
    cpu_seconds: float  # of all cores together
    peak: float  # the most memory that the process had meanwhile, in MiB


def resident(which: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most since the last reset) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    if found is None:
        sys.exit(f"benchmarks: this platform does not tell {which}")
    return int(found[1]) / 1024


def measured(action: Callable[[], Result]) -> tuple[Result, Cost]:
    """The result of a call, and its cost."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result, Cost(wall, cpu, resident("VmHWM"))
