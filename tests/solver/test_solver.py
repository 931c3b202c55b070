"""solve_magr and solve_magr_path, whatever the solver: what they promise, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from solver_helpers import (
    batch,
    check_promises,
    objectives,
    optima,
    penalty,
    problem,
    same_bits,
    setting,
    statuses,
)

from magr_fx.errors import CalibrationError, ConfigError, ModelError
from magr_fx.iterations.certificate import certify
from magr_fx.iterations.solution import Solution, Status
from magr_fx.solver.solver import solve_magr, solve_magr_path

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = ("admm", "pgd")
SETTINGS = [(0.3, None), (0.05, None), (1e-3, None), (0.05, 4), (0.01, 2), (1e-3, 6), (0.02, 1)]


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs once for each solver."""
    return str(request.param)


# --- objectives and the certificate


@pytest.mark.parametrize(("alpha", "group_size"), SETTINGS)
def test_objectives_are_the_formula(solver: str, alpha: float, group_size: int | None) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=alpha, group_size=group_size, solver=solver)
    grouped = weight.double().view(len(weight), -1, group_size or weight.shape[1])
    before = penalty(gram, alpha) * grouped.abs().amax(-1).sum(-1)
    assert torch.allclose(solution.objective_before.double(), before, rtol=1e-6)
    after = objectives(solution.weight, weight, gram, alpha, group_size)
    assert torch.allclose(solution.objective.double(), after, rtol=1e-6)
    assert (solution.objective < solution.objective_before).all()


@pytest.mark.parametrize("tokens", [40, 5])  # well and rank-deficient
@pytest.mark.parametrize(("alpha", "group_size"), SETTINGS)
def test_dual_gap_bounds_the_true_distance(
    solver: str, alpha: float, group_size: int | None, tokens: int
) -> None:
    weight, gram = problem(rows=4, tokens=tokens, seed=1)
    _, best = optima(weight, gram, alpha, group_size)
    for steps in (1, 3, 10, 50, 200):
        solution = solve_magr(
            weight, gram, alpha=alpha, group_size=group_size, solver=solver, max_steps=steps, tol=0
        )
        check_promises(solution, weight)
        excess = objectives(solution.weight, weight, gram, alpha, group_size) - best
        slack = 1e-6 * solution.objective_before  # float32 of what is returned, SLSQP's tolerance
        assert (solution.dual_gap + slack >= excess).all()
        assert (excess >= -slack).all()


@pytest.mark.parametrize(("alpha", "group_size"), SETTINGS)
def test_certified_rows_are_optimal(solver: str, alpha: float, group_size: int | None) -> None:
    weight, gram = problem(seed=2)
    gram += 40 * torch.eye(len(gram))
    # Float32 gradients hold an iterate 1e-6 / alpha away, more or less by how they are rounded.
    tol = 4e-6 / alpha
    solution = solve_magr(
        weight, gram, alpha=alpha, group_size=group_size, solver=solver, max_steps=5000, tol=tol
    )
    check_promises(solution, weight)
    assert set(statuses(solution)) <= {Status.CONVERGED, Status.TRIVIAL}
    rows, best = optima(weight, gram, alpha, group_size)
    assert (solution.dual_gap <= tol * solution.objective).all()
    assert torch.allclose(solution.objective.double(), best, rtol=2 * tol)
    # The quadratic term is strongly convex here, so that the minimiser is unique.
    curvature = torch.linalg.eigvalsh(gram.double())[0]
    distance = (solution.weight - rows).square().sum(-1)
    assert (0.5 * curvature * distance <= 2 * tol * best + 1e-6).all()


def test_certificate_is_exact_at_the_optimum_and_loose_away_from_it() -> None:
    weight, gram = problem(seed=3)
    for group_size in (12, 3):
        rows, best = optima(weight, gram, 0.05, group_size)
        posed = setting(gram, 0.05, group_size)
        at_best = certify(posed, weight, rows)
        assert (at_best.objective - at_best.bound <= 1e-5 * at_best.objective).all()
        assert torch.allclose(at_best.objective * posed.peak, best, rtol=1e-9)
        assert (at_best.bound * posed.peak <= best * (1 + 1e-9)).all()
        at_start = certify(posed, weight, weight)
        assert not at_start.bound.any()
        assert torch.equal(at_start.objective, at_start.before)
        # Far off, a feasible multiple of the direction helps: better than the bound 0.
        assert (certify(posed, weight, 0.5 * rows + 0.5 * weight).bound > 0).all()


def test_certificate_at_a_known_optimum() -> None:
    # One input: the optimum is known, and its gap is nothing but rounding.
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2000, 1, generator=generator, dtype=torch.float64) + 0.3
    posed = setting(torch.tensor([[3.0]]), 0.1)
    found = certify(posed, weight, weight - 0.1)
    assert ((found.objective - found.bound).abs() <= 1e-15).all()
    solution = solve_magr(weight, posed.gram, alpha=0.1, solver="pgd", precision="float64")
    assert (solution.dual_gap >= 0).all()


@pytest.mark.parametrize("problems", [None, 2])
def test_certificate_does_not_depend_on_the_block(
    problems: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(rows=7, seed=4) if problems is None else batch(problems, rows=7)
    rows = weight * 0.9
    posed = setting(gram, 0.05, 4)
    whole = certify(posed, weight, rows)
    monkeypatch.setattr("magr_fx.iterations.certificate.BLOCK", 5)
    for one, other in zip(whole, certify(posed, weight, rows), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


# --- groups


def test_groups_are_coupled_through_the_gram(solver: str) -> None:
    weight, gram = problem(seed=7)
    gram += 40 * torch.eye(12)
    options: dict[str, Any] = {"alpha": 0.05, "group_size": 4, "max_steps": 3000, "tol": 1e-6}
    together = solve_magr(weight, gram, solver=solver, **options)
    rows, _ = optima(weight, gram, 0.05, 4)
    assert torch.allclose(together.weight.double(), rows, atol=2e-2)
    apart = gram * torch.eye(3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    alone = solve_magr(weight, apart, solver=solver, **options)
    assert (together.weight - alone.weight).norm() > 0.1 * weight.norm()


def test_one_group_is_the_whole_row(solver: str) -> None:
    weight, gram = problem()
    whole = solve_magr(weight, gram, alpha=0.01, solver=solver)
    assert same_bits(whole, solve_magr(weight, gram, alpha=0.01, group_size=12, solver=solver))
    halves = solve_magr(weight, gram, alpha=0.01, group_size=6, solver=solver)
    assert not torch.equal(whole.weight, halves.weight)


# --- dtypes, layouts, repeatability


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_solved_in_float32_and_judged_as_returned(
    solver: str, dtype: torch.dtype
) -> None:
    weight, gram = problem(rows=40, seed=8)
    weight = weight.to(dtype)
    solution = solve_magr(weight, gram, alpha=0.01, solver=solver)
    check_promises(solution, weight)
    reference = solve_magr(weight.float(), gram, alpha=0.01, solver=solver)
    if dtype == torch.float64:  # which the weight is not rounded from, but the result is
        assert torch.allclose(solution.weight, reference.weight.to(dtype), rtol=0, atol=1e-5)
    else:
        assert torch.equal(solution.weight, reference.weight.to(dtype))
    exact = objectives(solution.weight, weight, gram, 0.01)
    assert torch.allclose(solution.objective.double(), exact, rtol=1e-6)
    assert set(statuses(solution)) == {Status.STEP_LIMIT if solver == "pgd" else Status.CONVERGED}


def test_converged_is_said_of_the_iterate_and_the_gap_of_what_is_returned() -> None:
    weight, gram = problem(rows=40, seed=8)
    weight = weight.to(torch.bfloat16)
    fine = solve_magr(weight.float(), gram, alpha=1e-3)
    coarse = solve_magr(weight, gram, alpha=1e-3)
    moved = (coarse.weight != weight).any(-1)
    assert moved.double().mean() > 0.5
    assert torch.equal(coarse.status[moved], fine.status[moved])
    assert torch.equal(coarse.steps, fine.steps)
    assert (fine.dual_gap <= 1e-3 * fine.objective).all()
    assert (coarse.dual_gap > 1e-3 * coarse.objective).double().mean() > 0.2


def test_a_row_that_rounding_would_make_worse_is_returned_as_it_came(solver: str) -> None:
    weight, gram = problem(rows=200, seed=9)
    weight = weight.to(torch.bfloat16)
    options: dict[str, Any] = {"alpha": 3e-4, "solver": solver, "max_steps": 30}
    solution = solve_magr(weight, gram, **options)
    check_promises(solution, weight)
    cast = solve_magr(weight.float(), gram, **options).weight.to(torch.bfloat16)
    worse = objectives(cast, weight, gram, 3e-4) > objectives(weight, weight, gram, 3e-4)
    assert 10 < int(worse.sum()) < 190
    assert torch.equal(solution.weight[worse], weight[worse])
    assert torch.equal(solution.weight[~worse], cast[~worse])
    assert set(solution.status[worse].tolist()) == {int(Status.TRIVIAL)}
    assert torch.equal(solution.objective[worse], solution.objective_before[worse])
    if solver == "pgd":  # the bound at the original row is 0, and this iteration leaves no other
        assert torch.equal(solution.dual_gap[worse], solution.objective_before[worse])


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_same_bits_twice_and_inputs_untouched(solver: str, tol: float) -> None:
    weight, gram = problem(rows=20, columns=64, tokens=300)
    kept = weight.clone(), gram.clone()
    options: dict[str, Any] = {"alpha": 0.01, "solver": solver, "tol": tol}
    first = solve_magr(weight, gram, **options)
    assert same_bits(first, solve_magr(weight, gram, **options))
    first.weight.zero_()
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])


def test_a_batch_gives_the_same_bits_twice_and_leaves_its_inputs(solver: str) -> None:
    weight, gram = batch()
    gram[1] = 0  # which solves nothing, but must not share memory either
    kept = weight.clone(), gram.clone()
    first = solve_magr(weight, gram, alpha=0.01, solver=solver)
    assert same_bits(first, solve_magr(weight, gram, alpha=0.01, solver=solver))
    first.weight.zero_()
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])


def test_layout_gradients_and_autocast_change_nothing(solver: str) -> None:
    weight, gram = problem(rows=12)
    options: dict[str, Any] = {"alpha": 0.01, "group_size": 4, "solver": solver}
    plain = solve_magr(weight, gram, **options)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    assert same_bits(plain, solve_magr(strided, gram, **options))
    parameter = torch.nn.Parameter(weight.clone())
    learned = solve_magr(parameter, gram, **options)
    assert not learned.weight.requires_grad
    assert not isinstance(learned.weight, torch.nn.Parameter)
    assert same_bits(plain, learned)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(plain, solve_magr(weight, gram, **options))
    assert same_bits(plain, solve_magr(weight, gram.double(), **options))


def test_layout_of_a_batch_changes_nothing(solver: str) -> None:
    weight, gram = batch()
    options: dict[str, Any] = {"alpha": 0.01, "group_size": 4, "solver": solver}
    plain = solve_magr(weight, gram, **options)
    strided = weight.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert same_bits(plain, solve_magr(strided, gram, **options))
    sliced = torch.cat([weight, weight], -1)[..., :12]
    assert same_bits(plain, solve_magr(sliced, gram, **options))


def test_mirrored_rows_have_mirrored_solutions(solver: str) -> None:
    weight, gram = problem()
    mirrored = solve_magr(-weight, gram, alpha=0.01, solver=solver)
    assert torch.equal(-mirrored.weight, solve_magr(weight, gram, alpha=0.01, solver=solver).weight)


def test_units_are_the_grams(solver: str) -> None:
    weight, gram = problem()
    plain = solve_magr(weight, gram, alpha=0.01, solver=solver)
    scaled = solve_magr(weight, 1024 * gram, alpha=0.01, solver=solver)  # no rounding: 2¹⁰
    assert torch.allclose(scaled.weight, plain.weight, rtol=0, atol=1e-5)
    assert torch.allclose(scaled.objective_before, 1024 * plain.objective_before, rtol=1e-5)
    assert torch.allclose(scaled.objective, 1024 * plain.objective, rtol=1e-4)
    assert torch.allclose(scaled.dual_gap, 1024 * plain.dual_gap, rtol=1e-2)


@pytest.mark.parametrize("group_size", [None, 4])
def test_float64_goes_where_float32_cannot(group_size: int | None) -> None:
    weight, gram = problem(tokens=40, seed=15)
    weight = weight.double()
    options: dict[str, Any] = {"alpha": 1e-3, "group_size": group_size, "max_steps": 2000}
    fine = solve_magr(weight, gram, tol=1e-8, precision="float64", **options)
    check_promises(fine, weight)
    assert set(statuses(fine)) == {Status.CONVERGED}
    assert (fine.dual_gap <= 1e-8 * fine.objective).all()
    _, best = optima(weight, gram, 1e-3, group_size)
    excess = objectives(fine.weight, weight, gram, 1e-3, group_size) - best
    assert (excess.abs() <= 2e-8 * best).all()
    rough = solve_magr(weight, gram, tol=1e-8, **options)
    assert set(statuses(rough)) == {Status.STEP_LIMIT}
    assert (rough.dual_gap > 1e-8 * rough.objective).all()


# --- degenerate inputs, all legal


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_zero_gram_leaves_the_weight(solver: str, tol: float) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, torch.zeros_like(gram), alpha=0.1, solver=solver, tol=tol)
    check_promises(solution, weight)
    assert torch.equal(solution.weight, weight)
    assert solution.weight.data_ptr() != weight.data_ptr()
    assert set(statuses(solution)) == {Status.TRIVIAL}
    assert not solution.steps.any()
    assert not solution.objective.any()


def test_dead_columns_only_follow_the_largest_magnitude(solver: str) -> None:
    weight, gram = problem(seed=10)
    dead = torch.tensor([1, 6])
    gram[dead], gram[:, dead] = 0, 0
    weight[:, dead] = 9.0
    options: dict[str, Any] = {"alpha": 0.1, "solver": solver, "max_steps": 3000, "tol": 1e-5}
    solution = solve_magr(weight, gram, **options)
    check_promises(solution, weight)
    assert set(statuses(solution)) == {Status.CONVERGED}
    live = torch.tensor([j for j in range(12) if j not in dead])
    peak = solution.weight[:, live].abs().amax(-1)
    # They cost nothing to shrink, so they end no larger than the largest that matters.
    assert (solution.weight[:, dead].abs() <= peak.unsqueeze(-1) + 1e-3).all()
    smaller = solve_magr(weight[:, live], gram[live][:, live], **options)
    assert torch.allclose(solution.objective, smaller.objective, rtol=1e-4)


def test_a_group_of_dead_columns_becomes_zero(solver: str) -> None:
    weight, gram = problem(seed=10)
    gram[:4], gram[:, :4] = 0, 0
    options: dict[str, Any] = {"alpha": 0.1, "group_size": 4, "solver": solver}
    solution = solve_magr(weight, gram, max_steps=3000, tol=1e-5, **options)
    check_promises(solution, weight)
    assert set(statuses(solution)) == {Status.CONVERGED}
    assert (solution.weight[:, :4].abs() <= 1e-3).all()


def test_only_one_live_column(solver: str) -> None:
    weight, gram = problem(seed=10)
    gram = torch.zeros_like(gram)
    gram[5, 5] = 2.0
    solution = solve_magr(weight, gram, alpha=0.1, solver=solver, max_steps=3000, tol=1e-5)
    check_promises(solution, weight)
    kept = (weight[:, 5].abs() - 0.1).clamp(min=0)
    want = 2.0 * (0.1 * kept + 0.5 * (weight[:, 5].abs() - kept).square())
    assert torch.allclose(solution.objective, want, rtol=2e-5)


def test_zero_rows_stay_zero(solver: str) -> None:
    weight, gram = problem()
    weight[[0, 3]] = 0
    solution = solve_magr(weight, gram, alpha=0.01, solver=solver)
    check_promises(solution, weight)
    assert not solution.weight[[0, 3]].any()
    assert statuses(solution)[0] is statuses(solution)[3] is Status.TRIVIAL
    assert statuses(solution)[1] is not Status.TRIVIAL
    assert not solution.objective_before[[0, 3]].any()
    assert not solution.dual_gap[[0, 3]].any()


def test_one_row_is_solved_as_it_is_among_others(solver: str) -> None:
    weight, gram = problem()
    alone = solve_magr(weight[2:3], gram, alpha=0.01, solver=solver)
    check_promises(alone, weight[2:3])
    among = solve_magr(weight, gram, alpha=0.01, solver=solver)
    if solver == "pgd":  # whose steps do not depend on the other rows
        assert torch.allclose(alone.weight[0], among.weight[2], rtol=0, atol=1e-5)
    assert torch.allclose(alone.objective[0], among.objective[2], rtol=2e-3)


def test_one_column_is_soft_thresholding(solver: str) -> None:
    weight = torch.tensor([[2.0], [-2.0], [0.2], [0.0]])
    solution = solve_magr(weight, torch.tensor([[7.0]]), alpha=0.25, solver=solver, tol=1e-6)
    check_promises(solution, weight)
    want = torch.tensor([[1.75], [-1.75], [0.0], [0.0]])
    assert torch.allclose(solution.weight, want, rtol=0, atol=1e-3)
    assert statuses(solution)[:2] == [Status.CONVERGED] * 2
    assert statuses(solution)[3] is Status.TRIVIAL
    # ½·7·0.25² + 0.25·7·1.75 and, at zero, ½·7·0.2²
    assert torch.allclose(solution.objective, torch.tensor([3.28125, 3.28125, 0.14, 0.0]))


def test_identity_gram_is_the_prox(solver: str) -> None:
    weight, _ = problem()
    solution = solve_magr(weight, torch.eye(12), alpha=2.0, solver=solver, tol=1e-6)
    rows = weight.double().numpy()
    want = torch.from_numpy(np.stack([oracles.prox_linf(row, 2.0) for row in rows]))
    assert set(statuses(solution)) <= {Status.CONVERGED, Status.TRIVIAL}
    # The objective is 1-strongly convex: within 1e-6 of its optimum, a few, means this close.
    assert torch.allclose(solution.weight.double(), want, rtol=0, atol=5e-3)
    best = objectives(want, weight, torch.eye(12), 2.0)
    assert torch.allclose(solution.objective.double(), best, rtol=2e-6)


@pytest.mark.parametrize("alpha", [1e3, 1e30])
def test_huge_alpha_gives_zeros(solver: str, alpha: float) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=alpha, solver=solver)
    check_promises(solution, weight)
    assert not solution.weight.any()
    assert set(statuses(solution)) == {Status.TRIVIAL}
    assert (solution.dual_gap <= 1e-3 * solution.objective).all()  # and that is the optimum


def test_tiny_alpha_leaves_the_weight(solver: str) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=1e-30, solver=solver)
    check_promises(solution, weight)
    assert torch.equal(solution.weight, weight)
    assert set(statuses(solution)) == {Status.TRIVIAL}


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs(solver: str, tokens: int) -> None:
    weight, gram = problem(columns=24, tokens=tokens, seed=11)
    solution = solve_magr(weight, gram, alpha=0.01, solver=solver, max_steps=1000)
    check_promises(solution, weight)
    before, after = (rows.abs().amax(-1) for rows in (weight, solution.weight))
    assert (after < 0.5 * before).all()
    moved = (solution.weight - weight).double()
    error = ((moved @ gram.double()) * moved).sum() / (
        (weight.double() @ gram.double()) * weight.double()
    ).sum()
    assert error < 0.01


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_scale_of_the_gram_does_not_matter(solver: str, scale: float) -> None:
    weight, gram = problem(seed=12)
    plain, scaled = (solve_magr(weight, g, alpha=0.01, solver=solver) for g in (gram, gram * scale))
    check_promises(scaled, weight)
    assert torch.allclose(scaled.weight, plain.weight, rtol=0, atol=1e-4)


def test_badly_scaled_activations(solver: str) -> None:
    weight, gram = problem(seed=13)
    sizes = torch.logspace(-4, 4, 12)
    gram = gram * sizes.unsqueeze(0) * sizes.unsqueeze(1)  # entries from 1e-6 to 1e10
    for group_size in (None, 4):
        solution = solve_magr(weight, gram, alpha=1e-3, group_size=group_size, solver=solver)
        check_promises(solution, weight)
        better = solution.objective < 0.9999 * solution.objective_before
        assert (better | (solution.dual_gap <= 1e-3 * solution.objective)).all()
        assert better.double().mean() > 0.5
        exact = objectives(solution.weight, weight, gram, 1e-3, group_size)
        assert torch.allclose(solution.objective.double(), exact, rtol=1e-6)


def test_a_row_that_overflows_its_dtype_fails_and_stays(solver: str) -> None:
    # The first input is twice the second: both groups' work is cheaper done by the first weight,
    # which then exceeds the largest float16.
    weight = torch.tensor([[6e4, 6e4], [1.0, 1.0]], dtype=torch.float16)
    gram = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    options: dict[str, Any] = {"alpha": 1e3, "group_size": 1, "solver": solver}
    solution = solve_magr(weight, gram, **options)
    check_promises(solution, weight)
    assert statuses(solution)[0] is Status.FAILED
    assert torch.equal(solution.weight[0], weight[0])
    assert solution.objective[0] == solution.objective_before[0]
    assert statuses(solution)[1] is Status.TRIVIAL  # huge beside its size: zeros
    assert solve_magr(weight.float(), gram, **options).weight[0, 0] > 65504


# --- batches of problems


@pytest.mark.parametrize(("alpha", "group_size"), [(0.05, None), (0.01, 4)])
def test_a_batch_is_solved_as_its_problems_are(
    solver: str, alpha: float, group_size: int | None
) -> None:
    weight, gram = batch()
    options: dict[str, Any] = {"alpha": alpha, "group_size": group_size, "solver": solver}
    if solver == "admm":
        options["tol"] = 1e-4
    together = solve_magr(weight, gram, **options)
    check_promises(together, weight)
    for i, rows in enumerate(weight):
        alone = solve_magr(rows, gram[i], **options)
        assert torch.allclose(together.objective_before[i], alone.objective_before, rtol=1e-6)
        assert torch.allclose(together.objective[i], alone.objective, rtol=2e-4)
        assert torch.equal(together.status[i], alone.status)
        exact = objectives(together.weight[i], rows, gram[i], alpha, group_size)
        assert torch.allclose(together.objective[i].double(), exact, rtol=1e-6)
        if solver == "pgd":  # admm's result depends on how long the others took
            assert torch.allclose(together.weight[i], alone.weight, rtol=0, atol=1e-5)
            assert torch.equal(together.steps[i], alone.steps)
    if solver == "admm":
        assert set(statuses(together)) == {Status.CONVERGED}
        assert (together.dual_gap <= 1e-4 * together.objective).all()


def test_a_problem_without_data_is_left_alone(solver: str) -> None:
    weight, gram = batch()
    gram[1] = 0
    solution = solve_magr(weight, gram, alpha=0.05, solver=solver)
    check_promises(solution, weight)
    assert torch.equal(solution.weight[1], weight[1])
    assert set(solution.status[1].tolist()) == {int(Status.TRIVIAL)}
    assert not solution.steps[1].any()
    assert not solution.objective[1].any()
    others = solve_magr(weight[[0, 2]], gram[[0, 2]], alpha=0.05, solver=solver)
    assert torch.equal(solution.weight[[0, 2]], others.weight)
    assert torch.equal(solution.status[[0, 2]], others.status)


def test_a_batch_without_any_data_is_left_alone(solver: str) -> None:
    weight, gram = batch()
    solution = solve_magr(weight, torch.zeros_like(gram), alpha=0.05, solver=solver)
    check_promises(solution, weight)
    assert torch.equal(solution.weight, weight)
    assert set(statuses(solution)) == {Status.TRIVIAL}


def test_a_batch_of_one_is_its_problem(solver: str) -> None:
    weight, gram = problem()
    alone = solve_magr(weight, gram, alpha=0.05, solver=solver)
    found = solve_magr(weight[None], gram[None], alpha=0.05, solver=solver)
    check_promises(found, weight[None])
    for field in dataclasses.fields(Solution):
        assert torch.equal(getattr(found, field.name), getattr(alone, field.name)[None])


@pytest.mark.parametrize("most", [1, 48, 100])  # one problem at a time; one; two and one
def test_a_large_batch_is_solved_in_parts(
    solver: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = batch()
    whole = solve_magr(weight, gram, alpha=0.05, solver=solver)
    monkeypatch.setattr("magr_fx.iterations.admm.CPU_TILE", most)
    parts = solve_magr(weight, gram, alpha=0.05, solver=solver)
    check_promises(parts, weight)
    assert torch.equal(parts.status, whole.status)
    assert torch.allclose(parts.objective, whole.objective, rtol=2e-3)


def test_a_batch_in_half_precision(solver: str) -> None:
    weight, gram = batch()
    weight = weight.to(torch.bfloat16)
    solution = solve_magr(weight, gram, alpha=0.05, solver=solver)
    check_promises(solution, weight)
    for i, rows in enumerate(weight):
        exact = objectives(solution.weight[i], rows, gram[i], 0.05)
        assert torch.allclose(solution.objective[i].double(), exact, rtol=1e-6)


# --- paths of alphas

ALPHAS = (0.02, 0.3, 0.05, 0.001, 0.05)


def test_a_path_is_in_the_order_of_its_alphas(solver: str) -> None:
    weight, gram = problem(rows=10, columns=24, seed=14)
    path = solve_magr_path(weight, gram, ALPHAS, solver=solver)
    assert len(path) == len(ALPHAS)
    for solution, alpha in zip(path, ALPHAS, strict=True):
        check_promises(solution, weight)
        alone = solve_magr(weight, gram, alpha=alpha, solver=solver)
        assert torch.allclose(solution.objective_before, alone.objective_before, rtol=1e-6)
        assert torch.allclose(solution.objective, alone.objective, rtol=2e-3)
        exact = objectives(solution.weight, weight, gram, alpha)
        assert torch.allclose(solution.objective.double(), exact, rtol=1e-6)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("problems", [None, 3])
def test_every_solution_of_a_path_is_certified(
    problems: int | None, group_size: int | None
) -> None:
    weight, gram = (
        problem(rows=10, columns=24, tokens=90, seed=14)
        if problems is None
        else batch(problems, rows=10, columns=24, tokens=90)
    )
    options: dict[str, Any] = {"group_size": group_size, "tol": 1e-4, "max_steps": 400}
    path = solve_magr_path(weight, gram, ALPHAS, **options)
    for solution, alpha in zip(path, ALPHAS, strict=True):
        check_promises(solution, weight)
        alone = solve_magr(weight, gram, alpha=alpha, **options)
        assert set(statuses(solution)) <= {Status.CONVERGED, Status.TRIVIAL}
        assert (solution.dual_gap <= 1e-4 * solution.objective).all()
        assert torch.allclose(solution.objective, alone.objective, rtol=2e-4)


@pytest.mark.parametrize("problems", [None, 3])
def test_an_inexact_path_has_the_same_rows(problems: int | None) -> None:
    weight, gram = problem(rows=60, seed=14) if problems is None else batch(problems, rows=60)
    exact = solve_magr_path(weight, gram, ALPHAS)
    rough = solve_magr_path(weight, gram, ALPHAS, exact=False)
    for one, other in zip(exact, rough, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.status, other.status)
        assert torch.allclose(one.objective, other.objective, rtol=1e-3)
        # Float32 shows, if not in every row.
        assert not torch.equal(one.objective, other.objective)


def test_a_path_takes_fewer_steps_than_its_solves() -> None:
    weight, gram = problem(rows=30, columns=48, tokens=200, seed=14)
    alphas = [0.1 * 0.8**i for i in range(8)]
    path = solve_magr_path(weight, gram, alphas)
    alone = [solve_magr(weight, gram, alpha=alpha) for alpha in alphas]
    taken, wanted = (sum(int(s.steps.sum()) for s in found) for found in (path, alone))
    assert taken < wanted


def test_a_path_of_one_is_a_solve(solver: str) -> None:
    weight, gram = problem()
    (only,) = solve_magr_path(weight, gram, (0.05,), solver=solver)
    assert same_bits(only, solve_magr(weight, gram, alpha=0.05, solver=solver))


@pytest.mark.parametrize("tol", [1e-3, 0.0])
def test_rows_solved_apart_end_as_those_solved_together(solver: str, tol: float) -> None:
    """Two processes, here threads, with a part of the rows each; one is done long before."""
    weight, gram = problem(rows=30, columns=64, tokens=40)
    weight[0] = 0
    alphas = [0.05, 1e-3]
    # In float64: rounding moves 200 steps along directions in which there are no inputs.
    weight, gram = weight.double(), gram.double()
    options: dict[str, Any] = {"solver": solver, "tol": tol, "precision": "float64"}
    wanted = solve_magr_path(weight, gram, alphas, **options)
    parts = [slice(2), slice(2, None)]
    if solver == "admm":  # each part would have a ρ of its own
        alone = [solve_magr_path(weight[part], gram, alphas, **options) for part in parts]
        joined = torch.cat([path[0].weight for path in alone])
        assert (joined - wanted[0].weight).abs().max() > 1e-3
    told: list[torch.Tensor] = [torch.empty(0)] * 2
    gate = threading.Barrier(2, timeout=60)

    def solve(at: int) -> list[Solution]:
        def all_gather_rows(values: torch.Tensor) -> torch.Tensor:
            told[at] = values
            gate.wait()
            both = torch.cat(told)
            gate.wait()
            return both

        return solve_magr_path(
            weight[parts[at]], gram, alphas, all_gather_rows=all_gather_rows, **options
        )

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(solve, range(2)))
    for whole, *of_parts in zip(wanted, *found, strict=True):
        assert torch.equal(torch.cat([part.steps for part in of_parts]), whole.steps)
        joined = torch.cat([part.weight for part in of_parts])
        assert torch.allclose(joined, whole.weight, rtol=0, atol=1e-9)


def test_a_path_without_data_leaves_the_weight(solver: str) -> None:
    weight, gram = batch()
    path = solve_magr_path(weight, torch.zeros_like(gram), [0.1, 0.2], solver=solver)
    path += solve_magr_path(weight[0], torch.zeros_like(gram[0]), [0.1], solver=solver)
    for solution, original in zip(path, [weight, weight, weight[0]], strict=True):
        assert torch.equal(solution.weight, original)
    path[0].weight.zero_()
    assert path[1].weight.any()  # no memory in common


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([], "alphas must be a non-empty list of numbers"),
        ("0.1", "alphas must be a non-empty list of numbers, got '0.1'"),
        (0.1, "alphas must be a non-empty list of numbers, got 0.1"),
        (None, "alphas must be a non-empty list of numbers, got None"),
        ([0.1, -1e-3], "alpha must be a finite number above 0, got -0.001"),
        ([0.1, 0], "alpha must be a finite number above 0, got 0"),
        ([math.nan], "alpha must be a finite number above 0, got nan"),
        ([math.inf, 0.1], "alpha must be a finite number above 0, got inf"),
        (["0.1"], "alpha must be a finite number above 0, got '0.1'"),
        ([True], "alpha must be a finite number above 0, got True"),
    ],
)
def test_bad_alphas_are_refused(alphas: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solve_magr_path(*problem(), alphas)


# --- Solution and Status


def test_summary_counts_rows_by_status() -> None:
    weight, gram = problem(rows=3)
    weight[0] = 0
    solution = solve_magr(weight, gram, alpha=0.01, solver="pgd", max_steps=1)
    assert solution.summary == "step limit: 2 rows, trivial: 1 row"
    status = torch.tensor([0] * 570 + [1] * 6 + [3], dtype=torch.int8)
    mixed = dataclasses.replace(solution, status=status)
    assert mixed.summary == "converged: 570 rows, step limit: 6 rows, failed: 1 row"


def test_summary_counts_the_rows_of_all_problems() -> None:
    weight, gram = batch(problems=3, rows=4)
    gram[0] = 0
    solution = solve_magr(weight, gram, alpha=0.01)
    assert solution.summary == "converged: 8 rows, trivial: 4 rows"


def test_solution_is_frozen() -> None:
    solution = solve_magr(*problem())
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.weight = torch.zeros(1)  # type: ignore[misc]


def test_every_status_is_a_sentence() -> None:
    sentences = [status.sentence for status in Status]
    assert len(set(sentences)) == len(sentences) == 4
    assert all(text[0].isupper() and text.endswith(".") for text in sentences)
    for status, remedy in (("STEP_LIMIT", "raise max_steps"), ("FAILED", "lower alpha")):
        assert remedy in Status[status].sentence


# --- errors


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"floating tensor .* 2-D \[out, in\] or 3-D .* got float32 \[3\]"),
        (torch.ones(2, 2, 3, 4), r"floating tensor .* got float32 \[2, 2, 3, 4\]"),
        (torch.ones(2, 3, dtype=torch.int8), r"floating tensor .* got int8 \[2, 3\]"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), r"16 to 64 bits, .* float8_e4m3fn \[2, 3\]"),
        ([[1.0, 2.0, 3.0]], "floating tensor .* got list"),
        (torch.ones(0, 3), r"a row and a column, got float32 \[0, 3\]"),
        (torch.ones(3, 0), r"a row and a column, got float32 \[3, 0\]"),
        (torch.ones(0, 2, 3), r"a row and a column, got float32 \[0, 2, 3\]"),
        (torch.ones(2, 0, 3), r"a row and a column, got float32 \[2, 0, 3\]"),
        (torch.ones(2, 3, device="meta"), "meta device"),
        (torch.tensor([[1.0, math.nan, 1.0]]), "weight has NaN or infinite"),
        (torch.tensor([[1.0, math.inf, 1.0]]), "weight has NaN or infinite"),
        (torch.full((2, 1, 3), math.nan), "weight has NaN or infinite"),
    ],
)
def test_bad_weights_are_refused(solver: str, weight: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        solve_magr(weight, torch.eye(3), solver=solver)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(4), r"gram must be .* \[3, 3\] for a weight with in = 3, got float32 \[4, 4\]"),
        (torch.ones(3), r"got float32 \[3\]"),
        (torch.ones(3, 4), r"got float32 \[3, 4\]"),
        (torch.ones(1, 3, 3), r"\[in, in\] = \[3, 3\] .* got float32 \[1, 3, 3\]"),
        (torch.eye(3, dtype=torch.int64), r"got int64 \[3, 3\]"),
        ([[1.0]], "got list"),
        (torch.full((3, 3), math.nan), "gram has NaN"),
        (torch.diag(torch.tensor([1.0, math.inf, 1.0])), "gram has NaN, infinite"),
        (torch.full((3, 3), 3e38), "too large"),
        (torch.eye(3, dtype=torch.float64) * 1e300, "too large"),
        (torch.diag(torch.tensor([1.0, -1e-6, 1.0])), "negative diagonal"),
    ],
)
def test_bad_grams_are_refused(solver: str, gram: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        solve_magr(torch.ones(2, 3), gram, solver=solver)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(3), r"\[problems, in, in\] = \[2, 3, 3\] .* got float32 \[3, 3\]"),
        (torch.eye(3).expand(1, 3, 3), r"= \[2, 3, 3\] .* got float32 \[1, 3, 3\]"),
        (torch.eye(3).expand(3, 3, 3), r"= \[2, 3, 3\] .* got float32 \[3, 3, 3\]"),
        (torch.ones(2, 3, 4), r"= \[2, 3, 3\] .* got float32 \[2, 3, 4\]"),
        (torch.ones(2, 4, 4), r"= \[2, 3, 3\] .* got float32 \[2, 4, 4\]"),
        (torch.stack([torch.eye(3), torch.full((3, 3), math.nan)]), "gram has NaN"),
        (torch.stack([torch.eye(3), -torch.eye(3)]), "negative diagonal"),
    ],
)
def test_bad_grams_of_a_batch_are_refused(solver: str, gram: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        solve_magr(torch.ones(2, 5, 3), gram, solver=solver)


@pytest.mark.parametrize("problems", [None, 2])
def test_an_indefinite_gram_is_refused(problems: int | None) -> None:
    gram = 1.5 * torch.ones(4, 4) - torch.eye(4)
    weight = torch.ones(2, 4)
    if problems:
        gram = torch.stack([torch.eye(4), gram])
        weight = torch.ones(2, 3, 4)
    with pytest.raises(CalibrationError, match="not positive semidefinite, by more than rounding"):
        solve_magr(weight, gram, alpha=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 4}, r"group_size 4 does not divide in = 6; choose a divisor"),
        ({"group_size": 12}, r"group_size 12 does not divide in = 6"),
        ({"group_size": 0}, "group_size must be a positive int"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ({"alpha": -1.0}, "alpha must be a finite number above 0"),
        ({"alpha": math.nan}, "alpha must be a finite number above 0"),
        ({"solver": "sgd"}, "solver must be one of"),
        ({"max_steps": 0}, "max_steps must be an int of at least 1"),
        ({"tol": -1.0}, "tol must be a finite number of at least 0"),
        ({"precision": "bfloat16"}, "precision must be one of float32, float64, got 'bfloat16'"),
        ({"precision": torch.float64}, "precision must be one of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solve_magr(torch.ones(2, 6), torch.eye(6), **options)
    with pytest.raises(ConfigError, match=message):
        solve_magr(torch.ones(2, 2, 6), torch.eye(6).expand(2, 6, 6), **options)
