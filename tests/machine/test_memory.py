"""How memory is counted, and given back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from magr_fx.machine.memory import high_water_mark

# Tensors of 8 MB, every second one of which is freed: a heap has no use for such holes.
HOLES = """
import sys, torch
from magr_fx.machine.memory import return_freed_memory_at_once
if sys.argv[1] == "given back":
    return_freed_memory_at_once()
torch.empty(2**23 - 2**16, dtype=torch.float32)  # 32 MB: freed, and the threshold is raised
kept = [torch.ones(2**21) for _ in range(40)]
del kept[::2]
with open("/proc/self/status") as lines:
    print(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
"""


def anonymous(how: str) -> int:
    """kB of a process of its own at its end."""
    command = [sys.executable, "-c", HOLES, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="needs glibc",
)
@pytest.mark.slow
def test_what_is_freed_is_given_back() -> None:
    freed = 20 * 8 * 1024  # kB
    assert anonymous("as it is") - anonymous("given back") > freed / 2


def test_the_high_water_mark_includes_what_is_in_use() -> None:
    before = high_water_mark(torch.device("cpu"))
    block = torch.ones(int((before + 64) * 2**18))  # more than ever before, in float32
    assert high_water_mark(torch.device("cpu")) >= block.nbytes / 2**20
