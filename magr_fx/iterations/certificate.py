"""The objective of a candidate, and a bound on how far it is from the optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The most rows and gram columns that are held in float64 at a time.
BLOCK = 2048


class Problem(NamedTuple):
    """The objective ½(ŵ - w)ᵀG(ŵ - w) + alpha λmax Σ‖ŵ_group‖∞, without the rows w.

    In a batch of problems, ``gram`` and ``peak`` have one more dimension in front.
    """

    gram: Tensor  # [..., in, in], symmetric positive semidefinite, in the dtype to compute in
    peak: Tensor  # [...], the same dtype: λmax(gram) > 0
    alpha: float  # relative to λmax
    group_size: int  # inputs per group; `in` for whole rows


class Certificate(NamedTuple):
    """Values per row, float64, in units where λmax(G) = 1; times λmax they are those of G."""

    before: Tensor  # [..., out]: the objective of the original row
    objective: Tensor  # [..., out]: the objective of the candidate
    bound: Tensor  # [..., out]: a lower bound of the optimum; objective - bound is the dual gap


def certify(
    problem: Problem,
    weight: Tensor,
    candidate: Tensor,
    dtype: torch.dtype = torch.float64,
    row_scale: Tensor | None = None,
) -> Certificate:
    """The objective of each row of ``candidate``, for the rows of ``weight``, and a lower bound.

    Both are ``[..., out, in]``, of any floating dtype; ``dtype`` is that of the computation. The
    bound is :func:`dual_value` in the direction ŵ - w; at the optimum it equals the objective.
    With a ``row_scale`` r, ``[..., out]``, both are those of the rows divided by r.
    """
    # MagR makes d = ŵ - w long in directions where G is almost singular. There dᵀGd is a small
    # difference of products of size λmax‖d‖², which float32 would lose, so the certificate is
    # computed in float64: one product, while the iteration takes many in float32.
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
    """:func:`dual_value` of each row with the direction d = ``moved``, in float64.

    Both are ``[..., out, in]``, of any floating dtype; the result is ``[..., out]``.
    """
    parts: list[Tensor] = []
    for rows in _blocks(weight.shape[-2]):
        direction = moved[..., rows, :].to(torch.float64)
        original = weight[..., rows, :].to(torch.float64)
        parts.append(dual_value(problem, original, direction, _slope(problem, direction)))
    return torch.cat(parts, -1)


def dual_value(problem: Problem, weight: Tensor, moved: Tensor, slope: Tensor) -> Tensor:
    """A lower bound of each row's optimum, in units where λmax(G) = 1; at least 0.

    With any direction d, g = Gd, b = dᵀg and a = gᵀw, positive semidefiniteness gives
    ½zᵀGz ≥ s·gᵀz - ½s²b for every z and s. Adding the penalty and minimising over z gives the
    bound -s·a - ½s²b, which holds if s·‖g‖₁ ≤ alpha λmax in every group; s is the best such
    number. The formula has no inverse of G, so a rank-deficient gram is no special case.

    Args:
        problem: its alpha and group size are used.
        weight: w, ``[..., out, in]``.
        moved: d, ``[..., out, in]``; the best one is d = ŵ - w for the optimal ŵ.
        slope: g/λmax = Gd/λmax, ``[..., out, in]``; the bound is as accurate as this is.

    Returns:
        ``[..., out]``.
    """
    curvature = (moved * slope).sum(-1)
    linear = (slope * weight).sum(-1)
    # The l1 norm is dual to ‖·‖∞. The limit holds in every group, so the largest norm counts.
    steepest = slope.view(*slope.shape[:-1], -1, problem.group_size).abs().sum(-1).amax(-1)
    best = torch.minimum(-linear / curvature, problem.alpha / steepest).clamp(min=0)
    # If Gd = 0 (or rounding of G makes dᵀGd negative), only s = 0 is safe, and the bound is 0.
    best = torch.where(curvature > 0, best, 0)
    return (-best * linear - 0.5 * best.square() * curvature).clamp(min=0)


def penalty(problem: Problem, rows: Tensor) -> Tensor:
    """alpha Σ‖ŵ_group‖∞ for each row of ``[..., out, in]``."""
    groups = rows.view(*rows.shape[:-1], -1, problem.group_size)
    return problem.alpha * groups.abs().amax(-1).sum(-1)


def _slope(problem: Problem, moved: Tensor) -> Tensor:
    """Gd/λmax in the dtype of d, without converting the whole gram to it at once."""
    slope = torch.empty_like(moved)
    for columns in _blocks(moved.shape[-1]):
        slope[..., columns] = moved @ problem.gram[..., columns].to(moved.dtype)
    return slope.div_(problem.peak.to(moved.dtype)[..., None, None])


def _blocks(size: int) -> list[slice]:
    return [slice(i, i + BLOCK) for i in range(0, size, BLOCK)]
