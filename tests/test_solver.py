"""solve_magr: parity with the published code, the certificate, degenerate inputs, the errors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from magr_fx.certificate import Problem, certify
from magr_fx.errors import CalibrationError, ConfigError, ModelError
from magr_fx.gram import largest_eigenvalue
from magr_fx.solver import FIXED_PASSES, Solution, Status, _descend, solve_magr

PUBLISHED = Path(__file__).parent / "data" / "magr_published_code.safetensors"
PARITY = 1e-5
with safe_open(PUBLISHED, "pt") as stored:
    CASES = {name: json.loads(options) for name, options in sorted(stored.metadata().items())}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are small: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(
    rows: int = 6, columns: int = 12, tokens: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight, and a gram of correlated whole-number inputs, which float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(-4, 5, (tokens, columns), generator=generator)
    inputs += torch.randint(-4, 5, (tokens, 1), generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, (inputs.T @ inputs).float()


def penalty(gram: Tensor, alpha: float) -> float:
    return alpha * float(largest_eigenvalue(gram))


def objectives(
    rows: Tensor, weight: Tensor, gram: Tensor, alpha: float, group_size: int | None = None
) -> Tensor:
    """The objective of every row, by the oracle."""
    size = group_size or weight.shape[1]
    matrix, price = gram.double().numpy(), penalty(gram, alpha)
    pairs = zip(rows.double().numpy(), weight.double().numpy(), strict=True)
    values = [oracles.objective(v, w, matrix, price, size) for v, w in pairs]
    return torch.tensor(values, dtype=torch.float64)


def optima(weight: Tensor, gram: Tensor, alpha: float, group_size: int | None = None) -> Any:
    """The optimal rows and their objectives, by the oracle."""
    size = group_size or weight.shape[1]
    matrix, price = gram.double().numpy(), penalty(gram, alpha)
    found = [oracles.optimum(w, matrix, price, size) for w in weight.double().numpy()]
    rows, values = zip(*found, strict=True)
    return torch.from_numpy(np.stack(rows)), torch.tensor(values, dtype=torch.float64)


def statuses(solution: Solution) -> list[Status]:
    return [Status(value) for value in solution.status.tolist()]


def same_bits(one: Solution, other: Solution) -> bool:
    return all(
        torch.equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(Solution)
    )


def check_promises(solution: Solution, weight: Tensor) -> None:
    """What holds for every solution, whatever went in."""
    rows = weight.shape[0]
    assert solution.weight.shape == weight.shape
    assert solution.weight.dtype == weight.dtype
    assert solution.weight.isfinite().all()
    assert solution.status.dtype == torch.int8
    assert solution.steps.dtype == torch.int32
    assert solution.status.shape == solution.steps.shape == (rows,)
    for values in (solution.objective_before, solution.objective, solution.dual_gap):
        assert values.dtype == torch.float32
        assert values.shape == (rows,)
        assert values.isfinite().all()
        assert (values >= 0).all()
    assert (solution.objective <= solution.objective_before).all()
    assert (solution.dual_gap <= solution.objective).all()


# --- parity with the published code


def load_case(name: str) -> tuple[Tensor, Tensor, Tensor]:
    with safe_open(PUBLISHED, "pt") as file:
        gram, weight, expected = (
            file.get_tensor(f"{name}.{kind}") for kind in ("gram", "weight", "expected")
        )
    return gram, weight, expected


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_matches_the_published_code(name: str) -> None:
    gram, weight, expected = load_case(name)
    options = CASES[name]
    solution = solve_magr(
        weight,
        gram,
        alpha=options["alpha"],
        group_size=options["group_size"],
        max_steps=options["steps"],
    )
    assert relative(solution.weight, expected) < PARITY
    assert relative(weight, expected) > 100 * PARITY  # doing nothing would not pass
    check_promises(solution, weight)
    assert set(statuses(solution)) <= {Status.STEP_LIMIT, Status.TRIVIAL}
    assert (solution.steps == options["steps"]).all()


@pytest.mark.parametrize("name", CASES)
def test_fixed_passes_match_the_published_code(name: str) -> None:
    """The mode without host checks, which other devices than a CPU use."""
    gram, weight, expected = load_case(name)
    options = CASES[name]
    setting = Problem(
        gram, largest_eigenvalue(gram), options["alpha"], options["group_size"] or len(gram)
    )
    fixed, exact = (
        _descend(setting, weight, max_steps=options["steps"], tol=0.0, passes=passes).weight
        for passes in (FIXED_PASSES, None)
    )
    assert relative(fixed, expected) < PARITY
    assert relative(fixed, exact) < PARITY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_matches_the_published_code_on_cuda(name: str) -> None:
    gram, weight, expected = load_case(name)
    options = CASES[name]
    solution = solve_magr(
        weight.cuda(),
        gram,
        alpha=options["alpha"],
        group_size=options["group_size"],
        max_steps=options["steps"],
    )
    assert {getattr(solution, f.name).device.type for f in dataclasses.fields(Solution)} == {"cuda"}
    assert relative(solution.weight.cpu(), expected) < PARITY


# --- objectives and the certificate

SETTINGS = [(0.3, None), (0.05, None), (1e-3, None), (0.05, 4), (0.01, 2), (1e-3, 6), (0.02, 1)]


@pytest.mark.parametrize(("alpha", "group_size"), SETTINGS)
def test_objectives_are_the_formula(alpha: float, group_size: int | None) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=alpha, group_size=group_size)
    grouped = weight.double().view(len(weight), -1, group_size or weight.shape[1])
    before = penalty(gram, alpha) * grouped.abs().amax(-1).sum(-1)
    assert torch.allclose(solution.objective_before.double(), before, rtol=1e-6)
    after = objectives(solution.weight, weight, gram, alpha, group_size)
    assert torch.allclose(solution.objective.double(), after, rtol=1e-6)
    assert (solution.objective < solution.objective_before).all()


@pytest.mark.parametrize("tokens", [40, 5])  # well and rank-deficient
@pytest.mark.parametrize(("alpha", "group_size"), SETTINGS)
def test_dual_gap_bounds_the_true_distance(
    alpha: float, group_size: int | None, tokens: int
) -> None:
    weight, gram = problem(rows=4, tokens=tokens, seed=1)
    _, best = optima(weight, gram, alpha, group_size)
    size = group_size or weight.shape[1]
    last = math.inf
    for steps in (1, 3, 10, 50, 200):
        solution = solve_magr(weight, gram, alpha=alpha, group_size=group_size, max_steps=steps)
        check_promises(solution, weight)
        excess = objectives(solution.weight, weight, gram, alpha, size) - best
        slack = 1e-6 * solution.objective_before  # float32 of what is returned, SLSQP's tolerance
        assert (solution.dual_gap + slack >= excess).all()
        assert (excess >= -slack).all()
        assert float(solution.objective.sum()) <= last * (1 + 1e-6)
        last = float(solution.objective.sum())


@pytest.mark.parametrize(("alpha", "group_size"), SETTINGS)
def test_certified_rows_are_optimal(alpha: float, group_size: int | None) -> None:
    weight, gram = problem(seed=2)
    gram += 40 * torch.eye(len(gram))
    tol = 1e-6 / alpha  # smaller ones are beyond what float32 weights can express
    solution = solve_magr(weight, gram, alpha=alpha, group_size=group_size, max_steps=5000, tol=tol)
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
        setting = Problem(gram, largest_eigenvalue(gram), 0.05, group_size)
        at_best = certify(setting, weight, rows)
        assert (at_best.gap <= 1e-5 * at_best.objective).all()
        assert torch.allclose(at_best.objective * setting.peak, best, rtol=1e-9)
        at_start = certify(setting, weight, weight)
        assert torch.equal(at_start.gap, at_start.before)  # only the bound 0 is left
        assert torch.equal(at_start.objective, at_start.before)
        # Far off, with a feasible multiple of the direction that helps: better than the bound 0.
        assert (certify(setting, weight, 0.5 * rows + 0.5 * weight).gap < at_start.gap).all()


def test_gap_is_never_negative_by_rounding() -> None:
    # One input: the optimum is known, and its gap is nothing but rounding.
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2000, 1, generator=generator, dtype=torch.float64) + 0.3
    gram = torch.tensor([[3.0]])
    found = certify(Problem(gram, gram[0, 0], 0.1, 1), weight, weight - 0.1)
    assert (found.gap >= 0).all()
    assert (found.gap <= 1e-15).all()


def test_certificate_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(rows=7, seed=4)
    rows = weight * 0.9
    setting = Problem(gram, largest_eigenvalue(gram), 0.05, 4)
    whole = certify(setting, weight, rows)
    monkeypatch.setattr("magr_fx.certificate.BLOCK", 5)
    for one, other in zip(whole, certify(setting, weight, rows), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_largest_eigenvalue() -> None:
    _, gram = problem(columns=30, seed=5)
    exact = np.linalg.eigvalsh(gram.double().numpy())[-1]
    found = largest_eigenvalue(gram)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert abs(float(found) - exact) <= 1e-6 * exact
    assert float(largest_eigenvalue(torch.zeros(3, 3))) == 0.0
    assert float(largest_eigenvalue(-torch.eye(3))) == 0.0


# --- stopping


def test_tol_stops_each_row_by_itself() -> None:
    weight, gram = problem(rows=30, seed=6)
    weight[7] = 0
    solution = solve_magr(weight, gram, alpha=0.1, max_steps=3000, tol=1e-4)
    check_promises(solution, weight)
    assert len(set(solution.steps.tolist())) > 3
    assert ((solution.steps % 10 == 0) & (solution.steps < 3000)).all()
    assert statuses(solution)[7] is Status.TRIVIAL
    assert statuses(solution).count(Status.CONVERGED) == 29
    assert (solution.dual_gap <= 1e-4 * solution.objective).all()
    # Every row is where that many steps alone would have left it, and not certified earlier.
    for row in range(0, 30, 5):
        steps = int(solution.steps[row])
        alone = solve_magr(weight[row : row + 1], gram, alpha=0.1, max_steps=steps)
        assert torch.allclose(alone.weight[0], solution.weight[row], rtol=0, atol=1e-5)
        if steps > 10:
            earlier = solve_magr(weight[row : row + 1], gram, alpha=0.1, max_steps=steps - 10)
            assert float(earlier.dual_gap) > 0.99e-4 * float(earlier.objective)


def test_tol_leaves_the_rest_at_the_limit() -> None:
    weight, gram = problem(rows=30, seed=6)
    whole = solve_magr(weight, gram, alpha=0.1, max_steps=3000, tol=1e-4)
    limit = int(whole.steps.median()) + 5
    solution = solve_magr(weight, gram, alpha=0.1, max_steps=limit, tol=1e-4)
    early = solution.steps < limit
    assert torch.equal(early, whole.steps < limit)
    assert (solution.steps[~early] == limit).all()
    assert set(solution.status[early].tolist()) == {int(Status.CONVERGED)}
    assert Status.STEP_LIMIT in statuses(solution)
    assert torch.equal(solution.weight[early], whole.weight[early])
    relative_gap = solution.dual_gap / solution.objective
    assert torch.equal(relative_gap <= 1e-4, solution.status == Status.CONVERGED)


def test_the_last_step_is_looked_at_too() -> None:
    weight, _ = problem()
    solution = solve_magr(weight, torch.eye(12), alpha=0.1, max_steps=3, tol=1e-3)
    assert (solution.steps == 3).all()
    assert set(statuses(solution)) == {Status.CONVERGED}


def test_without_tol_all_steps_are_taken() -> None:
    weight, _ = problem()
    solution = solve_magr(weight, torch.eye(12), alpha=0.1, max_steps=40)
    assert (solution.steps == 40).all()
    assert set(statuses(solution)) == {Status.STEP_LIMIT}


# --- groups


def test_groups_are_coupled_through_the_gram() -> None:
    weight, gram = problem(seed=7)
    gram += 40 * torch.eye(12)
    together = solve_magr(weight, gram, alpha=0.05, group_size=4, max_steps=3000, tol=1e-6)
    rows, _ = optima(weight, gram, 0.05, 4)
    assert torch.allclose(together.weight.double(), rows, atol=2e-2)
    apart = gram * torch.eye(3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    alone = solve_magr(weight, apart, alpha=0.05, group_size=4, max_steps=3000, tol=1e-6)
    assert (together.weight - alone.weight).norm() > 0.1 * weight.norm()


def test_one_group_is_the_whole_row() -> None:
    weight, gram = problem()
    whole = solve_magr(weight, gram, alpha=0.01)
    assert same_bits(whole, solve_magr(weight, gram, alpha=0.01, group_size=12))
    assert not torch.equal(whole.weight, solve_magr(weight, gram, alpha=0.01, group_size=6).weight)


# --- dtypes, layouts, repeatability


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_solved_in_float32_and_judged_as_returned(dtype: torch.dtype) -> None:
    weight, gram = problem(rows=40, seed=8)
    weight = weight.to(dtype)
    solution = solve_magr(weight, gram, alpha=0.01)
    check_promises(solution, weight)
    reference = solve_magr(weight.float(), gram, alpha=0.01)
    assert torch.equal(solution.weight, reference.weight.to(dtype))
    exact = objectives(solution.weight, weight, gram, 0.01)
    assert torch.allclose(solution.objective.double(), exact, rtol=1e-6)
    assert set(statuses(solution)) == {Status.STEP_LIMIT}


def test_a_row_that_rounding_would_make_worse_is_returned_as_it_came() -> None:
    weight, gram = problem(rows=200, seed=9)
    weight = weight.to(torch.bfloat16)
    solution = solve_magr(weight, gram, alpha=3e-4, max_steps=30)
    check_promises(solution, weight)
    cast = solve_magr(weight.float(), gram, alpha=3e-4, max_steps=30).weight.to(torch.bfloat16)
    worse = objectives(cast, weight, gram, 3e-4) > objectives(weight, weight, gram, 3e-4)
    assert 10 < int(worse.sum()) < 190
    assert torch.equal(solution.weight[worse], weight[worse])
    assert torch.equal(solution.weight[~worse], cast[~worse])
    assert set(solution.status[worse].tolist()) == {int(Status.TRIVIAL)}
    assert torch.equal(solution.objective[worse], solution.objective_before[worse])
    assert torch.equal(solution.dual_gap[worse], solution.objective_before[worse])


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_same_bits_twice_and_inputs_untouched(tol: float) -> None:
    weight, gram = problem(rows=20, columns=64, tokens=300)
    kept = weight.clone(), gram.clone()
    first = solve_magr(weight, gram, alpha=0.01, tol=tol)
    assert same_bits(first, solve_magr(weight, gram, alpha=0.01, tol=tol))
    first.weight.zero_()
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])


def test_layout_gradients_and_autocast_change_nothing() -> None:
    weight, gram = problem(rows=12)
    plain = solve_magr(weight, gram, alpha=0.01, group_size=4)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    assert same_bits(plain, solve_magr(strided, gram, alpha=0.01, group_size=4))
    parameter = torch.nn.Parameter(weight.clone())
    learned = solve_magr(parameter, gram, alpha=0.01, group_size=4)
    assert not learned.weight.requires_grad
    assert not isinstance(learned.weight, torch.nn.Parameter)
    assert same_bits(plain, learned)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(plain, solve_magr(weight, gram, alpha=0.01, group_size=4))
    assert same_bits(plain, solve_magr(weight, gram.double(), alpha=0.01, group_size=4))


def test_mirrored_rows_have_mirrored_solutions() -> None:
    weight, gram = problem()
    mirrored = solve_magr(-weight, gram, alpha=0.01)
    assert torch.equal(-mirrored.weight, solve_magr(weight, gram, alpha=0.01).weight)


def test_units_are_the_grams() -> None:
    weight, gram = problem()
    plain = solve_magr(weight, gram, alpha=0.01)
    scaled = solve_magr(weight, 1024 * gram, alpha=0.01)  # a power of two: no rounding
    assert torch.allclose(scaled.weight, plain.weight, rtol=0, atol=1e-5)
    assert torch.allclose(scaled.objective_before, 1024 * plain.objective_before, rtol=1e-5)
    assert torch.allclose(scaled.objective, 1024 * plain.objective, rtol=1e-4)
    assert torch.allclose(scaled.dual_gap, 1024 * plain.dual_gap, rtol=1e-3)


# --- degenerate inputs, all legal


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_zero_gram_leaves_the_weight(tol: float) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, torch.zeros_like(gram), alpha=0.1, tol=tol)
    check_promises(solution, weight)
    assert torch.equal(solution.weight, weight)
    assert solution.weight.data_ptr() != weight.data_ptr()
    assert set(statuses(solution)) == {Status.TRIVIAL}
    assert not solution.steps.any()
    assert not solution.objective.any()


def test_dead_columns_only_follow_the_largest_magnitude() -> None:
    weight, gram = problem(seed=10)
    dead = torch.tensor([1, 6])
    gram[dead], gram[:, dead] = 0, 0
    weight[:, dead] = 9.0
    solution = solve_magr(weight, gram, alpha=0.1, max_steps=3000, tol=1e-5)
    check_promises(solution, weight)
    assert set(statuses(solution)) == {Status.CONVERGED}
    live = torch.tensor([j for j in range(12) if j not in dead])
    peak = solution.weight[:, live].abs().amax(-1)
    # They cost nothing to shrink, so they end no larger than the largest that matters.
    assert (solution.weight[:, dead].abs() <= peak.unsqueeze(-1) + 1e-3).all()
    smaller = solve_magr(weight[:, live], gram[live][:, live], alpha=0.1, max_steps=3000, tol=1e-5)
    assert torch.allclose(solution.objective, smaller.objective, rtol=1e-4)


def test_zero_rows_stay_zero() -> None:
    weight, gram = problem()
    weight[[0, 3]] = 0
    solution = solve_magr(weight, gram, alpha=0.01)
    check_promises(solution, weight)
    assert not solution.weight[[0, 3]].any()
    assert statuses(solution)[0] is statuses(solution)[3] is Status.TRIVIAL
    assert statuses(solution)[1] is Status.STEP_LIMIT
    assert not solution.objective_before[[0, 3]].any()
    assert not solution.dual_gap[[0, 3]].any()


def test_one_row_is_solved_as_it_is_among_others() -> None:
    weight, gram = problem()
    alone = solve_magr(weight[2:3], gram, alpha=0.01)
    among = solve_magr(weight, gram, alpha=0.01)
    assert torch.allclose(alone.weight[0], among.weight[2], rtol=0, atol=1e-5)


def test_one_column_is_soft_thresholding() -> None:
    weight = torch.tensor([[2.0], [-2.0], [0.2], [0.0]])
    solution = solve_magr(weight, torch.tensor([[7.0]]), alpha=0.25, tol=1e-6)
    check_promises(solution, weight)
    assert torch.allclose(solution.weight, torch.tensor([[1.75], [-1.75], [0.0], [0.0]]))
    assert statuses(solution) == [Status.CONVERGED] * 2 + [Status.TRIVIAL] * 2
    # ½·7·0.25² + 0.25·7·1.75 and, at zero, ½·7·0.2²
    assert torch.allclose(solution.objective, torch.tensor([3.28125, 3.28125, 0.14, 0.0]))


def test_identity_gram_is_the_prox() -> None:
    weight, _ = problem()
    solution = solve_magr(weight, torch.eye(12), alpha=2.0, tol=1e-6)
    want = np.stack([oracles.prox_linf(row, 2.0) for row in weight.double().numpy()])
    assert torch.allclose(solution.weight.double(), torch.from_numpy(want), atol=1e-6)
    assert (solution.steps == 10).all()


@pytest.mark.parametrize("alpha", [1e3, 1e30])
def test_huge_alpha_gives_zeros(alpha: float) -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=alpha)
    check_promises(solution, weight)
    assert not solution.weight.any()
    assert set(statuses(solution)) == {Status.TRIVIAL}
    assert (solution.dual_gap <= 1e-6 * solution.objective).all()  # and that is the optimum


def test_tiny_alpha_leaves_the_weight() -> None:
    weight, gram = problem()
    solution = solve_magr(weight, gram, alpha=1e-30)
    check_promises(solution, weight)
    assert torch.equal(solution.weight, weight)
    assert set(statuses(solution)) == {Status.TRIVIAL}


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    weight, gram = problem(columns=24, tokens=tokens, seed=11)
    solution = solve_magr(weight, gram, alpha=0.01, max_steps=1000)
    check_promises(solution, weight)
    before, after = (rows.abs().amax(-1) for rows in (weight, solution.weight))
    assert (after < 0.5 * before).all()
    moved = (solution.weight - weight).double()
    error = ((moved @ gram.double()) * moved).sum() / (
        (weight.double() @ gram.double()) * weight.double()
    ).sum()
    assert error < 0.01


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_scale_of_the_gram_does_not_matter(scale: float) -> None:
    weight, gram = problem(seed=12)
    plain, scaled = (solve_magr(weight, g, alpha=0.01) for g in (gram, gram * scale))
    check_promises(scaled, weight)
    assert torch.allclose(scaled.weight, plain.weight, rtol=0, atol=1e-4)


def test_badly_scaled_activations() -> None:
    weight, gram = problem(seed=13)
    sizes = torch.logspace(-4, 4, 12)
    gram = gram * sizes.unsqueeze(0) * sizes.unsqueeze(1)  # entries from 1e-6 to 1e10
    for group_size in (None, 4):
        solution = solve_magr(weight, gram, alpha=1e-3, group_size=group_size)
        check_promises(solution, weight)
        assert (solution.objective < 0.9999 * solution.objective_before).all()
        exact = objectives(solution.weight, weight, gram, 1e-3, group_size)
        assert torch.allclose(solution.objective.double(), exact, rtol=1e-6)


def test_a_row_that_overflows_its_dtype_fails_and_stays() -> None:
    # The first input is twice the second: both groups' work is cheaper done by the first weight,
    # which then exceeds the largest float16.
    weight = torch.tensor([[6e4, 6e4], [1.0, 1.0]], dtype=torch.float16)
    gram = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    solution = solve_magr(weight, gram, alpha=1e3, group_size=1)
    check_promises(solution, weight)
    assert statuses(solution)[0] is Status.FAILED
    assert torch.equal(solution.weight[0], weight[0])
    assert solution.objective[0] == solution.objective_before[0]
    assert statuses(solution)[1] is Status.TRIVIAL  # huge beside its size: zeros
    assert solve_magr(weight.float(), gram, alpha=1e3, group_size=1).weight[0, 0] > 65504


# --- Solution and Status


def test_summary_counts_rows_by_status() -> None:
    weight, gram = problem(rows=3)
    weight[0] = 0
    solution = solve_magr(weight, gram, alpha=0.01)
    assert solution.summary == "step limit: 2 rows, trivial: 1 row"
    status = torch.tensor([0] * 570 + [1] * 6 + [3], dtype=torch.int8)
    mixed = dataclasses.replace(solution, status=status)
    assert mixed.summary == "converged: 570 rows, step limit: 6 rows, failed: 1 row"


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
        (torch.ones(3), r"2-D floating tensor .* got float32 \[3\]"),
        (torch.ones(2, 3, 4), r"2-D floating tensor .* got float32 \[2, 3, 4\]"),
        (torch.ones(2, 3, dtype=torch.int8), r"2-D floating tensor .* got int8 \[2, 3\]"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), r"16 to 64 bits, got float8_e4m3fn \[2, 3\]"),
        ([[1.0, 2.0, 3.0]], "2-D floating tensor .* got list"),
        (torch.ones(0, 3), r"a row and a column, got float32 \[0, 3\]"),
        (torch.ones(3, 0), r"a row and a column, got float32 \[3, 0\]"),
        (torch.ones(2, 3, device="meta"), "meta device"),
        (torch.tensor([[1.0, math.nan, 1.0]]), "weight has NaN or infinite"),
        (torch.tensor([[1.0, math.inf, 1.0]]), "weight has NaN or infinite"),
    ],
)
def test_bad_weights_are_refused(weight: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        solve_magr(weight, torch.eye(3))


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(4), r"gram must be .* \[3, 3\] for a weight with in = 3, got float32 \[4, 4\]"),
        (torch.ones(3), r"got float32 \[3\]"),
        (torch.ones(3, 4), r"got float32 \[3, 4\]"),
        (torch.eye(3, dtype=torch.int64), r"got int64 \[3, 3\]"),
        ([[1.0]], "got list"),
        (torch.full((3, 3), math.nan), "gram has NaN"),
        (torch.diag(torch.tensor([1.0, math.inf, 1.0])), "gram has NaN, infinite"),
        (torch.full((3, 3), 3e38), "too large"),
        (torch.eye(3, dtype=torch.float64) * 1e300, "too large"),
        (torch.diag(torch.tensor([1.0, -1e-6, 1.0])), "negative diagonal"),
    ],
)
def test_bad_grams_are_refused(gram: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        solve_magr(torch.ones(2, 3), gram)


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
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solve_magr(torch.ones(2, 6), torch.eye(6), **options)
