"""The integer grid of a quantized weight: the values that scales and zero points allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The values (code - zero_point)·scale, for the integers ``low`` ≤ code ≤ ``high``.

    The inputs of group g in row i have the step ``scale[i, g]``. All groups have the same size.
    Zero points of a floating dtype need not be whole (:mod:`magr_fx.rounding.free_grid`).
    """

    scale: Tensor  # [out, groups], above 0, in the dtype in which it is stored
    zero_point: Tensor  # [out, groups], integers, or of a floating dtype
    low: int
    high: int
    dtype: torch.dtype  # of the values, which is the weight's

    def nearest(self, rows: Tensor) -> Tensor:
        """The codes of the values nearest to ``rows`` ``[out, in]``; float32."""
        grouped = rows.to(torch.float32).view(*self.scale.shape, -1)
        steps = grouped / self.scale.unsqueeze(-1).to(torch.float32)
        whole = not self.zero_point.is_floating_point()
        codes = _codes(steps, self.zero_point.unsqueeze(-1), whole=whole)
        return codes.clamp_(self.low, self.high).view(rows.shape)

    def values(self, codes: Tensor) -> Tensor:
        """The values of ``codes`` ``[out, in]``, rounded as in torchao; float32."""
        grouped = codes.view(*self.scale.shape, -1).to(self.dtype)
        steps = grouped - self.zero_point.unsqueeze(-1).to(self.dtype)
        scale = self.scale.unsqueeze(-1)
        # In place if that gives the same values, which saves a copy.
        values = steps.mul_(scale) if scale.dtype == self.dtype else (steps * scale).to(self.dtype)
        return values.view(codes.shape).to(torch.float32)

    def by_column(self, columns: int) -> ColumnGrid:
        """The same grid in a layout that is read one input at a time."""
        repeats = columns // self.scale.shape[1]
        return ColumnGrid(
            self.scale.T.contiguous().unbind(),
            self.zero_point.to(self.dtype).T.contiguous().unbind(),
            not self.zero_point.is_floating_point(),
            [column // repeats for column in range(columns)],
            self.low,
            self.high,
            self.dtype,
        )


def _codes(steps: Tensor, zero_point: Tensor, *, whole: bool) -> Tensor:
    """The codes of numbers in steps, not clamped; ``steps`` is changed."""
    if whole:  # as in torchao half a step goes to the even number of steps, not to the even code
        return steps.round_().add_(zero_point)
    return steps.add_(zero_point).round_()


def stacked(grids: Sequence[Grid]) -> Grid:
    """The grid of the stacked rows of several grids with the same range and dtype."""
    scale = torch.cat([grid.scale for grid in grids])
    return grids[0]._replace(scale=scale, zero_point=torch.cat([g.zero_point for g in grids]))


class ColumnGrid(NamedTuple):
    """A :class:`Grid` by groups, to visit one input of all rows at a time."""

    scale: tuple[Tensor, ...]  # [out] of each group
    zero_point: tuple[Tensor, ...]  # [out] of each group, in ``dtype``
    whole: bool  # whether all zero points are integers
    group: list[int]  # the group of each input
    low: int
    high: int
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """Whether the values are those of float32, not rounded to a smaller dtype."""
        return self.dtype == torch.float32 == self.scale[0].dtype

    def permuted(self, order: Tensor) -> ColumnGrid:
        """The grid for inputs in another order."""
        return self._replace(group=[self.group[column] for column in order.tolist()])

    def round(self, column: int, numbers: Tensor, codes: Tensor) -> Tensor:
        """The values nearest to ``numbers`` ``[out]`` of one input; float32.

        Their codes are written to ``codes`` ``[out]``, float32.
        """
        group = self.group[column]
        scale, zero = self.scale[group], self.zero_point[group]
        if self.whole or not self.exact:
            torch.div(numbers, scale.to(torch.float32), out=codes)
            _codes(codes, zero, whole=self.whole)
        else:
            torch.addcdiv(zero, numbers, scale, out=codes).round_()
        codes.clamp_(self.low, self.high)
        if self.exact:
            return (codes - zero).mul_(scale)
        return ((codes.to(self.dtype) - zero) * scale).to(self.dtype).to(torch.float32)
