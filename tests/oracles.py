"""Slow, plain float64 answers: sorting instead of Newton, SLSQP and NNLS instead of a prox."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

Array = NDArray[np.float64]


def soft_level(magnitude: Array, amount: float) -> float:
    """The level τ with Σ(magnitude - τ)₊ = amount, by sorting and a cumulative sum."""
    if magnitude.sum() <= amount:
        return 0.0
    falling = np.sort(magnitude)[::-1]
    levels = (np.cumsum(falling) - amount) / np.arange(1, len(falling) + 1)
    # The largest support whose own level still lies below its smallest member.
    support = np.flatnonzero(falling >= levels)[-1]
    return float(max(levels[support], 0.0))


def weighted_level(magnitude: Array, metric: Array, amount: float) -> float:
    """The level τ with Σp(magnitude - τ)₊ = amount, by sorting and two cumulative sums."""
    if (metric * magnitude).sum() <= amount:
        return 0.0
    order = np.argsort(-magnitude, kind="stable")
    falling, weights = magnitude[order], metric[order]
    levels = (np.cumsum(weights * falling) - amount) / np.cumsum(weights)
    # The largest entry always counts, even where p·v/p rounds to above v.
    support = np.flatnonzero(np.append(True, falling[1:] >= levels[1:]))[-1]
    return float(max(levels[support], 0.0))


def prox_linf(row: Array, scale: float) -> Array:
    """The prox of scale·‖·‖∞ at one row."""
    level = soft_level(np.abs(row), scale)
    return np.clip(row, -level, level)


def project_l1_ball(row: Array, radius: float) -> Array:
    """The projection of one row onto the l1 ball."""
    level = soft_level(np.abs(row), radius)
    return np.sign(row) * np.maximum(np.abs(row) - level, 0.0)


def objective(row: Array, weight: Array, gram: Array, penalty: float, group_size: int) -> float:
    """½(row - weight)ᵀG(row - weight) + penalty·Σ‖row_group‖∞."""
    moved = row - weight
    largest = np.abs(row.reshape(-1, group_size)).max(1).sum()
    return float(0.5 * moved @ gram @ moved + penalty * largest)


def optimum(weight: Array, gram: Array, penalty: float, group_size: int) -> tuple[Array, float]:
    """A minimiser of :func:`objective` and its value, from the problem in epigraph form.

    The largest magnitude of every group becomes a variable t of its own, bounded by
    -t ≤ ŵ_j ≤ t, which leaves a smooth quadratic program for SLSQP. The answer is checked
    against the optimality conditions, so that a test cannot lean on a failed solve.
    """
    columns = len(weight)
    groups = columns // group_size
    member = np.kron(np.eye(groups), np.ones((group_size, 1)))  # [in, groups]
    sides = np.block([[-np.eye(columns), member], [np.eye(columns), member]])
    unit = penalty  # SLSQP's tolerance is absolute

    def value(z: Array) -> float:
        moved = z[:columns] - weight
        return float(0.5 * moved @ gram @ moved + penalty * z[columns:].sum()) / unit

    def slope(z: Array) -> Array:
        moved = z[:columns] - weight
        return np.concatenate([gram @ moved, np.full(groups, penalty)]) / unit

    constraint: dict[str, Any] = {
        "type": "ineq",
        "fun": lambda z: sides @ z,
        "jac": lambda z: sides,
    }
    point = np.concatenate([weight, np.abs(weight.reshape(-1, group_size)).max(1)])
    for last in (False, False, False, True):
        found = minimize(
            value,
            point,
            jac=slope,
            constraints=[constraint],
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-14},
        )
        point = found.x
        row = np.asarray(point[:columns], dtype=np.float64)
        try:
            check_optimal(row, weight, gram, penalty, group_size)
            break
        except AssertionError:  # its model of the curvature was spoilt: it begins anew from here
            if last:
                raise
    return row, objective(row, weight, gram, penalty, group_size)


def optimum_by_vertices(weight: Array, gram: Array, penalty: float, group_size: int) -> float:
    """The value of :func:`optimum`, by another way: non-negative least squares over vertices.

    Every group is a non-negative combination of the corners of the box [-1, 1]ⁿ, and the sum of
    the coefficients is then its largest magnitude. With X from the eigenvectors of the gram this
    leaves min ½‖XVλ - Xw‖² + penalty·Σλ over λ ≥ 0. One more equation, tiny on its left side and
    large on its right one, brings in the linear term. For groups of a few inputs only.
    """
    columns = len(weight)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=group_size))).T
    vertices = np.kron(np.eye(columns // group_size), corners)  # [in, groups·2ⁿ]
    values, vectors = np.linalg.eigh(gram / penalty)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    tiny = 1e-5
    left = np.vstack([root @ vertices, np.full(vertices.shape[1], tiny)])
    found, _ = nnls(left, np.append(root @ weight, -1 / tiny))
    return objective(vertices @ found, weight, gram, penalty, group_size)


def check_optimal(
    row: Array, weight: Array, gram: Array, penalty: float, group_size: int, within: float = 1e-5
) -> None:
    """The optimality conditions: -G(row - weight) is a subgradient of penalty·‖·‖∞ per group."""
    pull = -(gram @ (row - weight)).reshape(-1, group_size)
    groups = row.reshape(-1, group_size)
    slack = within * penalty
    if not (np.abs(pull).sum(1) <= penalty + slack).all():
        raise AssertionError("infeasible dual: not converged")
    largest = np.abs(groups).max(1)
    if not np.allclose(
        (pull * groups).sum(1), penalty * largest, rtol=0, atol=slack * (1 + np.abs(weight).max())
    ):
        raise AssertionError("no complementary slackness: not converged")
