"""The authors' iteration: parity with their published code, and when it stops."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from solver_helpers import check_promises, problem, setting, statuses
from torch import Tensor

from magr_fx.iterations.pgd import FIXED_PASSES, pgd
from magr_fx.iterations.solution import Solution, Status
from magr_fx.solver.solver import solve_magr

PUBLISHED = Path(__file__).parents[1] / "data" / "magr_published_code.safetensors"
PARITY = 1e-5
with safe_open(PUBLISHED, "pt") as stored:
    CASES = {name: json.loads(options) for name, options in sorted(stored.metadata().items())}

pytestmark = pytest.mark.usefixtures("one_thread")


def solve(weight: Tensor, gram: Tensor, **options: Any) -> Solution:
    return solve_magr(weight, gram, solver="pgd", **options)


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
    solution = solve(
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
def test_a_batch_of_problems_matches_the_published_code(name: str) -> None:
    gram, weight, expected = load_case(name)
    options = CASES[name]
    solution = solve(
        torch.stack([weight, weight.flip(0)]),
        torch.stack([gram, gram * 4]),
        alpha=options["alpha"],
        group_size=options["group_size"],
        max_steps=options["steps"],
    )
    assert relative(solution.weight[0], expected) < PARITY
    assert relative(solution.weight[1], expected.flip(0)) < PARITY
    assert (solution.steps == options["steps"]).all()


@pytest.mark.parametrize("name", CASES)
def test_fixed_passes_match_the_published_code(name: str) -> None:
    """The mode without host checks, which other devices than a CPU use."""
    gram, weight, expected = load_case(name)
    options = CASES[name]
    fixed, exact = (
        pgd(
            setting(gram, options["alpha"], options["group_size"]),
            weight,
            max_steps=options["steps"],
            tol=0.0,
            passes=passes,
        ).weight
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
    solution = solve(
        weight.cuda(),
        gram,
        alpha=options["alpha"],
        group_size=options["group_size"],
        max_steps=options["steps"],
    )
    assert {getattr(solution, f.name).device.type for f in dataclasses.fields(Solution)} == {"cuda"}
    assert relative(solution.weight.cpu(), expected) < PARITY


def test_defaults_are_the_authors() -> None:
    weight, gram = problem()
    assert torch.equal(
        solve(weight, gram).weight, solve(weight, gram, alpha=1e-3, max_steps=200, tol=0).weight
    )


def test_more_steps_never_cost() -> None:
    for tokens in (40, 5):
        weight, gram = problem(rows=4, tokens=tokens, seed=1)
        totals = [
            float(solve(weight, gram, alpha=0.05, max_steps=steps).objective.sum())
            for steps in (1, 3, 10, 50, 200)
        ]
        assert all(later <= sooner * (1 + 1e-6) for sooner, later in pairwise(totals))
        assert totals[-1] < 0.99 * totals[0]


# --- stopping


def test_tol_stops_each_row_by_itself() -> None:
    weight, gram = problem(rows=30, seed=6)
    weight[7] = 0
    solution = solve(weight, gram, alpha=0.1, max_steps=3000, tol=1e-4)
    check_promises(solution, weight)
    assert len(set(solution.steps.tolist())) > 3
    assert ((solution.steps % 10 == 0) & (solution.steps < 3000)).all()
    assert statuses(solution)[7] is Status.TRIVIAL
    assert statuses(solution).count(Status.CONVERGED) == 29
    assert (solution.dual_gap <= 1e-4 * solution.objective).all()
    # Every row is where that many steps alone would have left it, and not certified earlier.
    for row in range(0, 30, 5):
        steps = int(solution.steps[row])
        alone = solve(weight[row : row + 1], gram, alpha=0.1, max_steps=steps)
        assert torch.allclose(alone.weight[0], solution.weight[row], rtol=0, atol=1e-5)
        if steps > 10:
            earlier = solve(weight[row : row + 1], gram, alpha=0.1, max_steps=steps - 10)
            assert float(earlier.dual_gap) > 0.99e-4 * float(earlier.objective)


def test_tol_leaves_the_rest_at_the_limit() -> None:
    weight, gram = problem(rows=30, seed=6)
    whole = solve(weight, gram, alpha=0.1, max_steps=3000, tol=1e-4)
    limit = int(whole.steps.median()) + 5
    solution = solve(weight, gram, alpha=0.1, max_steps=limit, tol=1e-4)
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
    solution = solve(weight, torch.eye(12), alpha=0.1, max_steps=3, tol=1e-3)
    assert (solution.steps == 3).all()
    assert set(statuses(solution)) == {Status.CONVERGED}


def test_without_tol_all_steps_are_taken() -> None:
    weight, _ = problem()
    solution = solve(weight, torch.eye(12), alpha=0.1, max_steps=40)
    assert (solution.steps == 40).all()
    assert set(statuses(solution)) == {Status.STEP_LIMIT}


def test_identity_gram_is_done_at_the_first_look() -> None:
    weight, _ = problem()
    assert (solve(weight, torch.eye(12), alpha=2.0, tol=1e-6).steps == 10).all()
