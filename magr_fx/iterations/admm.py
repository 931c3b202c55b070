"""ADMM, the alternating direction method of multipliers, with one matrix product a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.iterations.admm_tile import Tile
from magr_fx.iterations.certificate import BLOCK, Problem, lower_bound, penalty
from magr_fx.iterations.relaxed_step import clamp_groups
from magr_fx.iterations.solution import Iterate
from magr_fx.iterations.splitting import Splitting, split, unit_rho

# Steps before the first check of the dual gap, and between checks. A check costs a product and some
# passes over the rows.
FIRST_CHECK = 10
CHECK_EVERY = 5
# The first strength of ρ: high, so that the first steps find the entries that are clamped.
FIRST_STRENGTH = 0.3
# The steps after which ρ is balanced, the limits of the factor by which it changes at once, and the
# smallest factor that is worth another factorisation.
BALANCE_AT = (10, 20, 50, 75)
LEAST_FACTOR, MOST_FACTOR = 1 / 6, 3.0
LEAST_CHANGE = 2.0
# A solve that starts from a neighbouring alpha finds the clamped entries sooner: it takes this many
# steps with the first strength, and then continues with the ρ that was balanced for that alpha.
FIRST_RHO_STEPS = 3
# The ratio of the relative primal residual to the dual one that balancing aims at. Measured on real
# layers: with a ratio of 1 the dual value, and so the certificate, converges too slowly.
BALANCE = 3.0**0.5
# Numbers in a tile: as many as a CPU's caches hold, or as many as fill a device.
CPU_TILE, DEVICE_TILE = 1 << 18, 1 << 26
# The fewest rows of a tile, since each tile reads the whole matrix in every step.
LEAST_ROWS = 128


# From values [rows] of this process's rows to those of all rows, in all processes.
AllGatherRows = Callable[[Tensor], Tensor]


class Warm(NamedTuple):
    """The state in which a solve stopped, from which a solve at a neighbouring alpha starts."""

    alpha: float
    first: Splitting  # with FIRST_STRENGTH
    splitting: Splitting  # as balanced
    shifted: Tensor  # [..., out, in]: z + u
    level: Tensor  # [..., out, groups]: z = clamp(z + u, -level, level), approximately


def tile_size(device: torch.device) -> int:
    """How many numbers of the weight to work on at a time."""
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
    """Minimise MagR's objective with ŵ split into x, in the quadratic term, and z, in the penalty.

    With ρ from :mod:`splitting`, per row and step (Boyd et al., "Distributed Optimization
    and Statistical Learning via the Alternating Direction Method of Multipliers", 2011, section
    3, scaled dual u; G in units where λmax = 1):

        x ← (G + ρ)⁻¹ (Gw + ρ(z - u))      one product: x - w = (z - u - w) ρ(G + ρ)⁻¹
        h ← 1.6x - 0.6z
        z ← prox of alpha‖·‖∞ at h + u, in the metric of ρ
        u ← u + h - z

    ρ is changed at a few steps, by residual balancing (section 3.4.1). It is high at first, so that
    the clamped entries are found, then lower, so that x can change in directions with small
    eigenvalues.

    The gradient G(x - w) = ρ(z - u - x) is known without another product, so a dual value costs
    none. x - w is also a far better dual direction than z - w, because x satisfies the quadratic
    term's part of the optimality conditions exactly. The candidates for the result are the z.

    Args:
        problem: one gram ``[in, in]``, or a batch ``[problems, in, in]``.
        weight: ``[out, in]`` or ``[problems, out, in]``, any floating dtype.
        max_steps: the maximum number of steps.
        tol: relative dual gap at which a row is finished and is iterated no more; in a batch, a
            problem is finished with its last row. 0 never checks.
        warm: the state in which the solve of the same rows at another alpha stopped; its tensors
            are overwritten.
        resumable: whether to return the state for the next alpha, which keeps one more matrix
            ``[in, in]``.
        exact: whether bounds are verified in float64 before a row is finished; False relies on
            those of the iteration, accurate to about 1e-4 in float32.
        all_gather_rows: gathers values of the rows of all processes, if other processes solve other
            rows of the weight, with the same gram, at the same time; all take the same number of
            steps, with the same ρ.

    Returns:
        The best iterate of each row with its best verified bound, and the state for the next alpha
        or None.

    Raises:
        CalibrationError: the gram is not positive semidefinite.
    """
    run = Run(problem, weight, warm, resumable, exact, all_gather_rows)
    taken = 0
    if warm is not None:
        taken = min(FIRST_RHO_STEPS, max_steps - 1)
        run.step(taken)
        run.resume(warm)
    while taken < max_steps and run.open_rows():
        ahead = FIRST_CHECK if taken == 0 else CHECK_EVERY - taken % CHECK_EVERY
        steps = min(ahead, max_steps - taken)
        run.step_and_evaluate(steps)
        taken += steps
        if tol > 0:  # the host waits for the device only here, at every fifth step
            run.close(run.within_tol(tol).nonzero().squeeze(-1), tol, taken)
        due = taken in BALANCE_AT and (warm is None or taken > FIRST_CHECK)
        if due and run.balancing_pays(max_steps - taken):
            run.balance()
    return run.finish(taken)


class Run:
    """The state of one solve. Its items are rows, or whole problems in a batch."""

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
        self.unit = unit_rho(problem)
        # The original row is the first candidate, and 0 the first bound.
        self.result = weight.to(problem.gram.dtype, copy=True)
        self.direction = torch.zeros_like(self.result)
        self.best = penalty(problem, self.result)
        self.bound = torch.zeros_like(self.best)
        self.verified = torch.zeros(self.best.shape, dtype=torch.float64, device=device)
        self.steps = torch.zeros(self.best.shape, dtype=torch.int32, device=device)
        self.converged = torch.zeros(self.best.shape, dtype=torch.bool, device=device)
        self.imbalance = torch.full_like(self.best, torch.nan)
        self.open = torch.arange(len(weight), device=device)
        # The factor for u after alpha or ρ has changed, because u is in units of αρ⁻¹.
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
        """Continue with the ρ that was balanced at the previous alpha."""
        if warm.splitting is not self.splitting:
            self.rescale = self.splitting.strength / warm.splitting.strength
            self.splitting = warm.splitting

    def step(self, times: int) -> None:
        """Take steps with every open item."""
        for items, tile in self._tiles():
            tile.step(times)
            self._keep(items, tile)

    def step_and_evaluate(self, steps: int) -> None:
        """Take steps with every open item, and keep the best candidate and bound of each row."""
        for items, tile in self._tiles():
            seen = tile.step_and_evaluate(steps)
            self._keep(items, tile)
            better = seen.objective < self.best[items]
            self.best[items] = torch.where(better, seen.objective, self.best[items])
            self._replace(self.result, items, better, seen.candidate)
            better = seen.bound > self.bound[items]
            self.bound[items] = torch.where(better, seen.bound, self.bound[items])
            self._replace(self.direction, items, better, seen.direction)
            self.imbalance[items] = seen.imbalance

    def within_tol(self, tol: float) -> Tensor:
        """Which open items are within tol, by the bounds of the iteration, not verified."""
        best = self.best[self.open]
        within = best - self.bound[self.open] <= tol * best
        return within.all(-1) if self.batched else within

    def close(self, chosen: Tensor, tol: float, steps: int) -> None:
        """Verify the bounds of the chosen open items; items within ``tol`` are finished."""
        if not len(chosen):
            return
        items = self.open[chosen]
        verified = self._verified(items)
        self.verified[items] = torch.maximum(self.verified[items], verified)
        self.bound[items] = verified.to(self.bound.dtype)  # corrects the float32 bound
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
        """The number of open items in all processes."""
        if self.all_gather_rows is None:
            return len(self.open)
        return int(self.all_gather_rows(self.open.new_tensor([len(self.open)])).sum())

    def balancing_pays(self, steps: int) -> bool:
        """Whether the remaining steps cost more than a factorisation with a new ρ."""
        items = self.open_rows()
        rows = self.weight.shape[-2] if self.batched else items
        return items > 0 and rows * steps >= self.weight.shape[-1]

    def balance(self) -> None:
        """Change ρ so that primal and dual residuals of the open rows shrink at the same rate."""
        # The ratio of the residuals changes about as ρ^-½ (measured), hence the square.
        imbalance = self.imbalance[self.open]
        if self.all_gather_rows is not None:
            imbalance = self.all_gather_rows(imbalance)
        typical = imbalance.nanquantile(0.5, -1 if self.batched else 0, interpolation="lower")
        factor = (typical / BALANCE).square_().clamp_(LEAST_FACTOR, MOST_FACTOR).nan_to_num_(1.0)
        factor = torch.where((factor < 1 / LEAST_CHANGE) | (factor > LEAST_CHANGE), factor, 1.0)
        if not bool((factor != 1).any()):
            return
        old = self.splitting.strength
        strength = old.clone()
        if self.batched:
            strength[self.open] *= factor
        else:
            strength *= factor
        del self.splitting  # frees it before the next is made, unless self.first keeps it
        self.splitting = split(self.problem, self.unit, strength)
        self.rescale = old / self.splitting.strength
        if self.first is not None:  # the next alpha resumes finished rows with the new ρ too
            everything = torch.arange(len(self.weight), device=self.weight.device)
            for items in self._chunks(everything):
                self.shifted[items] = self._rescaled(items)
            self.rescale = None

    def finish(self, steps: int) -> tuple[Iterate, Warm | None]:
        """The best iterate of every row, and the state for the next alpha."""
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
        """The open items in tiles."""
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
        """Write the chosen rows of ``new``, which holds ``items``, into ``rows``."""
        rows[items] = torch.where(chosen.unsqueeze(-1), new, rows[items])

    def _verified(self, items: Tensor) -> Tensor:
        """The bounds of these items in their best dual directions, in float64 if ``exact``."""
        if not self.exact:
            return self.bound[items].to(torch.float64)
        parts = [
            lower_bound(self._problem(part), self.weight[part], self.direction[part])
            for part in torch.split(items, BLOCK)
        ]
        return torch.cat(parts)

    def _problem(self, items: Tensor) -> Problem:
        """The problem of these items: all rows have the same gram, problems have their own."""
        gram, peak, alpha, group_size = self.problem
        if self.batched:
            gram, peak = gram[items], peak[items]
        return Problem(gram, peak, alpha, group_size)
