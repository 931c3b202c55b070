"""Coordinate descent on codes, against float64 and against trying every code."""

from __future__ import annotations

import itertools

import pytest
import torch
from grid_helpers import energies, float32_slack, make_grid, wide, worth
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_helpers import problem
from torch import Tensor

from magr_fx.rounding.coordinate_descent import descend
from magr_fx.rounding.gptq import compensation, gptq
from magr_fx.rounding.grid import ColumnGrid, Grid

pytestmark = pytest.mark.usefixtures("one_thread")
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def errors(codes: Tensor, weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    return energies(grid.values(codes), weight, gram)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    return grid.nearest(weight).to(torch.int8)


@repeatable
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 20),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_no_pass_raises_an_error(
    rows: int, groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, gram = problem(rows=rows, columns=groups * size, tokens=20, seed=seed)
    weight = weight.to(dtype)
    grid = make_grid(weight, bits, size, symmetric=symmetric)
    draw = torch.Generator().manual_seed(seed)
    anything = torch.randint(
        grid.low, grid.high + 1, weight.shape, generator=draw, dtype=torch.int8
    )
    for start in (nearest(weight, grid), anything):
        before, slack = start, float32_slack(grid.values(start), weight, gram)
        for passes in (1, 2, 3, 8):
            after = descend(start, weight, gram, grid, passes=passes)
            assert after.dtype == torch.int8
            assert after.shape == weight.shape
            assert ((after >= grid.low) & (after <= grid.high)).all()
            now = errors(after, weight, gram, grid)
            assert (now <= errors(before, weight, gram, grid) + slack).all()
            before = after


def plain_pass(codes: Tensor, weight: Tensor, gram: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """One pass in float64, one code at a time; and how close each row came to a tie, in steps."""
    target, full = weight.double(), gram.double()
    scale, zero = wide(grid, weight.shape[1])
    codes, values = codes.double(), worth(grid, codes)
    margin = torch.full((len(weight),), 0.5).double()
    for j in range(weight.shape[1]):
        rest = values - target
        rest[:, j] = 0
        best = (target[:, j] - rest @ full[:, j] / full[j, j]) / scale[:, j]
        margin = torch.minimum(margin, (best - best.floor() - 0.5).abs())
        codes[:, j] = (best.round() + zero[:, j]).clamp(grid.low, grid.high)
        values = worth(grid, codes)
    return codes, margin


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(8, None), (64, 8), (65, 13), (150, 30)])
def test_each_code_takes_its_best_value_in_turn(
    columns: int, group_size: int | None, symmetric: bool, passes: int
) -> None:
    weight, gram = problem(rows=12, columns=columns, tokens=3 * columns + 4)
    grid = make_grid(weight, 3, group_size, symmetric=symmetric)
    start = nearest(weight, grid)
    want, margin = start.double(), torch.ones(12).double()
    for _ in range(passes):
        want, closest = plain_pass(want, weight, gram, grid)
        margin = torch.minimum(margin, closest)
    clear = margin > 2e-4
    assert clear.sum() >= 6
    codes = descend(start, weight, gram, grid, passes=passes)
    assert torch.equal(codes[clear].double(), want[clear])
    assert not torch.equal(codes, start)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("bits", "group_size"), [(2, None), (3, 4), (4, 2)])
def test_afterwards_no_single_change_is_better(
    bits: int, group_size: int | None, seed: int
) -> None:
    weight, gram = problem(rows=4, columns=8, tokens=12, seed=seed)
    grid = make_grid(weight, bits, group_size, symmetric=False)
    codes = descend(nearest(weight, grid), weight, gram, grid, passes=100)
    least = errors(codes, weight, gram, grid)
    for column, code in itertools.product(range(8), range(grid.low, grid.high + 1)):
        other = codes.clone()
        other[:, column] = code
        slack = float32_slack(grid.values(other), weight, gram)
        assert (errors(other, weight, gram, grid) >= least - slack).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("symmetric", [False, True])
def test_between_the_start_and_the_optimum(seed: int, symmetric: bool) -> None:
    weight, gram = problem(rows=1, columns=4, tokens=8, seed=seed)
    grid = make_grid(weight, 2, symmetric=symmetric)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.int8)
    many = grid._replace(scale=grid.scale.expand(256, 1), zero_point=grid.zero_point.expand(256, 1))
    found = errors(every, weight.expand(256, 4), gram, many)
    optimum, slack = every[found.argmin()].unsqueeze(0), float32_slack(weight, 0 * weight, gram)
    after = errors(
        descend(nearest(weight, grid), weight, gram, grid, passes=100), weight, gram, grid
    )
    assert after >= found.min() - slack
    assert after <= errors(nearest(weight, grid), weight, gram, grid) + slack
    stays = descend(optimum, weight, gram, grid, passes=100)
    assert errors(stays, weight, gram, grid) <= found.min() + slack
    # From every code of them all, one leads to the optimum, and none below it.
    reached = errors(
        descend(every, weight.expand(256, 4), gram, many, passes=100),
        weight.expand(256, 4),
        gram,
        many,
    )
    assert (reached >= found.min() - slack).all()
    assert (reached <= found + float32_slack(many.values(every), weight, gram)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 20])
def test_gptqs_codes_become_better(group_size: int | None, dtype: torch.dtype) -> None:
    weight, gram = problem(rows=20, columns=100, tokens=150)
    grid = make_grid(weight.to(dtype), 3, group_size)
    start = gptq(weight, grid, compensation(gram))
    before = errors(start, weight, gram, grid)
    after = errors(descend(start, weight, gram, grid, passes=4), weight, gram, grid)
    assert (after <= before + float32_slack(grid.values(start), weight, gram)).all()
    assert after.mean() < 0.99 * before.mean()


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inputs that are visited, in turn."""
    seen: list[int] = []
    round_one = ColumnGrid.round

    def counted(self: ColumnGrid, column: int, numbers: Tensor, codes: Tensor) -> Tensor:
        seen.append(column)
        return round_one(self, column, numbers, codes)

    monkeypatch.setattr(ColumnGrid, "round", counted)
    return seen


def test_ends_where_a_pass_changes_nothing(visits: list[int]) -> None:
    weight, gram = problem(rows=3, columns=70, tokens=200)
    grid = make_grid(weight, 3)
    settled = descend(nearest(weight, grid), weight, gram, grid, passes=1000)
    assert 2 * 70 <= len(visits) < 50 * 70
    visits.clear()
    assert torch.equal(descend(settled, weight, gram, grid, passes=1000), settled)
    assert visits == list(range(70))


def test_no_more_passes_than_asked_for(visits: list[int]) -> None:
    weight, gram = problem(rows=3, columns=70, tokens=200)
    grid = make_grid(weight, 3)
    start = nearest(weight, grid)
    descend(start, weight, gram, grid, passes=2)
    assert visits == 2 * list(range(70))
    visits.clear()
    assert torch.equal(descend(start, weight, gram, grid, passes=0), start)
    assert visits == []


def test_dead_inputs_stay() -> None:
    weight, gram = problem(rows=6, columns=90, tokens=200)
    dead = torch.zeros(90, dtype=torch.bool)
    dead[[0, 40, 63, 64, 89]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    grid = make_grid(weight, 3)
    start = nearest(weight, grid)
    start[:, dead] = grid.high  # far from what it stands for
    codes = descend(start, weight, gram, grid, passes=5)
    assert (codes[:, dead] == grid.high).all()
    part = descend(start[:, ~dead], weight[:, ~dead], gram[~dead][:, ~dead], grid, passes=5)
    assert torch.equal(codes[:, ~dead], part)
    assert not torch.equal(codes, start)
    assert torch.equal(descend(start, weight, torch.zeros_like(gram), grid, passes=5), start)


def test_no_code_is_left_for_one_that_rounding_makes_worse() -> None:
    """Where values are rounded to bfloat16, the nearest code need not be worth the nearest."""
    grid = Grid(
        torch.full((128, 1), 2.046875, dtype=torch.bfloat16),
        torch.zeros(128, 1),
        low=0,
        high=127,
        dtype=torch.bfloat16,
    )
    codes = torch.arange(128, dtype=torch.int8).unsqueeze(-1)
    values = grid.values(codes)
    moved = 0
    for target in torch.linspace(200, 255, 400):
        weight = target.expand(128, 1)
        after = grid.values(descend(codes, weight, torch.eye(1), grid, passes=1))
        assert ((after - weight).abs() <= (values - weight).abs()).all()
        nearest_one = grid.values(grid.nearest(weight))
        moved += int(((nearest_one - weight).abs() > (values - weight).abs().min()).any())
    assert moved > 0


def test_rows_are_independent() -> None:
    weight, gram = problem(rows=30, columns=100, tokens=300)
    grid = make_grid(weight, 3, 20)
    start = nearest(weight, grid)
    codes = descend(start, weight, gram, grid, passes=3)
    for rows in ([4], [29, 0], list(range(5, 22))):
        part = grid._replace(scale=grid.scale[rows], zero_point=grid.zero_point[rows])
        found = descend(start[rows], weight[rows], gram, part, passes=3)
        assert torch.equal(found, codes[rows])


@pytest.mark.parametrize(("rows", "columns"), [(6, 80), (1, 80), (6, 1)])
def test_nothing_is_changed(rows: int, columns: int) -> None:
    weight, gram = problem(rows=rows, columns=columns, tokens=200)
    grid = make_grid(weight, 3, symmetric=False)
    start = torch.full_like(weight, grid.high, dtype=torch.int8)
    kept = [tensor.clone() for tensor in (start, weight, gram, grid.scale)]
    first = descend(start, weight, gram, grid, passes=3)
    assert all(map(torch.equal, kept, (start, weight, gram, grid.scale)))
    assert not torch.equal(first, start)
    again = descend(start.T.contiguous().T, weight, gram.double(), grid, passes=3)
    assert torch.equal(again, first)
