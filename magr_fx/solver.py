"""solve_magr: the rows of one weight, with their largest magnitudes reduced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.certificate import Problem, certify
from magr_fx.config import PUBLISHED_ALPHA_PER_CHANNEL, PUBLISHED_STEPS, check_solver_options
from magr_fx.errors import CalibrationError, ConfigError, ModelError
from magr_fx.gram import largest_eigenvalue
from magr_fx.prox import threshold

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Steps between two looks at the dual gap; a look costs a float64 product and a host check.
CHECK_EVERY = 10
# Newton passes of a warm-started prox where a host check would stall the device's queue, and of
# the first prox, which has nothing to start from.
FIXED_PASSES = 3
FIXED_FIRST_PASSES = 12


class Status(IntEnum):
    """How the solve of one row ended; ``sentence`` says it in words, with the remedy."""

    CONVERGED = 0
    STEP_LIMIT = 1
    TRIVIAL = 2
    FAILED = 3

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The row's relative dual gap reached tol.",
    Status.STEP_LIMIT: (
        "The row took max_steps steps and its best iterate was returned, as published; "
        "to converge further, set tol and raise max_steps."
    ),
    Status.TRIVIAL: (
        "The row was returned unchanged or as zeros; if that was not expected, check that "
        "calibration data reaches it and that alpha is neither tiny nor huge."
    ),
    Status.FAILED: (
        "The row's solution was not finite and the original row was returned; "
        "lower alpha, or keep the weight in a wider dtype."
    ),
}


@dataclass(frozen=True, eq=False)
class Solution:
    """What :func:`solve_magr` found. Objectives and gaps are in the units of the given gram."""

    weight: Tensor  # [out, in], dtype and device of the given weight
    status: Tensor  # [out], int8: values of Status
    steps: Tensor  # [out], int32: steps taken
    objective_before: Tensor  # [out], float32: alpha λmax Σ‖w_group‖∞, the original row's
    objective: Tensor  # [out], float32: the returned row's, never above objective_before
    dual_gap: Tensor  # [out], float32: objective - optimum is at most this, and this is ≥ 0

    @property
    def summary(self) -> str:
        """Rows by status, e.g. ``converged: 570 rows, step limit: 6 rows``."""
        counts = Counter(self.status.tolist())
        return ", ".join(
            f"{status.name.lower().replace('_', ' ')}: {n} row{'s' if n != 1 else ''}"
            for status in Status
            if (n := counts[status])
        )


class _Iterate(NamedTuple):
    weight: Tensor  # [out, in], float32
    steps: Tensor  # [out], int32
    converged: Tensor  # [out], bool


@torch.no_grad()
def solve_magr(
    weight: Tensor,
    gram: Tensor,
    *,
    alpha: float = PUBLISHED_ALPHA_PER_CHANNEL,
    group_size: int | None = None,
    solver: str = "pgd",
    max_steps: int = PUBLISHED_STEPS,
    tol: float = 0.0,
) -> Solution:
    """Reduce the largest magnitude of each row of a weight without changing its outputs much.

    For every row w, independently, minimises over ŵ

        ½ (ŵ - w)ᵀ G (ŵ - w) + alpha λmax(G) Σ_groups ‖ŵ_group‖∞,      G = XᵀX,

    where the quadratic term is whole-row, so that the groups of a row are coupled. This is the
    problem of Section 3 of Zhang et al., "MagR: Weight Magnitude Reduction for Enhancing
    Post-Training Quantization" (NeurIPS 2024, arXiv 2406.00800), and ``solver="pgd"`` is its
    Algorithm 1 with the step 1/λmax(G), started at w.

    Args:
        weight: ``[out, in]``, any floating dtype, any device with float64; never modified.
        gram: ``[in, in]``, symmetric positive semidefinite; it is moved to the weight's device
            and to float32. Rank deficiency, dead columns and zero grams are legal.
        alpha: penalty weight, relative to λmax(G).
        group_size: inputs per group; None takes whole rows. It must divide ``in``.
        solver: ``"pgd"``.
        max_steps: the most steps, 200 in the authors' code.
        tol: dual gap / objective at which a row is done, looked at every 10 steps on the
            iterate before it is cast to the weight's dtype; 0 never looks. Rounding of the
            float32 iterate keeps the ratio of a row above roughly 3e-8·‖w‖₁/alpha.

    Returns:
        A :class:`Solution`. The iteration runs in float32 whatever the weight's dtype, float64
        included, and in TF32 where that is enabled; objectives and gaps are those of the rows as
        returned, in the weight's dtype, computed in float64. A row whose objective would rise, or
        that is not finite, is returned as it came.

    Raises:
        ConfigError: an option is out of range, or ``group_size`` does not divide ``in``.
        ModelError: ``weight`` is not a finite, non-empty 2-D floating tensor.
        CalibrationError: ``gram`` is not a finite floating ``[in, in]`` tensor, or has a negative
            diagonal entry.

    Example:
        >>> solution = solve_magr(torch.tensor([[4.0, 1.0]]), torch.ones(2, 2), alpha=0.1)
        >>> solution.weight
        tensor([[2.4500, 2.4500]])
        >>> solution.summary
        'step limit: 1 row'
    """
    check_solver_options(alpha, group_size, solver, max_steps, tol)
    _check_weight(weight)
    group_size = _check_group_size(group_size, weight.shape[1])
    _check_gram(gram, weight.shape[1])
    gram = gram.to(weight.device, torch.float32)
    peak = largest_eigenvalue(gram)
    if not bool(peak > 0):
        return _untouched(weight)  # no data reached the site: ŵ = w costs nothing
    # Waiting for the host is free on a CPU; elsewhere it would leave the device idle every step.
    passes = None if weight.device.type == "cpu" else FIXED_PASSES
    problem = Problem(gram, peak, float(alpha), group_size)
    iterate = _descend(problem, weight, max_steps=max_steps, tol=tol, passes=passes)
    return _assess(problem, weight, iterate)


def _descend(
    problem: Problem, weight: Tensor, *, max_steps: int, tol: float, passes: int | None
) -> _Iterate:
    """Algorithm 1: v ← prox(v - (v - w) G/λmax), on all rows at once.

    The authors' code takes a singular value decomposition of X itself and finds the prox by
    sorting; the gram and Newton passes give the same iterates.
    """
    original = weight.to(torch.float32).contiguous()
    # Scaled to λmax = 1: unit step, and the range of float32 no longer depends on the data's.
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
        # [out, groups, group_size] views: the prox is per group, the product above whole-row.
        grouped = forward.view(len(forward), -1, problem.group_size)
        magnitude = torch.abs(forward, out=buffer).view_as(grouped)
        level = threshold(magnitude, problem.alpha, start=level, passes=budget)
        budget = passes
        bound = level.unsqueeze(-1)
        torch.clamp(grouped, min=-bound, max=bound, out=current.view_as(grouped))

        if tol == 0 or (step % CHECK_EVERY and step < max_steps):
            continue
        rows = certify(problem, weight[open_rows], current)
        done = rows.gap <= tol * rows.objective
        if not bool(done.any()):
            continue
        # A certified row leaves the batch: its gap, unlike its objective, could rise again.
        finished = open_rows[done]
        result[finished], steps[finished], converged[finished] = current[done], step, True
        keep = ~done
        open_rows, start, current, level = (t[keep] for t in (open_rows, start, current, level))
        if not len(open_rows):
            break
        buffer, forward = torch.empty_like(current), torch.empty_like(current)
    result[open_rows] = current
    return _Iterate(result, steps, converged)


def _assess(problem: Problem, weight: Tensor, iterate: _Iterate) -> Solution:
    """Judge the iterate as it will be returned, and put back every row that is no improvement."""
    result = iterate.weight.to(weight.dtype)
    finite = result.isfinite().all(-1)
    result = torch.where(finite.unsqueeze(-1), result, weight)
    found = certify(problem, weight, result)
    worse = found.objective > found.before
    result = torch.where(worse.unsqueeze(-1), weight, result)
    trivial = (result == weight).all(-1) | (result == 0).all(-1)

    status = torch.full_like(iterate.steps, Status.STEP_LIMIT, dtype=torch.int8)
    status.masked_fill_(iterate.converged, Status.CONVERGED)
    status.masked_fill_(trivial, Status.TRIVIAL)
    status.masked_fill_(~finite, Status.FAILED)
    # An original row has d = 0: only the bound 0 is left, and the gap is the whole objective.
    objective = torch.where(worse, found.before, found.objective)
    gap = torch.where(worse, found.before, found.gap)
    return Solution(
        result,
        status,
        iterate.steps,
        *((values * problem.peak).to(torch.float32) for values in (found.before, objective, gap)),
    )


def _untouched(weight: Tensor) -> Solution:
    """A gram of zeros: the objective is 0 whatever ŵ is, so w stays."""
    rows = len(weight)
    zeros = torch.zeros(rows, dtype=torch.float32, device=weight.device)
    status = torch.full((rows,), Status.TRIVIAL, dtype=torch.int8, device=weight.device)
    return Solution(weight.clone(), status, zeros.to(torch.int32), zeros, zeros, zeros)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES or weight.dim() != 2:
        raise ModelError(
            "weight must be a 2-D floating tensor [out, in] of 16 to 64 bits, "
            f"got {_kind(weight)}; reshape it, or dequantize it first"
        )
    if weight.numel() == 0:
        raise ModelError(f"weight must have a row and a column, got {_kind(weight)}; skip it")
    if weight.is_meta:
        raise ModelError("weight is on the meta device and has no values; load the model first")
    if not bool(weight.isfinite().all()):
        raise ModelError("weight has NaN or infinite values; check the checkpoint it came from")


def _check_group_size(group_size: int | None, columns: int) -> int:
    if group_size is None:
        return columns
    if columns % group_size:
        raise ConfigError(
            f"group_size {group_size} does not divide in = {columns}; "
            "choose a divisor, or None for whole rows"
        )
    return group_size


def _check_gram(gram: Tensor, columns: int) -> None:
    shape = [columns, columns]
    if not isinstance(gram, Tensor) or gram.dtype not in DTYPES or list(gram.shape) != shape:
        raise CalibrationError(
            f"gram must be a floating tensor [in, in] = {shape} for a weight with in = {columns}, "
            f"got {_kind(gram)}; pass XᵀX of the inputs of this weight"
        )
    # Against the sum of a row's magnitudes, because λmax, at most that, must fit as well.
    if not bool(gram.to(torch.float32).abs().sum(-1).isfinite().all()):
        raise CalibrationError(
            "gram has NaN, infinite or (for float32) too large values; "
            "check or scale down the calibration inputs"
        )
    if bool((gram.diagonal() < 0).any()):
        raise CalibrationError(
            "gram has a negative diagonal entry, so it is not XᵀX; pass the gram itself"
        )


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
