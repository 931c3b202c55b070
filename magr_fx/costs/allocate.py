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
        bound: no choice within the size costs less, up to the solver's tolerance; equal to
            ``cost`` if the optimum was proved, which takes no more than :data:`SECONDS` mostly.
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
    cheapest = [min(range(len(o)), key=lambda at, o=o: (o[at].cost, o[at].size)) for o in units]  # type: ignore[misc]
    if sum(o[at].size for o, at in zip(units, cheapest, strict=True)) <= limit:
        return _allocation(units, cheapest, math.inf)
    chosen, bound = _solved(units, limit)
    if not chosen:  # no time was left to find any
        chosen = _greedy(units, limit)
    return _allocation(units, chosen, bound)


def _greedy(units: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """From the smallest options on, always the step that is worth most for its size."""
    chosen = [min(range(len(o)), key=lambda at, o=o: (o[at].size, o[at].cost)) for o in units]  # type: ignore[misc]
    left = limit - sum(o[at].size for o, at in zip(units, chosen, strict=True))
    while True:
        steps = [
            ((o[now].cost - option.cost) / (option.size - o[now].size), unit, at)
            for unit, (o, now) in enumerate(zip(units, chosen, strict=True))
            for at, option in enumerate(o)
            if option.cost < o[now].cost and 0 < option.size - o[now].size <= left
        ]
        if not steps:
            return chosen
        _, unit, at = max(steps)
        left -= units[unit][at].size - units[unit][chosen[unit]].size
        chosen[unit] = at


def _solved(units: Sequence[Sequence[Option]], limit: int) -> tuple[list[int], float]:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ConfigError(
            "a Budget needs scipy: install it with pip install 'magr-fx[budget]'"
        ) from error
    counts = [len(options) for options in units]
    # Small whole numbers, and differences of costs about 1: the solver's tolerances are absolute.
    best = [min(option.cost for option in options) for options in units]
    costs = np.array(
        [o.cost - low for options, low in zip(units, best, strict=True) for o in options],
        dtype=np.float64,
    )
    least = [min(option.size for option in options) for options in units]
    sizes = [o.size - small for options, small in zip(units, least, strict=True) for o in options]
    limit -= sum(least)
    step = math.gcd(*sizes)
    scale = float(np.median(costs[costs > 0])) if bool((costs > 0).any()) else 1.0
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
    bound = math.fsum(best)
    if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
        bound += max(0.0, float(result.mip_dual_bound) * scale)
    if result.x is None:
        return [], bound
    starts = np.cumsum([0, *counts[:-1]])
    chosen = [
        int(np.argmax(result.x[start : start + n])) for start, n in zip(starts, counts, strict=True)
    ]
    return chosen, bound


def _allocation(units: Sequence[Sequence[Option]], chosen: list[int], bound: float) -> Allocation:
    picked = [options[at] for options, at in zip(units, chosen, strict=True)]
    cost = math.fsum(option.cost for option in picked)
    return Allocation(chosen, cost, min(bound, cost), sum(option.size for option in picked))
