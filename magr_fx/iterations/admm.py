"""The alternating direction method of multipliers: a handful of steps, each one matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.iterations.admm_tile import Tile
from magr_fx.iterations.certificate import BLOCK, Problem, lower_bound, penalty
from magr_fx.iterations.relaxed_step import clamp_groups
from magr_fx.iterations.solution import Iterate
from magr_fx.iterations.splitting import Splitting, split, unit_prices

# Steps before the first look at the dual gap, and between looks. A look costs a product and some
# passes over the rows.
FIRST_LOOK = 10
LOOK_EVERY = 5
# The first strength of ρ: high, so that the first steps settle which entries are clamped.
FIRST_STRENGTH = 0.3
# After how many steps ρ is balanced; the most that it changes at once; and the least change that
# is worth another factorisation.
BALANCE_AT = (10, 20, 50, 75)
LEAST_FACTOR, MOST_FACTOR = 1 / 6, 3.0
WORTH_IT = 2.0
# From a neighbouring alpha the clamped entries are settled sooner: in this many steps of the
# first strength, after which ρ is the one that was balanced there.
SETTLE = 3
# Where balancing aims: the relative primal residual at this many times the dual one. *Measured*
# on real layers; an even balance leaves the dual value, which certifies, behind.
AIM = 3.0**0.5
# Numbers in a tile: on a CPU what its caches hold, elsewhere what fills the device.
CPU_TILE, DEVICE_TILE = 1 << 18, 1 << 26
# At least so many rows, since each tile reads the whole matrix in every step.
LEAST_ROWS = 128


# Values [rows] of the rows here → those of all rows of the weight, wherever these are solved.
AllGatherRows = Callable[[Tensor], Tensor]


class Warm(NamedTuple):
    """Where a solve stopped: what the next one, at a neighbouring alpha, starts from."""

    alpha: float
    first: Splitting  # with FIRST_STRENGTH
    splitting: Splitting  # as balanced
    shifted: Tensor  # [..., out, in]: z + u
    level: Tensor  # [..., out, groups]: z = clamp(z + u, -level, level), or nearly so


def tile_size(device: torch.device) -> int:
    """How many numbers to work on at a time."""
    return CPU_TILE if device.type == "cpu" else DEVICE_TILE


def admm(
    problem: Problem,
    weight: Tensor,
    *,
    max_steps: int,
    tol: float,
    warm: Warm | None = None,
    resumable: bool = False,
    exact: bool = True,
    all_gather_rows: AllGatherRows | None = None,
) -> tuple[Iterate, Warm | None]:
    """Minimise by splitting ŵ into x, which sees the gram, and z, which sees the penalty.

    With ρ from :mod:`splitting`, per row and step (Boyd et al., "Distributed Optimization
    and Statistical Learning via the Alternating Direction Method of Multipliers", 2011, section
    3, scaled dual u; G in units where λmax = 1):

        x ← (G + ρ)⁻¹ (Gw + ρ(z - u))      one product: x - w = (z - u - w) ρ(G + ρ)⁻¹
        h ← 1.6x - 0.6z
        z ← prox of alpha‖·‖∞ at h + u, in the metric of ρ
        u ← u + h - z

    ρ is changed at a few steps, by residual balancing (section 3.4.1): high at first, so that the
    clamped entries are found, then lower, so that x can follow where the data hardly determine it.

    x has the gradient G(x - w) = ρ(z - u - x) for free, so that a dual value costs no product;
    and x - w is a far better dual direction than z - w, because in x the gram's part of the
    optimality conditions holds exactly. Candidates for the result are the z.

    Args:
        problem: one gram ``[in, in]``, or a batch ``[problems, in, in]``.
        weight: ``[out, in]`` or ``[problems, out, in]``, any floating dtype.
        max_steps: the most steps.
        tol: relative dual gap at which a row is done, and leaves; in a batch a problem leaves
            with its last row. 0 never stops at it.
        warm: where the solve of the same rows at another alpha stopped; used up.
        resumable: whether to keep what the next alpha starts from, a matrix ``[in, in]`` more.
        exact: whether bounds are verified in float64 before a row leaves; False trusts those of
            the iteration, good to about 1e-4 in float32.
        all_gather_rows: gathers the rows of all processes, where others solve other rows of the
            weight, with the same gram, at the same time; they take the same number of steps, with
            the same ρ.

    Returns:
        The best iterate of each row, with the best verified bound, and where to go on from.

    Raises:
        CalibrationError: the gram is not positive semidefinite.
    """
    run = _Run(problem, weight, warm, resumable, exact, all_gather_rows)
    taken = 0
    if warm is not None:
        taken = min(SETTLE, max_steps - 1)
        run.step(taken)
        run.resume(warm)
    while taken < max_steps and run.open_rows():
        ahead = FIRST_LOOK if taken == 0 else LOOK_EVERY - taken % LOOK_EVERY
        steps = min(ahead, max_steps - taken)
        run.step_and_look(steps)
        taken += steps
        if tol > 0:  # here, at every fifth step, the host waits for the device
            run.close(run.seems_within(tol).nonzero().squeeze(-1), tol, taken)
        due = taken in BALANCE_AT and (warm is None or taken > FIRST_LOOK)
        if due and run.worth_balancing(max_steps - taken):
            run.balance()
    return run.finish(taken)


class _Run:
    """The state of one solve. Its items are rows, or whole problems where there is a batch."""

    def __init__(
        self,
        problem: Problem,
        weight: Tensor,
        warm: Warm | None,
        resumable: bool,
        exact: bool,
        all_gather_rows: AllGatherRows | None = None,
    ) -> None:
        device = weight.device
        self.exact, self.all_gather_rows = exact, all_gather_rows
        self.problem, self.weight = problem, weight
        self.batched = weight.dim() == 3
        self.unit = unit_prices(problem)
        # The original row is the first candidate, 0 the first bound.
        self.result = weight.to(problem.gram.dtype, copy=True)
        self.direction = torch.zeros_like(self.result)
        self.best = penalty(problem, self.result)
        self.bound = torch.zeros_like(self.best)
        self.verified = torch.zeros(self.best.shape, dtype=torch.float64, device=device)
        self.steps = torch.zeros(self.best.shape, dtype=torch.int32, device=device)
        self.converged = torch.zeros(self.best.shape, dtype=torch.bool, device=device)
        self.imbalance = torch.full_like(self.best, torch.nan)
        self.open = torch.arange(len(weight), device=device)
        # Of u, wherever alpha or ρ has just changed: αρ⁻¹ is u's unit.
        self.rescale: Tensor | None = None
        if warm is None:
            strength = torch.full_like(problem.peak, FIRST_STRENGTH)
            self.splitting = split(problem, self.unit, strength)
            self.shifted = self.result.clone()
            grouped = self.shifted.view(*self.best.shape, -1, problem.group_size)
            self.level = grouped.abs().amax(-1)
        else:
            self.splitting = warm.first
            self.shifted, self.level = warm.shifted, warm.level
            ratio = warm.splitting.strength / warm.first.strength
            self.rescale = ratio * (problem.alpha / warm.alpha)
        self.first = self.splitting if resumable else None

    def resume(self, warm: Warm) -> None:
        """Go over to the ρ that was balanced at the alpha before."""
        if warm.splitting is not self.splitting:
            self.rescale = self.splitting.strength / warm.splitting.strength
            self.splitting = warm.splitting

    def step(self, times: int) -> None:
        """Take steps with every open item."""
        for items, tile in self._tiles():
            tile.step(times)
            self._keep(items, tile)

    def step_and_look(self, steps: int) -> None:
        """Take steps with every open item, and remember what was best."""
        for items, tile in self._tiles():
            seen = tile.step_and_look(steps)
            self._keep(items, tile)
            better = seen.objective < self.best[items]
            self.best[items] = torch.where(better, seen.objective, self.best[items])
            self._replace(self.result, items, better, seen.candidate)
            better = seen.bound > self.bound[items]
            self.bound[items] = torch.where(better, seen.bound, self.bound[items])
            self._replace(self.direction, items, better, seen.direction)
            self.imbalance[items] = seen.imbalance

    def seems_within(self, tol: float) -> Tensor:
        """Which open items are within tol, by the accuracy of the iteration."""
        best = self.best[self.open]
        within = best - self.bound[self.open] <= tol * best
        return within.all(-1) if self.batched else within

    def close(self, chosen: Tensor, tol: float, steps: int) -> None:
        """Verify in float64 those of the open items, and let go of what is within ``tol``."""
        if not len(chosen):
            return
        items = self.open[chosen]
        verified = self._verified(items)
        self.verified[items] = torch.maximum(self.verified[items], verified)
        self.bound[items] = verified.to(self.bound.dtype)  # what it is really worth
        best = self.best[items].to(torch.float64)
        within = best - self.verified[items] <= tol * best
        within = within.all(-1) if self.batched else within
        gone = torch.zeros(len(self.open), dtype=torch.bool, device=self.open.device)
        gone[chosen] = within
        finished = items[within]
        self.steps[finished] = steps
        self.converged[finished] = True
        self.open = self.open[~gone]

    def open_rows(self) -> int:
        """How many items are open, in all processes."""
        if self.all_gather_rows is None:
            return len(self.open)
        return int(self.all_gather_rows(self.open.new_tensor([len(self.open)])).sum())

    def worth_balancing(self, steps: int) -> bool:
        """Whether the steps that are left cost more than the factorisation of a new ρ."""
        items = self.open_rows()
        rows = self.weight.shape[-2] if self.batched else items
        return items > 0 and rows * steps >= self.weight.shape[-1]

    def balance(self) -> None:
        """Change ρ so that primal and dual residuals of the open rows shrink alike."""
        # The ratio of the residuals falls about as ρ^-½ (measured), hence the square.
        imbalance = self.imbalance[self.open]
        if self.all_gather_rows is not None:
            imbalance = self.all_gather_rows(imbalance)
        typical = imbalance.nanquantile(0.5, -1 if self.batched else 0, interpolation="lower")
        factor = (typical / AIM).square_().clamp_(LEAST_FACTOR, MOST_FACTOR).nan_to_num_(1.0)
        factor = torch.where((factor < 1 / WORTH_IT) | (factor > WORTH_IT), factor, 1.0)
        if not bool((factor != 1).any()):
            return
        old = self.splitting.strength
        strength = old.clone()
        if self.batched:
            strength[self.open] *= factor
        else:
            strength *= factor
        del self.splitting  # one at a time, but along a path, which keeps the first one
        self.splitting = split(self.problem, self.unit, strength)
        self.rescale = old / self.splitting.strength
        if self.first is not None:  # the rows that have left will be resumed with the new ρ too
            everything = torch.arange(len(self.weight), device=self.weight.device)
            for items in self._chunks(everything):
                self.shifted[items] = self._rescaled(items)
            self.rescale = None

    def finish(self, steps: int) -> tuple[Iterate, Warm | None]:
        """The best of every row, and the state for the next alpha."""
        if len(self.open):
            items = self.open
            self.steps[items] = steps
            self.verified[items] = torch.maximum(self.verified[items], self._verified(items))
        warm = None
        if self.first is not None:
            alpha = self.problem.alpha
            warm = Warm(alpha, self.first, self.splitting, self.shifted, self.level)
        return Iterate(self.result, self.steps, self.converged, self.verified), warm

    def _tiles(self) -> Iterator[tuple[Tensor, Tile]]:
        """The open items, a few at a time."""
        for items in self._chunks(self.open):
            splitting = self.splitting
            if self.batched:
                splitting = Splitting(*(part[items] for part in splitting))
            weight = self.weight[items].to(self.result.dtype)
            shifted = self._rescaled(items)
            yield items, Tile(self._problem(items), splitting, weight, shifted, self.level[items])
        self.rescale = None

    def _chunks(self, items: Tensor) -> Sequence[Tensor]:
        if not len(items):
            return ()
        size = tile_size(self.weight.device) // self.weight[0].numel()
        return torch.split(items, max(1 if self.batched else LEAST_ROWS, size))

    def _rescaled(self, items: Tensor) -> Tensor:
        """A copy of z + u of these items, with u in units of the present alpha and ρ."""
        shifted = self.shifted[items]
        if self.rescale is None:
            return shifted
        factor = self.rescale[items, None, None] if self.batched else self.rescale
        return torch.lerp(clamp_groups(shifted, self.level[items]), shifted, factor)

    def _keep(self, items: Tensor, tile: Tile) -> None:
        self.shifted[items], self.level[items] = tile.shifted, tile.level

    @staticmethod
    def _replace(rows: Tensor, items: Tensor, chosen: Tensor, new: Tensor) -> None:
        """Put the chosen rows of ``new`` in their place among all rows."""
        rows[items] = torch.where(chosen.unsqueeze(-1), new, rows[items])

    def _verified(self, items: Tensor) -> Tensor:
        """The bounds of these items by their directions, in float64."""
        if not self.exact:
            return self.bound[items].to(torch.float64)
        parts = [
            lower_bound(self._problem(part), self.weight[part], self.direction[part])
            for part in torch.split(items, BLOCK)
        ]
        return torch.cat(parts)

    def _problem(self, items: Tensor) -> Problem:
        """The problem of these items: the same for all rows, but not for all problems."""
        gram, peak, alpha, group_size = self.problem
        if self.batched:
            gram, peak = gram[items], peak[items]
        return Problem(gram, peak, alpha, group_size)
