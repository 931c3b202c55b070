"""From rows to quantized values: rounded to the nearest, by the target itself, or by GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from magr_fx.rounding.gptq import Compensation, gptq
from magr_fx.rounding.grid import Grid, stacked

# GPTQ visits one input of all rows at a time, so a few rows take as long as many. Candidates are
# therefore rounded together: up to so many rows on a CPU, whose caches hold as many, and up to so
# many numbers elsewhere.
CPU_ROWS, DEVICE_NUMBERS = 4096, 1 << 26


class Rounded(NamedTuple):
    """The quantized values of rows, and the tensors that make the quantizer produce them."""

    values: Tensor  # [out, in], float32
    parts: tuple[Tensor, ...]  # each [out, ...]: a weight, or codes, scales and zero points


class Candidate(NamedTuple):
    """Rows to round, and the rows that set the grid."""

    rows: Tensor  # [out, in], float32
    clipped: Tensor  # the same after clipping, in the weight's dtype
    fitted: bool = False  # whether the grid is fitted to them, not only spans them


class Rounding(Protocol):
    """A way to round rows.

    If ``makes_codes`` is true, its parts are codes, scales and zero points; else the one part is a
    weight that the quantizer rounds.
    """

    makes_codes: bool
    fits: bool  # whether it has grids that are fitted to rows
    # Of a grid whose whole zero point takes all levels, the shorter side as a share of the longer
    # one: such as ½ of -2, -1, 0 and 1. None: it has no sides, or no such grid.
    shorter: float | None

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        """Round one candidate."""

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        """Round several candidates of the same shape, in their order."""

    def on_grid_of(self, parts: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Rounded:
        """Round rows to the grid of earlier parts, for weights of a dtype; if it makes codes."""


class Nearest:
    """Rounding by the quantizer itself, which takes the clipped rows as the weight.

    Args:
        quantize: takes a weight ``[out, in]``, returns its quantized values.
        shorter: as in :class:`Rounding`.
    """

    makes_codes, fits = False, False

    def __init__(self, quantize: Callable[[Tensor], Tensor], shorter: float | None = None) -> None:
        self.quantize, self.shorter = quantize, shorter

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        del rows
        return Rounded(self.quantize(clipped), (clipped,))

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        """One after the other, so that only one is in memory at a time."""
        return (self(one.rows, one.clipped) for one in candidates)

    def on_grid_of(self, parts: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Rounded:
        """There is none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the quantizer chooses the grid")


class OnGrid:
    """Rounding to the grid of the clipped rows: by GPTQ, or to the nearest.

    The rows are rounded without the clip. If a value lies outside the grid, GPTQ lets the inputs
    after it compensate the error. The parts are codes, scales and zero points.

    Args:
        grid_of: takes a weight ``[out, in]``, returns a grid for it, such as the quantizer's.
        compensation: of the gram, for :func:`magr_fx.rounding.gptq.gptq`; None rounds to nearest.
        fit: returns another grid for a weight, for candidates that are ``fitted``.
        shorter: as in :class:`Rounding`.
    """

    makes_codes = True

    def __init__(
        self,
        grid_of: Callable[[Tensor], Grid],
        compensation: Compensation | None,
        fit: Callable[[Tensor], Grid] | None = None,
        shorter: float | None = None,
    ) -> None:
        self.grid_of, self.fit, self.shorter = grid_of, fit, shorter
        self.compensation = compensation
        self.fits = fit is not None

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        grid = self.grid_of(clipped)
        codes = self._codes([rows], grid)
        return Rounded(grid.values(codes), (codes, grid.scale, grid.zero_point))

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        """Several at once, as many as take hardly longer than one."""
        # Only the grid of the clipped rows is needed, so the rows are freed at once.
        remaining = ((one.rows, self._grid(one)) for one in candidates)
        for first in remaining:
            some = [first, *islice(remaining, _at_once(first[0]) - 1)]
            weights, grids = zip(*some, strict=True)
            codes = self._codes(weights, stacked(grids))
            for grid, own in zip(grids, codes.chunk(len(some)), strict=True):
                yield Rounded(grid.values(own), (own, grid.scale, grid.zero_point))

    def on_grid_of(self, parts: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Rounded:
        """Round rows to the grid of earlier codes, scales and zero points."""
        _, scale, zero = parts
        grid = self.grid_of(rows.to(dtype))._replace(scale=scale, zero_point=zero)
        codes = self._codes([rows], grid)
        return Rounded(grid.values(codes), (codes, scale, zero))

    def _grid(self, candidate: Candidate) -> Grid:
        if candidate.fitted and self.fit is not None:
            return self.fit(candidate.clipped)
        return self.grid_of(candidate.clipped)

    def _codes(self, weights: Sequence[Tensor], grid: Grid) -> Tensor:
        if self.compensation is not None:
            return gptq(weights, grid, self.compensation)
        rows = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        return grid.nearest(rows).to(torch.int8)


def _at_once(rows: Tensor) -> int:
    if rows.device.type == "cpu":
        return max(1, CPU_ROWS // len(rows))
    return max(1, DEVICE_NUMBERS // rows.numel())
