"""solve_magr: reduce the largest magnitudes of the rows of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.config import (
    PUBLISHED_ALPHA_PER_CHANNEL,
    SolverOptions,
    check_alpha,
    check_group_size,
)
from magr_fx.errors import ConfigError
from magr_fx.grams.gram import largest_eigenvalue
from magr_fx.iterations.admm import AllGatherRows, Warm, admm, tile_size
from magr_fx.iterations.certificate import Problem, certify
from magr_fx.iterations.pgd import FIXED_PASSES, pgd
from magr_fx.iterations.solution import Iterate, Solution, Status
from magr_fx.solver.solver_input import check_divides, check_gram, check_row_scale, check_weight


@torch.no_grad()
def solve_magr(
    weight: Tensor,
    gram: Tensor,
    *,
    alpha: float = PUBLISHED_ALPHA_PER_CHANNEL,
    group_size: int | None = None,
    solver: str = "admm",
    max_steps: int | None = None,
    tol: float | None = None,
    precision: str = "float32",
    row_scale: Tensor | None = None,
    all_gather_rows: AllGatherRows | None = None,
) -> Solution:
    """Reduce the largest magnitude of each row of a weight without changing its outputs much.

    For every row w, independently, minimises over ŵ

        ½ (ŵ - w)ᵀ G (ŵ - w) + alpha λmax(G) Σ_groups ‖ŵ_group‖∞,      G = XᵀX,

    where the quadratic term is that of the whole row and couples its groups. This is the problem
    of section 3 of Zhang et al., "MagR: Weight Magnitude Reduction for Enhancing Post-Training
    Quantization" (NeurIPS 2024, arXiv 2406.00800).

    Args:
        weight: ``[out, in]``, any floating dtype of 16 to 64 bits, any device with float64; never
            modified. A batch of problems, such as the experts of a layer, is
            ``[problems, out, in]``.
        gram: ``[in, in]``, or ``[problems, in, in]``, floating, symmetric positive semidefinite; it
            is moved to the weight's device. It may be rank-deficient, have columns of zeros, or be
            zero.
        alpha: penalty weight, relative to λmax(G).
        group_size: inputs per group; None takes whole rows. It must divide ``in``.
        solver: ``"admm"``, which runs to the optimum, or ``"pgd"``, the authors' iteration, which
            is meant to stop before the optimum.
        max_steps: the maximum number of steps; None is 100 for admm, and 200 for pgd, as in the
            authors' code.
        tol: relative dual gap, (objective - lower bound) / objective, at which a row is finished.
            It is that of the iterate before it is cast to the weight's dtype, and its bound is
            verified in float64. None is 1e-3 for admm, and 0, which never checks, for pgd. admm
            checks after 10 steps and then every 5 (along a path also after 5), pgd every 10.
        precision: ``"float32"`` or ``"float64"``, of the iteration, whatever the weight's dtype.
            Products in float32 follow ``torch.set_float32_matmul_precision``: with TF32 a row
            takes a few more steps. Rounding keeps the relative gap of a float32 row above
            roughly 3e-8·‖w‖₁/alpha.
        row_scale: r, ``[out]`` or ``[problems, out]``, positive: the penalty of a row is then
            alpha λmax(G) r Σ‖ŵ_group‖∞. magr_transform takes the root mean square of each row, so
            that the rows c·w have the solution c·ŵ. None is 1, as in the paper.
        all_gather_rows: as for :func:`solve_magr_path`.

    Returns:
        A :class:`Solution`. Objectives and gaps are those of the returned rows, in the weight's
        dtype, computed in float64. A row whose objective would rise, or that is not finite, is
        returned unchanged.

    Raises:
        ConfigError: an option is out of range, or ``group_size`` does not divide ``in``.
        ModelError: ``weight`` is not a finite, non-empty 2-D or 3-D floating tensor.
        CalibrationError: ``gram`` is not a finite floating tensor of the right shape, or was found
            not to be positive semidefinite, which is not checked in full.

    Example:
        >>> solution = solve_magr(torch.tensor([[4.0, 1.0]]), torch.ones(2, 2), alpha=0.1)
        >>> solution.weight
        tensor([[2.4500, 2.4500]])
        >>> solution.summary
        'converged: 1 row'
    """
    return solve_magr_path(
        weight,
        gram,
        [alpha],
        group_size=group_size,
        solver=solver,
        max_steps=max_steps,
        tol=tol,
        precision=precision,
        row_scale=row_scale,
        all_gather_rows=all_gather_rows,
    )[0]


@torch.no_grad()
def solve_magr_path(
    weight: Tensor,
    gram: Tensor,
    alphas: Sequence[float],
    *,
    group_size: int | None = None,
    solver: str = "admm",
    max_steps: int | None = None,
    tol: float | None = None,
    precision: str = "float32",
    row_scale: Tensor | None = None,
    exact: bool = True,
    all_gather_rows: AllGatherRows | None = None,
) -> list[Solution]:
    """:func:`solve_magr` for each of several alphas; each solve starts where the last one stopped.

    λmax and the first factorisation are shared. With ``solver="admm"`` the alphas are solved from
    the largest down, each from the solution of the one before. The closer two alphas are, the
    fewer steps the second takes (benchmarks/solver.md).

    Args:
        weight, gram, group_size, solver, max_steps, tol, precision, row_scale: as for
            :func:`solve_magr`.
        alphas: penalty weights, relative to λmax(G), in any order.
        exact: whether objectives and gaps are computed in float64; False computes them in
            ``precision``, which takes a fifth of the time less. It suits callers that compare the
            rows by another measure.
        all_gather_rows: needed if several processes solve the rows of one weight at the same time,
            each with the same gram. It takes values ``[rows]`` of this process's rows and returns
            those of all rows. The result is then that of all rows in one process.

    Returns:
        One :class:`Solution` for each alpha, in the order of ``alphas``.

    Raises:
        ConfigError, ModelError, CalibrationError: as for :func:`solve_magr`; ConfigError also if
            ``alphas`` is empty or no sequence.

    Example:
        >>> path = solve_magr_path(torch.tensor([[4.0, 1.0]]), torch.ones(2, 2), [0.1, 0.5])
        >>> [f"{solution.weight.max().item():.2f}" for solution in path]
        ['2.45', '2.25']
    """
    if not isinstance(alphas, Sequence) or isinstance(alphas, str) or not alphas:
        raise ConfigError(f"alphas must be a non-empty list of numbers, got {alphas!r}")
    for alpha in alphas:
        check_alpha(alpha)
    check_group_size(group_size)
    options = SolverOptions(solver, max_steps, tol, precision)
    check_weight(weight)
    group_size = check_divides(group_size, weight.shape[-1])
    check_gram(gram, weight)
    if row_scale is not None:
        check_row_scale(row_scale, weight)
        row_scale = row_scale.to(weight.device, options.dtype)
    weight = weight.contiguous()
    gram = gram.to(weight.device, options.dtype)
    # Autocast of the caller is meant for the model. Kernels are launched on the weight's device.
    with torch.autocast(weight.device.type, enabled=False), torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        how = _How(options, exact, all_gather_rows)
        return _solve_each(weight, gram, row_scale, alphas, group_size, how)


class _How(NamedTuple):
    """The options of the iteration and of the evaluation of its result."""

    options: SolverOptions
    exact: bool
    all_gather_rows: AllGatherRows | None


def _solve_each(
    weight: Tensor,
    gram: Tensor,
    row_scale: Tensor | None,
    alphas: Sequence[float],
    group_size: int,
    how: _How,
) -> list[Solution]:
    """Solve a weight, or each problem of a batch with a non-zero gram, a tile at a time."""
    peak = largest_eigenvalue(gram)
    if weight.dim() == 2:
        return _solve(weight, gram, peak, row_scale, alphas, group_size, how)
    found = [_untouched(weight) for _ in alphas]
    together = problems_at_once(weight.shape[-2:], weight.device)
    if not bool((peak > 0).any()):
        return found
    for problems in torch.split((peak > 0).nonzero().squeeze(-1), together):
        scale = None if row_scale is None else row_scale[problems]
        own = weight[problems], gram[problems], peak[problems], scale
        part = _solve(*own, alphas, group_size, how._replace(all_gather_rows=None))
        for whole, solution in zip(found, part, strict=True):
            for field in fields(Solution):
                getattr(whole, field.name)[problems] = getattr(solution, field.name)
    return found


def problems_at_once(shape: Sequence[int], device: torch.device) -> int:
    """The number of problems of this shape, [out, in], that fill a tile and are solved together."""
    rows, columns = shape
    return max(1, tile_size(device) // (max(rows, columns) * columns))


def _solve(
    weight: Tensor,
    gram: Tensor,
    peak: Tensor,
    row_scale: Tensor | None,
    alphas: Sequence[float],
    group_size: int,
    how: _How,
) -> list[Solution]:
    """Solve a weight, or a batch that fits one tile, for every alpha, in their order."""
    if weight.dim() == 2 and not bool(peak > 0):
        return [_untouched(weight) for _ in alphas]
    if len(weight) == 1 and weight.dim() == 3:  # then its rows finish one by one
        scale = None if row_scale is None else row_scale[0]
        path = _solve(weight[0], gram[0], peak[0], scale, alphas, group_size, how)
        return [Solution(*(getattr(s, f.name)[None] for f in fields(Solution))) for s in path]
    options, found = how.options, dict[int, Solution]()
    warm: Warm | None = None
    # A row of scale r is solved as w/r with the plain penalty; that solution is ŵ/r.
    rows = weight if row_scale is None else weight.to(options.dtype) / row_scale.unsqueeze(-1)
    # From the largest alpha down: entries clamped at one alpha are mostly clamped at the next.
    order = sorted(range(len(alphas)), key=lambda i: -alphas[i])
    for i in order:
        problem = Problem(gram, peak, float(alphas[i]), group_size)
        if options.solver == "admm":
            iterate, warm = admm(
                problem,
                rows,
                max_steps=options.max_steps,
                tol=options.tol,
                warm=warm,
                resumable=i != order[-1],
                exact=how.exact,
                all_gather_rows=how.all_gather_rows,
            )
        else:
            iterate = _pgd(problem, rows, options)
        dtype = torch.float64 if how.exact else options.dtype
        found[i] = _assess(problem, weight, iterate, dtype, row_scale)
    return [found[i] for i in range(len(alphas))]


def _pgd(problem: Problem, weight: Tensor, options: SolverOptions) -> Iterate:
    # Checks for convergence are free on a CPU; elsewhere the device would idle in every step.
    passes = None if weight.device.type == "cpu" else FIXED_PASSES
    if weight.dim() == 2:
        return pgd(problem, weight, max_steps=options.max_steps, tol=options.tol, passes=passes)
    parts = [
        _pgd(problem._replace(gram=gram, peak=peak), rows, options)
        for gram, peak, rows in zip(problem.gram, problem.peak, weight, strict=True)
    ]
    return Iterate(*(torch.stack(column) for column in zip(*parts, strict=True)))


def _assess(
    problem: Problem,
    weight: Tensor,
    iterate: Iterate,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
) -> Solution:
    """Evaluate the iterate in the weight's dtype; rows without an improvement are reverted.

    With a ``row_scale`` r the iterate is ŵ/r.
    """
    chosen = iterate.weight
    if row_scale is not None:
        chosen = chosen * row_scale.unsqueeze(-1)
    result = chosen.to(weight.dtype)
    del chosen
    finite = result.isfinite().all(-1)
    result = torch.where(finite.unsqueeze(-1), result, weight)
    found = certify(problem, weight, result, dtype, row_scale)
    known = iterate.bound
    if row_scale is not None:
        # The bound is that of the rounded w/r. Rounding changes it by at most this much.
        known = known - torch.finfo(row_scale.dtype).eps * found.before
    worse = found.objective > found.before
    result = torch.where(worse.unsqueeze(-1), weight, result)
    trivial = (result == weight).all(-1) | (result == 0).all(-1)

    status = torch.full_like(iterate.steps, Status.STEP_LIMIT, dtype=torch.int8)
    status.masked_fill_(iterate.converged, Status.CONVERGED)
    status.masked_fill_(trivial, Status.TRIVIAL)
    status.masked_fill_(~finite, Status.FAILED)
    objective = torch.where(worse, found.before, found.objective)
    # A reverted row has d = 0 and so only the bound 0; the bound of the iteration still holds.
    bound = torch.maximum(torch.where(worse, 0, found.bound), known)
    gap = (objective - bound).clamp(min=0)
    unit = problem.peak.unsqueeze(-1).to(torch.float64)
    if row_scale is not None:
        unit = unit * row_scale.to(torch.float64).square()
    return Solution(
        result,
        status,
        iterate.steps,
        *((values * unit).to(torch.float32) for values in (found.before, objective, gap)),
    )


def _untouched(weight: Tensor) -> Solution:
    """The solution for a gram of zeros: the objective is 0 for every ŵ, so w is kept."""
    rows = weight.shape[:-1]
    status = torch.full(rows, Status.TRIVIAL, dtype=torch.int8, device=weight.device)
    steps = torch.zeros(rows, dtype=torch.int32, device=weight.device)
    zeros = [torch.zeros(rows, dtype=torch.float32, device=weight.device) for _ in range(3)]
    return Solution(weight.clone(), status, steps, *zeros)
