"""The knapsack's optimum against all of its combinations."""

from __future__ import annotations

import builtins
import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magr_fx import ConfigError
from magr_fx.costs.allocate import Option, allocate

OPTION = st.builds(
    Option, st.floats(0, 1e3).map(lambda x: round(x, 6)), st.integers(1, 40).map(lambda n: n * 96)
)
UNITS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=6)


def best(units: list[list[Option]], limit: int) -> float:
    costs = [
        math.fsum(option.cost for option in picked)
        for picked in itertools.product(*units)
        if sum(option.size for option in picked) <= limit
    ]
    return min(costs)


@settings(max_examples=60, deadline=None)
@given(UNITS, st.floats(0, 1.2))
def test_no_combination_is_better(units: list[list[Option]], share: float) -> None:
    least, most = (sum(pick(o.size for o in u) for u in units) for pick in (min, max))
    limit = int(least + share * (most - least))
    found = allocate(units, limit)
    wanted = best(units, limit)
    assert found.size <= limit
    assert found.cost == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert found.bound <= found.cost * (1 + 1e-6) + 1e-9
    assert found.size == sum(u[at].size for u, at in zip(units, found.chosen, strict=True))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_the_costs_makes_no_difference(scale: float) -> None:
    units = [
        [Option(scale * c / (at + 1), s * 1152 * 64) for c, s in ((9.0, 2), (3.0, 3), (1.0, 4))]
        for at in range(40)
    ]
    limit = int(2.7 * 40) * 1152 * 64
    chosen = allocate(units, limit).chosen
    assert chosen == allocate([[Option(o.cost / scale, o.size) for o in u] for u in units],
                              limit).chosen  # fmt: skip
    assert chosen == sorted(chosen, reverse=True)  # the units with larger costs get more


@settings(max_examples=40, deadline=None)
@given(UNITS, st.floats(0.1, 0.9), st.sampled_from([1e-6, 1e3, 1e6]))
def test_one_unit_of_another_size(units: list[list[Option]], share: float, factor: float) -> None:
    units = [[Option(o.cost * factor, o.size) for o in units[0]], *units[1:]]
    least, most = (sum(pick(o.size for o in u) for u in units) for pick in (min, max))
    limit = int(least + share * (most - least))
    found, wanted = allocate(units, limit), best(units, limit)
    smallest = min(o.cost for u in units[1:] for o in u) if units[1:] else 0.0
    assert found.cost <= wanted * (1 + 1e-5) + 1e-5 * smallest
    assert found.bound <= wanted * (1 + 1e-5) + 1e-9


def test_no_time_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    units = [
        [Option(chance.random() / size, size * chance.randint(900, 1100)) for size in (2, 3, 4)]
        for _ in range(400)
    ]
    limit = int(1.3 * sum(u[0].size for u in units))
    wanted = allocate(units, limit)
    monkeypatch.setattr("magr_fx.costs.allocate.SECONDS", 0.0)
    found = allocate(units, limit)
    assert found.size <= limit
    assert wanted.cost * (1 - 1e-9) <= found.cost <= 1.05 * wanted.cost
    assert found.bound <= wanted.cost * (1 + 1e-9)


def test_within_the_limit_to_the_bit() -> None:
    units = [[Option(1.0, 10**9), Option(0.0, 2 * 10**9 + 1)] for _ in range(3)]
    assert allocate(units, 4 * 10**9).chosen == [0, 0, 0]
    assert sum(allocate(units, 4 * 10**9 + 1).chosen) == 1


def test_too_small_a_limit_and_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [[Option(1.0, 4), Option(0.5, 6)], [Option(1.0, 4), Option(0.5, 6)]]
    with pytest.raises(ConfigError, match="take 8 bits together, more than 7"):
        allocate(units, 7)
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'magr-fx\[budget\]'"):
        allocate(units, 10)
    assert allocate(units, 12).chosen == [1, 1]  # there is nothing to solve
