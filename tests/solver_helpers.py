"""Small MagR problems, the oracles' answers to them, and what every solution promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracles
import torch
from torch import Tensor

from magr_fx.grams.gram import largest_eigenvalue
from magr_fx.iterations.certificate import Problem
from magr_fx.iterations.solution import Solution, Status


def problem(
    rows: int = 6, columns: int = 12, tokens: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight, and a gram of correlated whole-number inputs, which float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(-4, 5, (tokens, columns), generator=generator)
    inputs += torch.randint(-4, 5, (tokens, 1), generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, (inputs.T @ inputs).float()


def batch(
    problems: int = 3, rows: int = 4, columns: int = 12, tokens: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """As many problems, one unlike the other."""
    found = [problem(rows, columns, tokens, seed=100 * seed + i) for i in range(problems)]
    weights, grams = zip(*found, strict=True)
    return torch.stack(weights), torch.stack([gram * 4.0**i for i, gram in enumerate(grams)])


def setting(gram: Tensor, alpha: float, group_size: int | None = None) -> Problem:
    """The problem as the parts of the solver see it."""
    return Problem(gram, largest_eigenvalue(gram), alpha, group_size or gram.shape[-1])


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


def optima(
    weight: Tensor, gram: Tensor, alpha: float, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The optimal rows and their objectives, by the oracle."""
    size = group_size or weight.shape[1]
    matrix, price = gram.double().numpy(), penalty(gram, alpha)
    found = [oracles.optimum(w, matrix, price, size) for w in weight.double().numpy()]
    rows, values = zip(*found, strict=True)
    return torch.from_numpy(np.stack(rows)), torch.tensor(values, dtype=torch.float64)


def statuses(solution: Solution) -> list[Status]:
    return [Status(value) for value in solution.status.flatten().tolist()]


def same_bits(one: Solution, other: Solution) -> bool:
    return all(
        torch.equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(Solution)
    )


def check_promises(solution: Solution, weight: Tensor) -> None:
    """What holds for every solution, whatever went in."""
    rows = weight.shape[:-1]
    assert solution.weight.shape == weight.shape
    assert solution.weight.dtype == weight.dtype
    assert solution.weight.isfinite().all()
    assert solution.status.dtype == torch.int8
    assert solution.steps.dtype == torch.int32
    assert solution.status.shape == solution.steps.shape == rows
    for values in (solution.objective_before, solution.objective, solution.dual_gap):
        assert values.dtype == torch.float32
        assert values.shape == rows
        assert values.isfinite().all()
        assert (values >= 0).all()
    assert (solution.objective <= solution.objective_before).all()
    assert (solution.dual_gap <= solution.objective).all()
