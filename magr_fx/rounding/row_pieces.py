"""Where to cut stacked weights whose rows are independent, so that few are worked on at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

# A search holds some 13 copies of the rows that it works on. So many numbers at a time fit beside
# the grams, and fill the machine; but no fewer rows than inputs, or factorising the gram, which
# each piece does again, would take more than a tenth of the time.
CPU_NUMBERS, DEVICE_NUMBERS = 1 << 21, 1 << 26
# Pieces begin at multiples of this, as kernels that weights are packed for want to have them.
MULTIPLE = 64


def pieces(rows: int, columns: int, device: torch.device) -> int:
    """In how many pieces to work on a stack ``[rows, columns]``.

    Example:
        >>> pieces(5632, 1024, torch.device("cpu"))
        3
    """
    numbers = CPU_NUMBERS if device.type == "cpu" else DEVICE_NUMBERS
    return max(1, -(-rows // max(columns, numbers // columns)))


def cut(rows: int, count: int) -> list[slice]:
    """So many pieces of nearly equal size, in their order.

    Example:
        >>> cut(5600, 3)
        [slice(0, 1856, None), slice(1856, 3712, None), slice(3712, 5600, None)]
    """
    units = -(-rows // MULTIPLE)
    ends = [MULTIPLE * (units * at // count) for at in range(count)]
    return [slice(start, stop) for start, stop in pairwise([*ends, rows])]


def within(rows: Sequence[int], part: slice) -> list[int]:
    """How many rows of each of the stacked weights lie in a part of the stack, if any do.

    Example:
        >>> within([4, 2, 2], slice(3, 7))
        [1, 2, 1]
    """
    found = [
        min(end, part.stop) - max(end - length, part.start)
        for end, length in zip(accumulate(rows), rows, strict=True)
    ]
    return [piece for piece in found if piece > 0]
