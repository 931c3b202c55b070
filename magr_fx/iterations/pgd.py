"""Projected (proximal) gradient descent: Algorithm 1 of the paper, as in the authors' code."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.iterations.certificate import Problem, certify
from magr_fx.iterations.prox import threshold
from magr_fx.iterations.solution import Iterate

# Steps between two checks of the dual gap. A check costs a float64 product and makes the
# host wait for the device.
CHECK_EVERY = 10
# The number of Newton passes of a prox on devices where a check for convergence would make the host
# wait: of a warm-started prox, and of the first one, which has no guess to start from.
FIXED_PASSES = 3
FIXED_FIRST_PASSES = 12


def pgd(
    problem: Problem, weight: Tensor, *, max_steps: int, tol: float, passes: int | None = None
) -> Iterate:
    """Iterate v ← prox(v - (v - w) G/λmax) from v = w, for all rows at once.

    The authors' code takes a singular value decomposition of X and computes the prox by sorting.
    The gram and Newton passes give the same iterates.

    Args:
        problem: with one gram, ``[in, in]``.
        weight: w, ``[out, in]``, any floating dtype.
        max_steps: the maximum number of steps.
        tol: relative dual gap at which a row is finished; 0 never checks.
        passes: as for :func:`magr_fx.iterations.prox.threshold`; None on a CPU, a number elsewhere.
    """
    original = weight.to(problem.gram.dtype).contiguous()
    # Scaled to λmax = 1, so that the step is 1 and the data's scale cannot overflow float32.
    scaled = problem.gram / problem.peak
    result = original.clone()
    steps = torch.full((len(weight),), max_steps, dtype=torch.int32, device=weight.device)
    converged = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    open_rows = torch.arange(len(weight), device=weight.device)  # not certified yet

    start, current, buffer = original, original.clone(), torch.empty_like(original)
    forward = torch.empty_like(original)
    level: Tensor | None = None
    budget = None if passes is None else FIXED_FIRST_PASSES
    for step in range(1, max_steps + 1):
        torch.sub(current, start, out=buffer)
        torch.addmm(current, buffer, scaled, alpha=-1, out=forward)
        # A view [out, groups, group_size]: the prox is per group, the product above per row.
        grouped = forward.view(len(forward), -1, problem.group_size)
        magnitude = torch.abs(forward, out=buffer).view_as(grouped)
        level = threshold(magnitude, problem.alpha, start=level, passes=budget)
        budget = passes
        bound = level.unsqueeze(-1)
        torch.clamp(grouped, min=-bound, max=bound, out=current.view_as(grouped))

        if tol == 0 or (step % CHECK_EVERY and step < max_steps):
            continue
        rows = certify(problem, weight[open_rows], current)
        done = rows.objective - rows.bound <= tol * rows.objective
        if not bool(done.any()):
            continue
        # A certified row is iterated no more: its gap, unlike its objective, could rise again.
        finished = open_rows[done]
        result[finished], steps[finished], converged[finished] = current[done], step, True
        keep = ~done
        open_rows, start, current, level = (t[keep] for t in (open_rows, start, current, level))
        if not len(open_rows):
            break
        buffer, forward = torch.empty_like(current), torch.empty_like(current)
    result[open_rows] = current
    unknown = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    return Iterate(result, steps, converged, unknown)
