"""Plain round-to-nearest grids, and errors in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.rounding.grid import Grid


def make_grid(
    weight: Tensor, bits: int, group_size: int | None = None, *, symmetric: bool = True
) -> Grid:
    """The grid that covers each row, or group of inputs, of a weight ``[out, in]``."""
    size = group_size or weight.shape[1]
    grouped = weight.float().view(len(weight), -1, size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        step = grouped.abs().amax(-1) / (high + 0.5)
        zero = torch.zeros_like(step)
    else:
        bottom, top = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        step = (top - bottom) / (high - low)
        zero = (low - torch.round(bottom / step.clamp(min=1e-5))).clamp(low, high)
    scale = step.clamp(min=1e-5).to(weight.dtype)
    return Grid(scale, zero.to(torch.int8), low, high, weight.dtype)


def wide(grid: Grid, columns: int) -> tuple[Tensor, Tensor]:
    """The step and the zero point of each number ``[out, in]``, in float64."""
    size = columns // grid.scale.shape[1]
    scale, zero = grid.scale.double(), grid.zero_point.double()
    return scale.repeat_interleave(size, 1), zero.repeat_interleave(size, 1)


def worth(grid: Grid, codes: Tensor) -> Tensor:
    """The values of codes ``[out, in]``, rounded to the grid's dtype once, in float64."""
    scale, zero = wide(grid, codes.shape[1])
    return ((codes.double() - zero) * scale).to(grid.dtype).double()


def energies(values: Tensor, target_weight: Tensor, gram: Tensor) -> Tensor:
    """(v - a)ᵀG(v - a) of every row, in float64."""
    away = values.double() - target_weight.double()
    return ((away @ gram.double()) * away).sum(-1)


def float32_slack(values: Tensor, target_weight: Tensor, gram: Tensor) -> Tensor:
    """By how much float32 may misjudge those errors."""
    away = values.double() - target_weight.double()
    slack: Tensor = 1e-6 * torch.linalg.matrix_norm(gram.double(), 2) * away.square().sum(-1)
    return slack
