"""Cutting stacked weights, whose rows are independent, into pieces to limit the memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

# A search holds some 13 copies of its rows. This many numbers at a time fit in memory beside the
# grams, and keep the machine busy. A piece has at least as many rows as inputs, because each piece
# factorises the gram again, which would otherwise take more than a tenth of the time.
CPU_NUMBERS, DEVICE_NUMBERS = 1 << 21, 1 << 26
# Pieces begin at multiples of this, as the kernels for packed weights require.
MULTIPLE = 64


def pieces(rows: int, columns: int, device: torch.device) -> int:
    """The number of pieces for stacked weights ``[rows, columns]``.

    Example:
        >>> pieces(5632, 1024, torch.device("cpu"))
        3
    """
    numbers = CPU_NUMBERS if device.type == "cpu" else DEVICE_NUMBERS
    return max(1, -(-rows // max(columns, numbers // columns)))


def cut(rows: int, count: int) -> list[slice]:
    """``count`` pieces of ``rows`` rows, of nearly equal size, in their order.

    Example:
        >>> cut(5600, 3)
        [slice(0, 1856, None), slice(1856, 3712, None), slice(3712, 5600, None)]
    """
    units = -(-rows // MULTIPLE)
    ends = [MULTIPLE * (units * at // count) for at in range(count)]
    return [slice(start, stop) for start, stop in pairwise([*ends, rows])]


def within(rows: Sequence[int], part: slice) -> list[int]:
    """The numbers of rows that a part of the stack takes from each stacked weight, without zeros.

    Example:
        >>> within([4, 2, 2], slice(3, 7))
        [1, 2, 1]
    """
    found = [
        min(end, part.stop) - max(end - length, part.start)
        for end, length in zip(accumulate(rows), rows, strict=True)
    ]
    return [piece for piece in found if piece > 0]
