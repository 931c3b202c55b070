"""The inner loop of ADMM: a few steps with some of the rows, and the evaluation of the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.iterations.certificate import Problem, dual_value, penalty
from magr_fx.iterations.relaxed_step import clamp_groups, prox_level, relaxed_step
from magr_fx.iterations.splitting import Splitting
from magr_fx.machine.matmul_precision import full_float32

# x is replaced by 1.6x - 0.6z; values of 1.5 to 1.8 are usual (Boyd et al., section 3.4.3).
OVER_RELAXATION = 1.6
# The dual direction is also extrapolated by this many times its change in the last step.
AHEAD = (2.0, 8.0)


class Evaluation(NamedTuple):
    """Candidate, objective and bound of each row, in units where λmax(G) = 1."""

    candidate: Tensor  # [..., out, in]: z
    objective: Tensor  # [..., out]: of z
    direction: Tensor  # [..., out, in]: the best of x - w and its extrapolations
    bound: Tensor  # [..., out]: the dual value of that direction
    imbalance: Tensor  # [..., out]: relative primal residual / relative dual residual


class Tile:
    """Rows of one problem ``[rows, in]``, or of a batch of problems ``[problems, rows, in]``.

    Args:
        problem: with the gram ``[in, in]``, or ``[problems, in, in]``.
        splitting: the splitting of the same problem.
        weight: w, in the dtype of the gram.
        shifted: v = z + u, of the shape of ``weight``; changed in place.
        level: ``[..., groups]``: a guess of the level in z = clamp(v, -level, level).
    """

    def __init__(
        self,
        problem: Problem,
        splitting: Splitting,
        weight: Tensor,
        shifted: Tensor,
        level: Tensor,
    ) -> None:
        self.problem, self.weight = problem, weight
        self.shifted, self.level = shifted, level
        self._matrix = splitting.step
        # ρ for rows, [in] or [problems, 1, in], and for their groups, [..., groups, group_size]
        self._rho = splitting.rho if weight.dim() == 2 else splitting.rho.unsqueeze(-2)
        self._group_rho = self._rho.view(*self._rho.shape[:-1], -1, problem.group_size)
        self._scratch = torch.empty_like(shifted)

    def step(self, times: int) -> None:
        """Take steps. Each is one product, added to ``shifted`` in place."""
        if times < 1:
            return
        add_product = self.shifted.addmm_ if self.weight.dim() == 2 else self.shifted.baddbmm_
        source = torch.empty_like(self.shifted)
        for _ in range(times):
            self._prepare(source)
            add_product(source, self._matrix, alpha=OVER_RELAXATION)

    def step_and_evaluate(self, times: int) -> Evaluation:
        """Take steps. The last two keep x and its last change, which the evaluation needs."""
        self.step(times - 2)  # in the precision that torch is set to; the evaluation is exact
        with full_float32():
            return self._steps_apart(min(times, 2))

    def _steps_apart(self, times: int) -> Evaluation:
        change: Tensor | None = None
        slope_change: Tensor | None = None
        if times > 1:
            before = self._prepare(torch.empty_like(self.shifted))
            moved = before @ self._matrix
            self.shifted.add_(moved, alpha=OVER_RELAXATION)
            source = self._prepare(torch.empty_like(self.shifted))
            # The product of the difference, not the difference of two products, whose rounding
            # errors would be large beside the small change that is extrapolated.
            before = source - before
            change = before @ self._matrix
            slope_change = (before - change).mul_(self._rho)
            moved += change
        else:
            source = self._prepare(torch.empty_like(self.shifted))
            moved = source @ self._matrix
        self.shifted.add_(moved, alpha=OVER_RELAXATION)
        return self._evaluate(source, moved, change, slope_change)

    def _prepare(self, source: Tensor) -> Tensor:
        """Everything of one step except its matrix product, whose factor is returned."""
        self.level = relaxed_step(
            self.shifted,
            self.weight,
            self.level,
            source,
            self._scratch,
            rho=self._group_rho,
            alpha=self.problem.alpha,
            relaxation=OVER_RELAXATION,
        )
        return source

    def _evaluate(
        self, source: Tensor, moved: Tensor, change: Tensor | None, slope_change: Tensor | None
    ) -> Evaluation:
        """Evaluate x = w + moved, which was computed from ``source``, and the z after it."""
        problem, weight, shifted = self.problem, self.weight, self.shifted
        magnitude = shifted.abs().view(*self.level.shape, -1)
        self.level = prox_level(magnitude, problem.alpha, rho=self._group_rho, start=self.level)
        del magnitude
        fixed = clamp_groups(shifted, self.level)
        # G(x - w)/λmax follows from the definition of x, without a product
        slope = (source - moved).mul_(self._rho)
        rest = fixed - weight - moved  # z - x
        # The quadratic term at z, expanded around x. This is exact, and avoids the cancellation in
        # ½dᵀGd for the long d = z - w, because only the short z - x is multiplied by the gram.
        curved = rest @ problem.gram
        curved /= problem.peak if weight.dim() == 2 else problem.peak[:, None, None]
        objective = (0.5 * (moved * slope + rest * curved) + rest * slope).sum(-1)
        objective += penalty(problem, fixed)

        direction, bound = moved, dual_value(problem, weight, moved, slope)
        if change is not None and slope_change is not None:
            for ahead in AHEAD:
                farther = torch.add(moved, change, alpha=ahead)
                value = dual_value(
                    problem, weight, farther, torch.add(slope, slope_change, alpha=ahead)
                )
                better = value > bound
                bound = torch.where(better, value, bound)
                direction = torch.where(better.unsqueeze(-1), farther, direction)
        return Evaluation(fixed, objective, direction, bound, self._imbalance(source, moved, fixed))

    def _imbalance(self, source: Tensor, moved: Tensor, fixed: Tensor) -> Tensor:
        """‖x - z‖/‖z - w‖ divided by ‖z - z'‖/‖u‖ in the metric of ρ; z' is the previous z.

        These are the relative residuals of Wohlberg (arXiv 1704.06209), but with z - w in place of
        x or z, which consist mostly of the original row, however far it has to move.
        """
        # z' was not kept, but is a linear combination of v, which was updated in place, of the
        # source y = z' - u' - w, and of w and x.
        earlier = self.shifted + source - OVER_RELAXATION * moved
        earlier.add_(self.weight, alpha=1 - OVER_RELAXATION).div_(2 - OVER_RELAXATION)

        def size(rows: Tensor) -> Tensor:
            return (rows.square() * self._rho).sum(-1).sqrt()

        travelled = fixed - self.weight
        primal = size(travelled - moved) * size(self.shifted - fixed)
        return primal / (size(travelled) * size(fixed - earlier))
