"""The innermost part of ADMM: some rows, a few steps, and a look at where they lead."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.iterations.certificate import Problem, dual_value, penalty
from magr_fx.iterations.relaxed_step import clamp_groups, prox_level, relaxed_step
from magr_fx.iterations.splitting import Splitting
from magr_fx.machine.matmul_precision import full_float32

# x is replaced by 1.6x - 0.6z, the middle of the customary 1.5 to 1.8 (Boyd et al., section 3.4.3).
OVER_RELAXATION = 1.6
# The dual direction is also tried this many steps ahead, along the last step's change.
AHEAD = (2.0, 8.0)


class Sight(NamedTuple):
    """What a look found, per row; everything in units where λmax(G) = 1."""

    candidate: Tensor  # [..., out, in]: z
    objective: Tensor  # [..., out]: of z
    direction: Tensor  # [..., out, in]: the best of x - w and its extrapolations
    bound: Tensor  # [..., out]: the dual value of that direction
    imbalance: Tensor  # [..., out]: relative primal residual / relative dual residual


class Tile:
    """Rows of one problem ``[rows, in]``, or of a batch of problems ``[problems, rows, in]``.

    Args:
        problem: gram ``[in, in]``, or ``[problems, in, in]``.
        splitting: of the same problem.
        weight: w, in the dtype of the gram.
        shifted: v = z + u; changed in place.
        level: ``[..., groups]``: z = clamp(v, -level, level), or a guess of it.
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
        # ρ as rows see it, [in] or [problems, 1, in], and as their groups do
        self._prices = splitting.prices if weight.dim() == 2 else splitting.prices.unsqueeze(-2)
        self._group_prices = self._prices.view(*self._prices.shape[:-1], -1, problem.group_size)
        self._scratch = torch.empty_like(shifted)

    def step(self, times: int) -> None:
        """Take steps. Each is one product, straight into the running sum."""
        if times < 1:
            return
        add_product = self.shifted.addmm_ if self.weight.dim() == 2 else self.shifted.baddbmm_
        source = torch.empty_like(self.shifted)
        for _ in range(times):
            self._prepare(source)
            add_product(source, self._matrix, alpha=OVER_RELAXATION)

    def step_and_look(self, times: int) -> Sight:
        """Take steps, the last two of them apart, which shows x and how it last changed."""
        self.step(times - 2)  # in the precision that torch is set to; the rest is judged
        with full_float32():
            return self._steps_apart(min(times, 2))

    def _steps_apart(self, times: int) -> Sight:
        change: Tensor | None = None
        slope_change: Tensor | None = None
        if times > 1:
            before = self._prepare(torch.empty_like(self.shifted))
            moved = before @ self._matrix
            self.shifted.add_(moved, alpha=OVER_RELAXATION)
            source = self._prepare(torch.empty_like(self.shifted))
            # The product of the difference, not the difference of two products: what is
            # extrapolated must be as accurate as it is small.
            before = source - before
            change = before @ self._matrix
            slope_change = (before - change).mul_(self._prices)
            moved += change
        else:
            source = self._prepare(torch.empty_like(self.shifted))
            moved = source @ self._matrix
        self.shifted.add_(moved, alpha=OVER_RELAXATION)
        return self._look(source, moved, change, slope_change)

    def _prepare(self, source: Tensor) -> Tensor:
        """Everything of one step but its product, which is to be taken of the result."""
        self.level = relaxed_step(
            self.shifted,
            self.weight,
            self.level,
            source,
            self._scratch,
            prices=self._group_prices,
            alpha=self.problem.alpha,
            relaxation=OVER_RELAXATION,
        )
        return source

    def _look(
        self, source: Tensor, moved: Tensor, change: Tensor | None, slope_change: Tensor | None
    ) -> Sight:
        """Judge x = w + moved, which came from ``source``, and the z that follows it."""
        problem, weight, shifted = self.problem, self.weight, self.shifted
        magnitude = shifted.abs().view(*self.level.shape, -1)
        self.level = prox_level(
            magnitude, problem.alpha, prices=self._group_prices, start=self.level
        )
        del magnitude
        fixed = clamp_groups(shifted, self.level)
        # G(x - w)/λmax, by the definition of x and without a product
        slope = (source - moved).mul_(self._prices)
        rest = fixed - weight - moved  # z - x
        # The gram's part at z, seen from x: exact, and without ½dᵀGd's cancellation for the long
        # d = z - w, because what is left for float32 is small.
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
        return Sight(fixed, objective, direction, bound, self._imbalance(source, moved, fixed))

    def _imbalance(self, source: Tensor, moved: Tensor, fixed: Tensor) -> Tensor:
        """‖x - z‖/‖z - w‖ over ‖z - z'‖/‖u‖ in the metric of ρ, z' being the z of one step before.

        The relative residuals of Wohlberg (arXiv 1704.06209), but with z - w in the place of x
        or z, of which the original row would be the largest part however far it has to move.
        """
        # Of v, which was updated in place, and of y = z' - u' - w, z' is a linear combination.
        earlier = self.shifted + source - OVER_RELAXATION * moved
        earlier.add_(self.weight, alpha=1 - OVER_RELAXATION).div_(2 - OVER_RELAXATION)

        def size(rows: Tensor) -> Tensor:
            return (rows.square() * self._prices).sum(-1).sqrt()

        travelled = fixed - self.weight
        primal = size(travelled - moved) * size(self.shifted - fixed)
        return primal / (size(travelled) * size(fixed - earlier))
