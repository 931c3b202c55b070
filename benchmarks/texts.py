"""Texts as calibration: windows of tokens, drawn by a seed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples/data"
TEXT = DATA / "sotu_calibration.txt"
sys.path.insert(0, str(ROOT / "examples"))


def random_windows(
    tokenizer: Any, file: Path, *, count: int, length: int = 512, seed: int = 0
) -> list[Tensor]:
    """So many windows of a text, no two of which overlap, in batches [4, length]."""
    text = file.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return list(torch.split(windows[order[:count]], 4))
