"""What a candidate is worth: its objective, and a bound on how far it is from the optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The most rows and gram columns that are held in float64 at a time.
BLOCK = 2048


class Problem(NamedTuple):
    """½(ŵ - w)ᵀG(ŵ - w) + alpha λmax Σ‖ŵ_group‖∞, but for the rows w."""

    gram: Tensor  # [in, in], float32, symmetric positive semidefinite
    peak: Tensor  # 0-dim, float32: λmax(gram) > 0
    alpha: float  # relative to λmax
    group_size: int  # `in` for whole rows


class Certificate(NamedTuple):
    """Per row, float64, in units where λmax(G) = 1; multiply by λmax for the given gram's."""

    before: Tensor  # [out]: the objective of the original row
    objective: Tensor  # [out]: the objective of the candidate
    gap: Tensor  # [out]: primal - dual ≥ 0, bounds objective - optimum from above


def certify(problem: Problem, weight: Tensor, candidate: Tensor) -> Certificate:
    """Objective and dual gap of each row of ``candidate`` in the place of ``weight``'s.

    Both are ``[out, in]``, of any floating dtype.

    With d = ŵ - w, g = Gd, b = dᵀg and a = gᵀw, positive semidefiniteness gives for any multiple
    sd of the direction ½zᵀGz ≥ s·gᵀz - ½s²b. Adding the penalty and minimising over z leaves
    -s·a - ½s²b, a lower bound of the optimum, as long as s·‖g‖₁ ≤ alpha λmax in every group. No
    inverse of G appears, so a rank-deficient gram is no special case. The bound is zero at the
    optimum, where s = 1 is feasible and best.
    """
    # d is long exactly where G is almost singular: that is how MagR works. There dᵀGd is a small
    # remainder of products of size λmax‖d‖², and float32 would lose it, so everything here is
    # float64: one product, against the many that the iteration takes in float32.
    parts = [
        _certify_block(
            problem,
            weight[i : i + BLOCK].to(torch.float64),
            candidate[i : i + BLOCK].to(torch.float64),
        )
        for i in range(0, len(weight), BLOCK)
    ]
    return Certificate(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _certify_block(problem: Problem, weight: Tensor, candidate: Tensor) -> Certificate:
    gram, peak, alpha, group_size = problem
    moved = candidate - weight
    slope = torch.empty_like(moved)
    for i in range(0, len(gram), BLOCK):
        columns = slice(i, i + BLOCK)
        slope[:, columns] = moved @ gram[:, columns].to(torch.float64)
    slope /= peak
    curvature = (moved * slope).sum(-1)
    linear = (slope * weight).sum(-1)
    # The l1 norm is the dual of ‖·‖∞, and groups separate: the worst group sets the limit.
    steepest = slope.view(len(slope), -1, group_size).abs().sum(-1).amax(-1)
    best = torch.minimum(-linear / curvature, alpha / steepest).clamp(min=0)
    # Where Gd = 0 (or rounding of G makes dᵀGd negative) only s = 0 is safe: the bound is 0.
    best = torch.where(curvature > 0, best, 0)
    dual = -best * linear - 0.5 * best.square() * curvature
    objective = 0.5 * curvature + _penalty(problem, candidate)
    return Certificate(_penalty(problem, weight), objective, (objective - dual).clamp(min=0))


def _penalty(problem: Problem, rows: Tensor) -> Tensor:
    """alpha Σ‖ŵ_group‖∞ for each row."""
    groups = rows.view(len(rows), -1, problem.group_size)
    return problem.alpha * groups.abs().amax(-1).sum(-1)
