"""Grids whose zero point is not rounded: against float64, brute force and least squares."""

from __future__ import annotations

import pytest
import torch
from graph_helpers import gram_of
from grid_helpers import energies, float32_slack, worth
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import activations
from torch import Tensor

from magr_fx.rounding.free_grid import fitted_grid, refitted_grid, spanning_grid
from magr_fx.rounding.gptq import compensation, gptq
from magr_fx.rounding.grid import Grid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=50)


def like(rows: int, groups: int, bits: int, dtype: torch.dtype = torch.float32) -> Grid:
    ones = torch.ones(rows, groups, dtype=dtype)
    return Grid(ones, torch.zeros_like(ones), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, dtype)


def levels(grid: Grid) -> Tensor:
    """Every value of each group, ``[out, groups, 2ᵇ]`` float64, as the formula has it."""
    codes = torch.arange(grid.low, grid.high + 1, dtype=torch.float64)
    return (codes - grid.zero_point.double()[..., None]) * grid.scale.double()[..., None]


def loss(grid: Grid, rows: Tensor, energy: Tensor) -> Tensor:
    """Σ energy·(v - w)² of each group for the nearest values, float64 by brute force."""
    grouped = rows.double().view(*grid.scale.shape, -1)
    away = (grouped[..., None] - levels(grid)[..., None, :]).abs().amin(-1)
    return (energy.double().view(grid.scale.shape[1], -1) * away.square()).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_the_ends_are_the_least_and_the_largest_entry(
    bits: int, groups: int, dtype: torch.dtype
) -> None:
    rows = activations(7, 24, seed=bits).to(dtype)
    grid = spanning_grid(rows, like(7, groups, bits, dtype))
    grouped = rows.double().view(7, groups, -1)
    width = grouped.amax(-1) - grouped.amin(-1)
    within = 4 * torch.finfo(dtype).eps * width * 2**bits
    assert ((levels(grid)[..., 0] - grouped.amin(-1)).abs() <= within).all()
    assert ((levels(grid)[..., -1] - grouped.amax(-1)).abs() <= within).all()
    assert grid.zero_point.dtype == grid.scale.dtype == dtype


def test_a_symmetric_row_at_two_bits_uses_all_four_levels() -> None:
    rows = torch.tensor([[0.3, -0.3, 0.1, -0.1]])
    grid = spanning_grid(rows, like(1, 1, 2))
    assert torch.allclose(levels(grid), torch.tensor([-0.3, -0.1, 0.1, 0.3]).double(), atol=1e-7)
    assert torch.allclose(grid.values(grid.nearest(rows)), rows, atol=1e-7)


@pytest.mark.parametrize("constant", [0.0, 0.7, -0.2])
@pytest.mark.parametrize("make", [spanning_grid, fitted_grid])
def test_equal_entries_are_exact(make: object, constant: float) -> None:
    rows, start = torch.full((2, 8), constant), like(2, 2, 3)
    energy = torch.arange(1.0, 9.0)
    grid = spanning_grid(rows, start) if make is spanning_grid else fitted_grid(rows, energy, start)
    assert torch.allclose(grid.values(grid.nearest(rows)), rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_nearest_code_is_the_nearest_of_all(bits: int, dtype: torch.dtype) -> None:
    rows = activations(6, 16, seed=3)
    grid = spanning_grid((0.7 * rows).to(dtype), like(6, 2, bits, dtype))
    grid = grid._replace(zero_point=grid.zero_point + 0.3)
    codes = grid.nearest(rows)
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    away = (worth(grid, codes) - rows.double()).abs().view(6, 2, -1)
    best = (rows.double().view(6, 2, -1)[..., None] - levels(grid)[..., None, :]).abs().amin(-1)
    half_steps = grid.scale.double()[..., None] * 2**bits * 2 * torch.finfo(dtype).eps
    assert (away <= best + half_steps).all()


@repeatable
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]))
def test_fitting_does_not_lose_to_what_it_starts_from(seed: int, bits: int, groups: int) -> None:
    rows = activations(5, 32, seed=seed).sign() * activations(5, 32, seed=seed).abs().pow(1.5)
    energy = activations(1, 32, seed=seed + 1).square().flatten() + 0.01
    found = loss(fitted_grid(rows, energy, like(5, groups, bits)), rows, energy)
    start = spanning_grid(rows, like(5, groups, bits))
    centre = levels(start).mean(-1)
    scale = 0.8 * start.scale
    narrow = start._replace(
        scale=scale, zero_point=((start.low + start.high) / 2 - centre / scale).float()
    )
    assert (found <= loss(narrow, rows, energy) * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_fitting_comes_close_to_the_best_of_a_thousand_grids(bits: int) -> None:
    """Over many rows: alternation finds a local optimum, which may be another for one of them."""
    rows = activations(200, 64, seed=5)
    energy = activations(1, 64, seed=6).square().flatten() + 0.01
    found = loss(fitted_grid(rows, energy, like(200, 1, bits)), rows, energy)
    span = spanning_grid(rows, like(200, 1, bits))
    best = torch.full_like(found, torch.inf)
    for share in torch.linspace(0.3, 1.1, 33):
        for shift in torch.linspace(-1, 1, 33):
            middle = levels(span).mean(-1) + shift * span.scale
            scale = share * span.scale
            zero = (span.low + span.high) / 2 - middle / scale
            other = span._replace(scale=scale, zero_point=zero.float())
            best = torch.minimum(best, loss(other, rows, energy))
    assert float((found / best).median()) < 1.15
    assert float(found.sum() / best.sum()) < 1.2
    assert float(found.sum()) < 0.9 * float(loss(span, rows, energy).sum())


@pytest.mark.parametrize("power", [-20, -3, 7, 20])
def test_scaled_rows_get_the_same_codes(power: int) -> None:
    rows, energy = activations(9, 24, seed=1), activations(1, 24, seed=2).square().flatten() + 0.1
    many = rows * 2.0**power
    for one, other in (
        (spanning_grid(rows, like(9, 2, 2)), spanning_grid(many, like(9, 2, 2))),
        (fitted_grid(rows, energy, like(9, 2, 2)), fitted_grid(many, 4 * energy, like(9, 2, 2))),
    ):
        assert torch.equal(one.scale * 2.0**power, other.scale)
        assert torch.equal(one.zero_point, other.zero_point)
        assert torch.equal(one.nearest(rows), other.nearest(many))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (2, 4), (3, 2), (4, 1)])
def test_refitting_raises_no_error(bits: int, groups: int, dtype: torch.dtype) -> None:
    weight = activations(12, 32, seed=bits)
    gram = gram_of(activations(80, 32, seed=9)).float()
    grid = spanning_grid(weight.to(dtype), like(12, groups, bits, dtype))
    codes = gptq(weight, grid, compensation(gram))
    refitted = refitted_grid(codes, weight, gram, grid)
    before, after = worth(grid, codes), worth(refitted, codes)
    slack = float32_slack(before, weight, gram)
    assert (energies(after, weight, gram) <= energies(before, weight, gram) + slack).all()
    assert float(energies(after, weight, gram).sum()) < float(energies(before, weight, gram).sum())
    assert refitted.scale.dtype == refitted.zero_point.dtype == dtype
    assert (refitted.scale > 0).all()


def test_refitting_whole_rows_solves_the_least_squares_problem() -> None:
    """min over (s, c) of ‖X(s·q + c - w)‖, by NumPy's lstsq on X itself."""
    inputs = activations(90, 24, seed=4)
    weight, gram = activations(8, 24, seed=5), gram_of(inputs).float()
    grid = spanning_grid(weight, like(8, 1, 3))
    codes = grid.nearest(weight).to(torch.int8)
    found = refitted_grid(codes, weight, gram, grid)
    for row in range(8):
        x, q = inputs.double(), codes[row].double()
        sides = torch.stack([x @ q, x.sum(1)], 1)
        solution = torch.linalg.lstsq(sides, (x @ weight[row].double())[:, None]).solution.flatten()
        assert float(found.scale[row]) == pytest.approx(float(solution[0]), rel=1e-3)
        offset = -float(found.scale[row] * found.zero_point[row])
        assert offset == pytest.approx(float(solution[1]), abs=1e-3 * float(found.scale[row]))


def test_refitting_leaves_its_arguments_and_what_cannot_be_fitted() -> None:
    weight, gram = activations(3, 8, seed=1), gram_of(activations(30, 8, seed=2)).float()
    grid = spanning_grid(weight, like(3, 1, 2))
    codes = grid.nearest(weight).to(torch.int8)
    codes[1] = 1  # one code for all: its scale is free, and stays
    kept = [t.clone() for t in (codes, weight, gram, grid.scale, grid.zero_point)]
    found = refitted_grid(codes, weight, gram, grid)
    after = (codes, weight, gram, grid.scale, grid.zero_point)
    assert all(map(torch.equal, kept, after))
    assert found.scale[1] == grid.scale[1]
    assert bool(found.zero_point.isfinite().all())


def test_what_no_input_reaches_is_fitted_alike() -> None:
    """A group of dead inputs, and a gram of zeros, have a finite grid too."""
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    like = Grid(torch.ones(6, 2), torch.zeros(6, 2), -2, 1, torch.float32)
    energy = torch.ones(32)
    energy[:16] = 0
    whole, dead = (fitted_grid(rows, numbers, like) for numbers in (torch.ones(32), energy))
    torch.testing.assert_close(dead.scale, whole.scale)
    torch.testing.assert_close(dead.zero_point, whole.zero_point)
    none = fitted_grid(rows, torch.zeros(32), like)
    torch.testing.assert_close(none.scale, whole.scale)
