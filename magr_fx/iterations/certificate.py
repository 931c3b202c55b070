"""What a candidate is worth: its objective, and a bound on how far it is from the optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The most rows and gram columns that are held in float64 at a time.
BLOCK = 2048


class Problem(NamedTuple):
    """½(ŵ - w)ᵀG(ŵ - w) + alpha λmax Σ‖ŵ_group‖∞, but for the rows w.

    A batch of problems, one for each gram, has a dimension in front in ``gram`` and ``peak``.
    """

    gram: Tensor  # [..., in, in], symmetric positive semidefinite, in the dtype to compute in
    peak: Tensor  # [...], the same dtype: λmax(gram) > 0
    alpha: float  # relative to λmax
    group_size: int  # `in` for whole rows


class Certificate(NamedTuple):
    """Per row, float64, in units where λmax(G) = 1; multiply by λmax for the given gram's."""

    before: Tensor  # [..., out]: the objective of the original row
    objective: Tensor  # [..., out]: the objective of the candidate
    bound: Tensor  # [..., out]: at most the optimum, hence objective - bound bounds the excess


def certify(
    problem: Problem,
    weight: Tensor,
    candidate: Tensor,
    dtype: torch.dtype = torch.float64,
    row_scale: Tensor | None = None,
) -> Certificate:
    """Objective of each row of ``candidate`` in the place of ``weight``'s, and a lower bound.

    Both are ``[..., out, in]``, of any floating dtype. The bound is :func:`dual_value` in the
    direction ŵ - w; at the optimum it equals the objective. With a ``row_scale`` r, ``[..., out]``,
    they are those of the rows divided by r.
    """
    # ŵ - w is long exactly where G is almost singular: that is how MagR works. There dᵀGd is a
    # small remainder of products of size λmax‖d‖², and float32 would lose it, so what is to be
    # exact is float64: one product, against the many that the iteration takes in float32.
    parts: list[Certificate] = []
    for rows in _blocks(weight.shape[-2]):
        original = weight[..., rows, :].to(dtype)
        chosen = candidate[..., rows, :].to(dtype)
        if row_scale is not None:
            scale = row_scale[..., rows].to(dtype).unsqueeze(-1)
            original, chosen = original / scale, chosen / scale
        moved = chosen - original
        slope = _slope(problem, moved)
        objective = 0.5 * (moved * slope).sum(-1) + penalty(problem, chosen)
        bound = dual_value(problem, original, moved, slope)
        parts.append(Certificate(penalty(problem, original), objective, bound))
    columns = (torch.cat(column, -1) for column in zip(*parts, strict=True))
    return Certificate(*(column.to(torch.float64) for column in columns))


def lower_bound(problem: Problem, weight: Tensor, moved: Tensor) -> Tensor:
    """:func:`dual_value` of each row in the direction ``moved``, in float64.

    Both are ``[..., out, in]``, of any floating dtype; the result is ``[..., out]``.
    """
    parts: list[Tensor] = []
    for rows in _blocks(weight.shape[-2]):
        direction = moved[..., rows, :].to(torch.float64)
        original = weight[..., rows, :].to(torch.float64)
        parts.append(dual_value(problem, original, direction, _slope(problem, direction)))
    return torch.cat(parts, -1)


def dual_value(problem: Problem, weight: Tensor, moved: Tensor, slope: Tensor) -> Tensor:
    """A lower bound of each row's optimum, in units where λmax(G) = 1; 0 at the least.

    With any direction d, g = Gd, b = dᵀg and a = gᵀw, positive semidefiniteness gives
    ½zᵀGz ≥ s·gᵀz - ½s²b for every z and s. Adding the penalty and minimising over z leaves
    -s·a - ½s²b, as long as s·‖g‖₁ ≤ alpha λmax in every group; s is the best that is allowed. No
    inverse of G appears, so a rank-deficient gram is no special case.

    Args:
        problem: for alpha and the groups.
        weight: w, ``[..., out, in]``.
        moved: d, ``[..., out, in]``; best is d = ŵ - w for the optimal ŵ.
        slope: g/λmax = Gd/λmax, ``[..., out, in]``; its accuracy is that of the bound.
    """
    curvature = (moved * slope).sum(-1)
    linear = (slope * weight).sum(-1)
    # The l1 norm is the dual of ‖·‖∞, and groups separate: the worst group sets the limit.
    steepest = slope.view(*slope.shape[:-1], -1, problem.group_size).abs().sum(-1).amax(-1)
    best = torch.minimum(-linear / curvature, problem.alpha / steepest).clamp(min=0)
    # Where Gd = 0 (or rounding of G makes dᵀGd negative) only s = 0 is safe: the bound is 0.
    best = torch.where(curvature > 0, best, 0)
    return (-best * linear - 0.5 * best.square() * curvature).clamp(min=0)


def penalty(problem: Problem, rows: Tensor) -> Tensor:
    """alpha Σ‖ŵ_group‖∞ for each row of ``[..., out, in]``."""
    groups = rows.view(*rows.shape[:-1], -1, problem.group_size)
    return problem.alpha * groups.abs().amax(-1).sum(-1)


def _slope(problem: Problem, moved: Tensor) -> Tensor:
    """Gd/λmax in the dtype of d, without such a copy of the whole gram."""
    slope = torch.empty_like(moved)
    for columns in _blocks(moved.shape[-1]):
        slope[..., columns] = moved @ problem.gram[..., columns].to(moved.dtype)
    return slope.div_(problem.peak.to(moved.dtype)[..., None, None])


def _blocks(size: int) -> list[slice]:
    return [slice(i, i + BLOCK) for i in range(0, size, BLOCK)]
