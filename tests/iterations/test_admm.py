"""ADMM: optimal by independent solvers, certified honestly, and the same however it is cut up."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_helpers import batch, check_promises, objectives, penalty, problem, setting, statuses
from torch import Tensor

from magr_fx.iterations import admm_tile, relaxed_step
from magr_fx.iterations.admm import LEAST_CHANGE, LEAST_FACTOR, MOST_FACTOR, Run, admm
from magr_fx.iterations.prox import threshold
from magr_fx.iterations.solution import Iterate, Status
from magr_fx.solver.solver import solve_magr

pytestmark = pytest.mark.usefixtures("one_thread")

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=150)


# --- against independent float64 solvers


@st.composite
def small_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float, int]:
    """Weight, gram, alpha and group size; whole-number inputs of any rank, scaled by 2 to the k.

    The gram is exact in float32, so that the oracle and the solver see the same problem.
    """
    group_size = draw(st.integers(1, 5))
    columns = group_size * draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 20))
    shared = draw(st.sampled_from([0, 1, 3]))  # 0: inputs without correlation
    spread = draw(st.sampled_from([0, 0, 4, 13]))  # column sizes from 2^-13 to 2^13
    alpha = 10.0 ** draw(st.floats(-4, 0))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inputs = torch.randint(-4, 5, (tokens, columns), generator=generator).double()
    inputs += shared * torch.randint(-4, 5, (tokens, 1), generator=generator)
    powers = torch.randint(-spread, spread + 1, (columns,), generator=generator)
    inputs *= 2.0**powers
    weight = torch.randn(draw(st.integers(1, 3)), columns, generator=generator)
    return weight, (inputs.T @ inputs).float(), alpha, group_size


def vertex_optima(weight: Tensor, gram: Tensor, alpha: float, group_size: int) -> Tensor:
    matrix, price = gram.double().numpy(), penalty(gram, alpha)
    rows = weight.double().numpy()
    found = [oracles.optimum_by_vertices(row, matrix, price, group_size) for row in rows]
    return torch.tensor(found, dtype=torch.float64)


@repeatable
@given(posed=small_problems(), max_steps=st.sampled_from([1, 2, 7, 100, 100, 100]))
def test_promises_hold_beside_the_true_optimum(
    posed: tuple[Tensor, Tensor, float, int], max_steps: int
) -> None:
    weight, gram, alpha, group_size = posed
    solution = solve_magr(weight, gram, alpha=alpha, group_size=group_size, max_steps=max_steps)
    check_promises(solution, weight)
    if not gram.any():
        assert torch.equal(solution.weight, weight)
        return
    best = vertex_optima(weight, gram, alpha, group_size)
    # Of the oracle, and of λmax and of what is reported in float32.
    slack = 1e-6 * solution.objective_before.double()
    exact = objectives(solution.weight, weight, gram, alpha, group_size)
    assert torch.allclose(solution.objective.double(), exact, rtol=1e-6, atol=0)
    assert (exact >= best - slack).all()
    assert (solution.dual_gap.double() >= exact - best - slack).all()
    sure = solution.status == Status.CONVERGED
    assert (exact <= best * (1 + 1e-3) + slack)[sure].all()
    assert (solution.dual_gap <= (1e-3 + 1e-6) * solution.objective + slack)[sure].all()


@repeatable
@given(posed=small_problems())
def test_float64_meets_the_optimality_conditions(posed: tuple[Tensor, Tensor, float, int]) -> None:
    weight, gram, alpha, group_size = posed
    weight, gram = weight.double(), gram.double()
    solution = solve_magr(
        weight,
        gram,
        alpha=alpha,
        group_size=group_size,
        max_steps=3000,
        tol=1e-11,
        precision="float64",
    )
    check_promises(solution, weight)
    matrix, price = gram.numpy(), float(torch.linalg.eigvalsh(gram)[-1]) * alpha
    for row, original, status, value in zip(
        solution.weight.numpy(), weight.numpy(), statuses(solution), solution.objective, strict=True
    ):
        if status is Status.CONVERGED:
            # The objective is within 1e-11, so that the gradient is within the root of that.
            excess = 2e-11 * float(value) * price / alpha * len(row)
            within = 1e-6 + 3 * excess**0.5 / price
            oracles.check_optimal(row, original, matrix, price, group_size, within)


@pytest.mark.parametrize("tokens", [40, 5])
@pytest.mark.parametrize("group_size", [6, 3])
@pytest.mark.parametrize("alpha", [0.3, 0.01])
def test_both_oracles_and_the_solver_agree(alpha: float, group_size: int, tokens: int) -> None:
    weight, gram = problem(rows=3, columns=6, tokens=tokens, seed=21)
    by_vertices = vertex_optima(weight, gram, alpha, group_size)
    matrix, price = gram.double().numpy(), penalty(gram, alpha)
    smooth = [oracles.optimum(row, matrix, price, group_size)[1] for row in weight.double().numpy()]
    assert by_vertices.numpy() == pytest.approx(np.array(smooth), rel=1e-6)
    solution = solve_magr(
        weight.double(),
        gram,
        alpha=alpha,
        group_size=group_size,
        tol=1e-9,
        max_steps=1000,
        precision="float64",
    )
    assert set(statuses(solution)) <= {Status.CONVERGED, Status.TRIVIAL}
    assert torch.allclose(solution.objective.double(), by_vertices, rtol=1e-6)


@pytest.mark.parametrize("group_size", [None, 16])
def test_well_conditioned_problems_are_soon_done(group_size: int | None) -> None:
    done = total = 0
    for seed in range(40):
        weight, gram = problem(rows=8, columns=32, tokens=200, seed=seed)
        alpha = 10.0 ** -(seed % 4)
        solution = solve_magr(weight, gram, alpha=alpha, group_size=group_size, max_steps=60)
        done += sum(s in (Status.CONVERGED, Status.TRIVIAL) for s in statuses(solution))
        assert (solution.steps[solution.status == Status.CONVERGED] <= 60).all()
        total += len(weight)
    assert done >= 0.95 * total


def test_looks_are_after_ten_steps_and_then_every_five() -> None:
    weight, gram = problem(rows=40, columns=32, tokens=60, seed=22)
    solution = solve_magr(weight, gram, alpha=0.003, tol=1e-4, max_steps=200)
    steps = solution.steps[solution.status == Status.CONVERGED]
    assert len(set(steps.tolist())) > 2
    assert ((steps >= 10) & (steps % 5 == 0)).all()
    short = solve_magr(weight, gram, alpha=0.003, tol=1e-4, max_steps=12)
    assert set(short.steps.tolist()) == {12} | set(steps[steps <= 12].tolist())


def test_the_last_step_is_looked_at_too() -> None:
    weight, _ = problem()
    solution = solve_magr(weight, torch.eye(12), alpha=0.1, max_steps=7, tol=1e-2)
    assert (solution.steps == 7).all()
    assert set(statuses(solution)) == {Status.CONVERGED}


def test_without_tol_all_steps_are_taken() -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=0.1, max_steps=40, tol=0)
    assert (solution.steps == 40).all()
    assert set(statuses(solution)) == {Status.STEP_LIMIT}
    assert (solution.dual_gap <= 1e-3 * solution.objective).all()  # not that it is far off


def test_more_looks_never_cost() -> None:
    weight, gram = problem(rows=8, tokens=5, seed=1)
    totals = [
        solve_magr(weight, gram, alpha=0.003, max_steps=steps, tol=0).objective.sum()
        for steps in (10, 15, 20, 50, 100)
    ]
    assert all(later <= sooner * (1 + 1e-6) for sooner, later in pairwise(totals))


# --- however it is cut up


def solved(
    weight: Tensor, gram: Tensor, alpha: float = 0.01, group_size: int | None = None, **options: Any
) -> Iterate:
    found, _ = admm(setting(gram, alpha, group_size), weight, **{"tol": 1e-4, **options})
    return found


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("most", [1, 60, 5 * 24])
def test_tiles_do_not_matter(
    most: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(rows=17, columns=24, tokens=100, seed=23)
    whole = solved(weight, gram, group_size=group_size, max_steps=100)
    monkeypatch.setattr("magr_fx.iterations.admm.CPU_TILE", most)
    tiled = solved(weight, gram, group_size=group_size, max_steps=100)
    assert whole.converged.all()
    assert torch.equal(tiled.converged, whole.converged)
    assert torch.equal(tiled.steps, whole.steps)
    assert torch.allclose(tiled.weight, whole.weight, rtol=0, atol=1e-4)
    assert torch.allclose(tiled.bound, whole.bound, rtol=1e-4)


@pytest.mark.parametrize("most", [1, 3 * 24 * 2])
def test_tiles_of_a_batch_do_not_matter(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = batch(5, rows=3, columns=24, tokens=100)
    whole = solved(weight, gram, max_steps=100)
    monkeypatch.setattr("magr_fx.iterations.admm.CPU_TILE", most)
    tiled = solved(weight, gram, max_steps=100)
    assert whole.converged.all()
    assert torch.equal(tiled.converged, whole.converged)
    assert torch.equal(tiled.steps, whole.steps)
    assert torch.allclose(tiled.weight, whole.weight, rtol=0, atol=1e-4)


def test_a_problem_of_a_batch_leaves_with_its_last_row() -> None:
    weight, gram = batch(4, rows=6, columns=24, tokens=100)
    weight[2] *= torch.logspace(-3, 0, 6).unsqueeze(-1)
    found = solved(weight, gram, alpha=0.05, max_steps=200)
    assert found.converged.all()
    assert (found.steps == found.steps[:, :1]).all()
    assert len(set(found.steps[:, 0].tolist())) > 1


@pytest.mark.parametrize("group_size", [None, 8])
def test_fixed_passes_are_enough(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode without host checks, which other devices than a CPU use where Triton is missing."""
    weight, gram = problem(rows=20, columns=64, tokens=300, seed=24)
    exact = solved(weight, gram, group_size=group_size, max_steps=100)
    budgets: list[int] = []

    def fixed(magnitude: Tensor, alpha: float, *, rho: Tensor, start: Tensor) -> Tensor:
        budgets.append(relaxed_step.FIXED_PASSES)
        return threshold(magnitude, alpha, metric=rho, start=start, passes=budgets[-1])

    monkeypatch.setattr(relaxed_step, "prox_level", fixed)
    monkeypatch.setattr(admm_tile, "prox_level", fixed)
    found = solved(weight, gram, group_size=group_size, max_steps=100)
    assert len(budgets) > 10
    assert exact.converged.all()
    assert found.converged.all()
    assert found.steps.double().mean() <= exact.steps.double().mean() + 2
    posed = setting(gram, 0.01, group_size)
    size = posed.group_size
    for rows in (exact.weight, found.weight):
        value = objectives(rows, weight, gram, 0.01, size) / float(posed.peak)
        assert (value - exact.bound <= 2e-4 * value).all()


@pytest.mark.parametrize("problems", [None, 3])
def test_a_warm_start_saves_steps(problems: int | None) -> None:
    size: dict[str, int] = {"rows": 20, "columns": 24, "tokens": 200}
    weight, gram = problem(**size) if problems is None else batch(problems, **size)
    before, warm = admm(setting(gram, 0.0102), weight, max_steps=500, tol=1e-4, resumable=True)
    assert warm is not None
    posed = setting(gram, 0.01)
    cold, nothing = admm(posed, weight, max_steps=500, tol=1e-4)
    assert nothing is None
    again, _ = admm(posed, weight, max_steps=500, tol=1e-4, warm=warm)
    assert before.converged.all()
    assert cold.converged.all()
    assert again.converged.all()
    assert again.steps.double().mean() < cold.steps.double().mean()
    assert torch.allclose(again.bound, cold.bound, rtol=2e-4)
    assert not torch.equal(again.weight, cold.weight)  # it did start elsewhere


def test_a_warm_start_keeps_the_dual_of_the_neighbour() -> None:
    # u scales with alpha: for one input the optimal dual is exactly alpha/ρ, and no step is left.
    weight, gram = torch.tensor([[2.0], [-3.0]]), torch.tensor([[5.0]])
    _, warm = admm(setting(gram, 0.2), weight, max_steps=60, tol=0, resumable=True)
    assert warm is not None
    dual = (warm.shifted - warm.shifted.clamp(-warm.level, warm.level)) * warm.splitting.rho
    assert torch.allclose(dual.abs(), torch.full_like(dual, 0.2), rtol=1e-5)
    _, after = admm(setting(gram, 0.1), weight, max_steps=60, tol=0, warm=warm, resumable=True)
    assert after is not None
    dual = (after.shifted - after.shifted.clamp(-after.level, after.level)) * after.splitting.rho
    assert torch.allclose(dual.abs(), torch.full_like(dual, 0.1), rtol=1e-5)
    assert torch.allclose(after.level, weight.abs() - 0.1, rtol=1e-5)


# --- balancing


def run_with(imbalance: Tensor, problems: int | None = None) -> Run:
    weight, gram = problem(rows=5) if problems is None else batch(problems, rows=5)
    run = Run(setting(gram, 0.05), weight, None, resumable=False, exact=True)
    run.imbalance = imbalance
    return run


BALANCE = math.sqrt(3)


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (1.0, None),  # balanced as it should be
        (1.4, None),  # 1.96 is not worth another factorisation
        (0.72, None),
        (1.6, 2.56),
        (0.5, 0.25),
        (100.0, MOST_FACTOR),
        (1e-9, LEAST_FACTOR),
        (0.0, LEAST_FACTOR),
        (math.nan, None),
        (math.inf, MOST_FACTOR),
    ],
)
def test_balance_moves_rho_by_the_square_within_limits(ratio: float, factor: float | None) -> None:
    assert LEAST_CHANGE > 1.4**2
    run = run_with(torch.full((5,), ratio * BALANCE))
    before = run.splitting
    run.balance()
    if factor is None:
        assert run.splitting is before
        assert run.rescale is None
        return
    want = before.strength * factor
    assert torch.allclose(run.splitting.strength, want, rtol=1e-5)
    assert torch.allclose(run.splitting.rho, before.rho * factor, rtol=1e-5)
    assert run.rescale is not None
    assert torch.allclose(run.rescale, torch.tensor(1 / factor), rtol=1e-5)


def test_balance_goes_by_the_median_of_the_open_rows() -> None:
    run = run_with(torch.tensor([100.0, 100.0, 0.5 * BALANCE, 1e-9, math.nan]))
    run.open = torch.tensor([1, 2, 3, 4])
    before = run.splitting.strength
    run.balance()
    assert torch.allclose(run.splitting.strength, before * 0.25, rtol=1e-5)


def test_balance_changes_only_the_problems_that_need_it() -> None:
    run = run_with(torch.tensor([[0.5], [1.0], [1.0], [2.0]]).expand(4, 5) * BALANCE, problems=4)
    run.open = torch.tensor([0, 1, 3])
    before = run.splitting
    run.balance()
    factors = torch.tensor([0.25, 1.0, 1.0, MOST_FACTOR])
    assert torch.allclose(run.splitting.strength, before.strength * factors, rtol=1e-5)
    assert torch.equal(run.splitting.rho[1], before.rho[1])
    assert run.rescale is not None
    assert torch.allclose(run.rescale, 1 / factors, rtol=1e-5)


def test_balance_keeps_the_dual() -> None:
    """ρu is the dual; a change of ρ must not change it."""
    weight, gram = problem(rows=5)
    run = Run(setting(gram, 0.05), weight, None, resumable=False, exact=True)
    run.step_and_evaluate(10)

    def dual() -> Tensor:
        bound = run.level
        return (run.shifted - run.shifted.clamp(-bound, bound)) * run.splitting.rho

    before = dual()
    run.imbalance = torch.full((5,), 1e-9)
    run.balance()
    run.step(0)
    assert torch.allclose(dual(), before, rtol=1e-3, atol=1e-6)
    assert before.abs().sum(-1).allclose(torch.full((5,), 0.05), rtol=1e-4)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("problems", [None, 3])
def test_cuda_agrees_with_the_cpu(problems: int | None, group_size: int | None) -> None:
    weight, gram = (
        problem(rows=50, columns=64, tokens=300)
        if problems is None
        else batch(problems, rows=20, columns=64, tokens=300)
    )
    options: dict[str, Any] = {"alpha": 0.01, "group_size": group_size, "tol": 1e-4}
    host = solve_magr(weight, gram, **options)
    device = solve_magr(weight.cuda(), gram, **options)
    assert device.weight.is_cuda
    assert set(statuses(device)) == set(statuses(host)) == {Status.CONVERGED}
    assert torch.allclose(device.objective.cpu(), host.objective, rtol=2e-4)
    assert (device.dual_gap <= 1e-4 * device.objective).all()
    strided = solve_magr(weight.cuda().mT.contiguous().mT, gram, **options)
    assert torch.allclose(strided.objective.cpu(), host.objective, rtol=2e-4)
