"""Costs and sizes of each unit's choices → the choices with the least cost within a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from magr_fx.errors import ConfigError
from magr_fx.machine.quiet import stdout_of_c_silenced

# Budgets of many units with close costs can take long to prove: the bound is then told.
SECONDS = 60.0


class Option(NamedTuple):
    """One choice of a unit: what it costs in quality, and the bits that it takes."""

    cost: float
    size: int


class Allocation(NamedTuple):
    """The chosen option of each unit.

    Attributes:
        chosen: indices into the units' options.
        cost: the sum of their costs.
        bound: no choice within the size costs less; equal to ``cost`` up to the solver's tolerance
            if the optimum was proved.
        size: the sum of their sizes.
    """

    chosen: list[int]
    cost: float
    bound: float
    size: int


def allocate(units: Sequence[Sequence[Option]], limit: int) -> Allocation:
    """Choose one option for each unit, with the least sum of costs and sizes up to ``limit``.

    This is the multiple-choice knapsack problem: minimise Σᵤ cost[u, cᵤ] subject to
    Σᵤ size[u, cᵤ] ≤ limit. It is solved to the optimum by HiGHS (Huangfu and Hall, Math. Prog.
    Comp. 10, 2018), through ``scipy.optimize.milp``.

    Args:
        units: each with at least one option; costs are finite.
        limit: what all may take together.

    Raises:
        ConfigError: the smallest options take more than ``limit``; or scipy is not installed.
    """
    least = sum(min(option.size for option in options) for options in units)
    if least > limit:
        raise ConfigError(f"the smallest choices take {least} bits together, more than {limit}")
    most = sum(max(option.size for option in options) for options in units)
    cheapest = [min(range(len(o)), key=lambda at, o=o: (o[at].cost, o[at].size)) for o in units]  # type: ignore[misc]
    if sum(o[at].size for o, at in zip(units, cheapest, strict=True)) <= min(limit, most):
        return _allocation(units, cheapest, -math.inf)
    chosen, bound = _solved(units, limit)
    return _allocation(units, chosen, bound)


def _solved(units: Sequence[Sequence[Option]], limit: int) -> tuple[list[int], float]:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ConfigError(
            "a Budget needs scipy: install it with pip install 'magr-fx[budget]'"
        ) from error
    counts = [len(options) for options in units]
    costs = np.array([option.cost for options in units for option in options], dtype=np.float64)
    # Small whole numbers, and costs about 1: the solver's tolerances are absolute.
    least = [min(option.size for option in options) for options in units]
    sizes = [o.size - small for options, small in zip(units, least, strict=True) for o in options]
    limit -= sum(least)
    step = math.gcd(*sizes)
    scale = float(np.abs(costs).max()) / max(1, len(units)) or 1.0
    owner = np.repeat(np.arange(len(units)), counts)
    columns = np.arange(len(sizes))
    one_each = csr_array((np.ones(len(sizes)), (owner, columns)), shape=(len(units), len(sizes)))
    within = np.array([[size // step for size in sizes]], dtype=np.float64)
    with stdout_of_c_silenced():  # HiGHS prints there when it repairs a solution
        result = milp(
            costs / scale,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(within, -np.inf, limit // step),
            ],
            integrality=np.ones(len(sizes)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
    if result.x is None:
        raise ConfigError(f"no choice within the budget was found: {result.message}")
    starts = np.cumsum([0, *counts[:-1]])
    chosen = [
        int(np.argmax(result.x[start : start + n])) for start, n in zip(starts, counts, strict=True)
    ]
    return chosen, float(result.mip_dual_bound) * scale


def _allocation(units: Sequence[Sequence[Option]], chosen: list[int], bound: float) -> Allocation:
    picked = [options[at] for options, at in zip(units, chosen, strict=True)]
    cost = math.fsum(option.cost for option in picked)
    if bound == -math.inf:  # each unit has its best option
        bound = cost
    return Allocation(chosen, cost, bound, sum(option.size for option in picked))
