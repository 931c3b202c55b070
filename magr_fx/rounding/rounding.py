"""From a row to its quantized values: to the nearest, by the target itself, or by GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from torch import Tensor

from magr_fx.rounding.gptq import Compensation, gptq
from magr_fx.rounding.grid import Grid, stacked

# GPTQ visits one input of all rows at a time, so that a few rows take as long as many: up to so
# many rows on a CPU, whose caches hold that much, and up to so many numbers elsewhere.
CPU_ROWS, DEVICE_NUMBERS = 4096, 1 << 26


class Rounded(NamedTuple):
    """Rows as they will be worth once quantized, and what it takes to make them so."""

    values: Tensor  # [out, in], float32
    parts: tuple[Tensor, ...]  # [out, ...] each: rows of them belong to rows of the values


# Rows [out, in] float32, and the same rows clipped, in the weight's dtype.
Candidate = tuple[Tensor, Tensor]


class Rounding(Protocol):
    """How rows are rounded.

    ``makes_codes`` says whether it makes codes itself; else it makes a weight for the quantizer.
    """

    makes_codes: bool

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        """One candidate, rounded."""

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        """Each of several candidates of one shape, in their order."""


class Nearest:
    """The quantizer itself rounds; what it takes is the clipped rows, in the weight's place.

    Args:
        quantize: weight ``[out, in]`` → the values that the quantizer makes of it.
    """

    makes_codes = False

    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        self.quantize = quantize

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        del rows
        return Rounded(self.quantize(clipped), (clipped,))

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        """One after the other: only one is in memory at a time."""
        return (self(*candidate) for candidate in candidates)


class OnGrid:
    """:func:`magr_fx.rounding.gptq.gptq` on the grid that the quantizer gives the clipped rows.

    The rows themselves are not clipped: what the clip takes from one input, the inputs that come
    after it make up for. What it takes are codes, scales and zero points.

    Args:
        grid_of: weight ``[out, in]`` → the grid that the quantizer chooses for it.
        compensation: of the gram.
    """

    makes_codes = True

    def __init__(self, grid_of: Callable[[Tensor], Grid], compensation: Compensation) -> None:
        self.grid_of = grid_of
        self.compensation = compensation

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        grid = self.grid_of(clipped)
        codes = gptq(rows, grid, self.compensation)
        return Rounded(grid.values(codes), (codes, grid.scale, grid.zero_point))

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        """As many at once as cost little more than one."""
        # Of the clipped rows only the grid is needed.
        remaining = ((rows, self.grid_of(clipped)) for rows, clipped in candidates)
        for first in remaining:
            some = [first, *islice(remaining, _at_once(first[0]) - 1)]
            weights, grids = zip(*some, strict=True)
            codes = gptq(weights, stacked(grids), self.compensation)
            for grid, own in zip(grids, codes.chunk(len(some)), strict=True):
                yield Rounded(grid.values(own), (own, grid.scale, grid.zero_point))


def _at_once(rows: Tensor) -> int:
    if rows.device.type == "cpu":
        return max(1, CPU_ROWS // len(rows))
    return max(1, DEVICE_NUMBERS // rows.numel())
