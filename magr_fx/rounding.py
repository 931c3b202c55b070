"""From a row to its quantized values: to the nearest, by the target itself, or by GPTQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from magr_fx.gptq import Compensation, gptq
from magr_fx.grid import Grid


class Rounded(NamedTuple):
    """Rows as they will be worth once quantized, and what it takes to make them so."""

    values: Tensor  # [out, in], float32
    parts: tuple[Tensor, ...]  # [out, ...] each: rows of them belong to rows of the values


# (rows [out, in] float32, the same rows clipped, in the weight's dtype) → Rounded
Rounding = Callable[[Tensor, Tensor], Rounded]


class Nearest:
    """The quantizer itself rounds; what it takes is the clipped rows, in the weight's place.

    Args:
        quantize: weight ``[out, in]`` → the values that the quantizer makes of it.
    """

    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        self.quantize = quantize

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        del rows
        return Rounded(self.quantize(clipped), (clipped,))


class OnGrid:
    """:func:`magr_fx.gptq.gptq` on the grid that the quantizer gives the clipped rows.

    The rows themselves are not clipped: what the clip takes from one input, the inputs that come
    after it make up for. What it takes are codes, scales and zero points.

    Args:
        grid_of: weight ``[out, in]`` → the grid that the quantizer chooses for it.
        compensation: of the gram.
    """

    def __init__(self, grid_of: Callable[[Tensor], Grid], compensation: Compensation) -> None:
        self.grid_of = grid_of
        self.compensation = compensation

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        grid = self.grid_of(clipped)
        codes = gptq(rows, grid, self.compensation)
        return Rounded(grid.values(codes), (codes, grid.scale, grid.zero_point))
