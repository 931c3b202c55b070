"""GPTQ, against its definition: round one input, solve for all the others, in float64."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from grid_helpers import energies, make_grid, wide, worth
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_helpers import problem
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.rounding.gptq import BLOCK, Compensation, compensation, gptq
from magr_fx.rounding.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
# Rows whose every number stays so far from a tie, in steps, have the same codes on all processors.
TIE = 2e-4
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def inverse_of(found: Compensation) -> Tensor:
    """UᵀU in float64."""
    return found.factor.double().T @ found.factor.double()


# --- compensation


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 12, 90])
def test_factor_of_the_inverse(columns: int, by_activation: bool) -> None:
    _, gram = problem(columns=columns, tokens=4 * columns)
    kept = gram.clone()
    found = compensation(gram, by_activation=by_activation)
    assert torch.equal(gram, kept)
    assert found.factor.dtype == torch.float32
    assert torch.equal(found.factor, found.factor.triu())
    assert (found.factor.diagonal() > 0).all()
    assert sorted(found.order.tolist()) == list(range(columns))
    want = torch.linalg.inv(gram.double()[found.order][:, found.order])
    assert (inverse_of(found) - want).abs().max() < 1e-4 * want.abs().max()


def test_order() -> None:
    energy = torch.tensor([3.0, 7.0, 1.0, 7.0, 0.0, 9.0])
    assert compensation(torch.diag(energy)).order.tolist() == [0, 1, 2, 3, 4, 5]
    found = compensation(torch.diag(energy), by_activation=True)
    assert found.order.tolist() == [5, 1, 3, 0, 2, 4]  # ties in the order of the weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_gram_of_any_dtype_is_taken_in_float32(dtype: torch.dtype) -> None:
    _, gram = problem()
    found = compensation((gram / 16).to(dtype))
    assert found.factor.dtype == torch.float32
    assert torch.equal(found.factor, compensation((gram / 16).to(dtype).float()).factor)


@pytest.mark.parametrize("by_activation", [False, True])
def test_dead_inputs_take_part_in_nothing(by_activation: bool) -> None:
    weight, gram = problem(columns=12)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[0, 5, 11]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    found = compensation(gram, by_activation=by_activation)
    off = found.factor - torch.diag(found.factor.diagonal())
    at = dead[found.order]
    assert (off[at] == 0).all()
    assert (off[:, at] == 0).all()
    alive = compensation(gram[~dead][:, ~dead], by_activation=by_activation)
    close = 1e-5 * alive.factor.abs().max()
    assert torch.allclose(found.factor[~at][:, ~at], alive.factor, rtol=0, atol=float(close))
    grid = make_grid(weight, 3)
    codes = gptq(weight, grid, found)
    assert torch.equal(codes[:, dead].float(), grid.nearest(weight)[:, dead])
    rest, whole = weight[:, ~dead], gram[~dead][:, ~dead]
    want, margin = by_definition(rest, grid, whole, alive.order.tolist())
    clear = margin > TIE
    assert clear.sum() >= 4
    assert torch.equal(codes[clear][:, ~dead].double(), want[clear])


def test_a_gram_of_zeros_rounds_to_the_nearest() -> None:
    weight, gram = problem()
    grid = make_grid(weight, 3)
    codes = gptq(weight, grid, compensation(torch.zeros_like(gram)))
    assert torch.equal(codes.float(), grid.nearest(weight))


@pytest.mark.parametrize("tokens", [1, 5, 30, 39])
def test_rank_deficient_grams_are_damped_a_little(tokens: int) -> None:
    """How little is up to the last bits of the gram, and so is what becomes of one problem.

    That a factorisation of size n exists is certain from a damping of n(n + 1) roundings on
    (Higham, "Accuracy and Stability of Numerical Algorithms", theorem 10.7): here 1e-4, so the
    first share beyond it is the most that any order of summation can take.
    """
    to_definition, to_nearest = [], []
    for seed in range(15):
        weight, gram = problem(rows=50, columns=40, tokens=tokens, seed=seed)
        found = compensation(gram)
        unit = gram.double().diagonal().mean()
        taken = 1 / (torch.linalg.matrix_norm(inverse_of(found), 2) * unit)
        assert taken < 1.1e-3
        grid = make_grid(weight, 3)
        ours = energies(grid.values(gptq(weight, grid, found)), weight, gram).mean()
        little = gram.double() + 1e-5 * unit * torch.eye(40)
        best, _ = by_definition(weight, grid, little, found.order.tolist())
        to_definition.append(float(ours / energies(worth(grid, best), weight, gram).mean()))
        nearest = energies(grid.values(grid.nearest(weight)), weight, gram).mean()
        to_nearest.append(float(ours / nearest))
    assert median(to_definition) < 1.25
    assert median(to_nearest) < 0.5


def test_only_as_much_damping_as_it_takes() -> None:
    """An eigenvalue of -1e-4 in units of the mean diagonal takes a share of 1e-3."""
    gram = torch.eye(8) - (1 + 1e-4) * torch.ones(8, 8) / 8
    found = compensation(gram)
    unit = float(gram.diagonal().mean())
    want = torch.linalg.inv(gram.double() + 1e-3 * unit * torch.eye(8))
    assert (inverse_of(found) - want).abs().max() < 1e-2 * want.abs().max()


def test_a_regular_gram_is_not_damped() -> None:
    # So well conditioned that the last share of the diagonal would show.
    gram = torch.eye(6) + 0.5
    assert (inverse_of(compensation(gram)) - torch.linalg.inv(gram.double())).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_grams_of_any_scale(scale: float) -> None:
    weight, gram = problem(columns=16, tokens=6)
    grid = make_grid(weight, 3)
    codes = gptq(weight, grid, compensation(gram))
    power = 2.0 ** round(torch.tensor(scale).log2().item())
    scaled = compensation(gram * power)
    assert scaled.factor.isfinite().all()
    assert (gptq(weight, grid, scaled) == codes).float().mean() > 0.95


@pytest.mark.parametrize(
    "gram",
    [
        -torch.eye(4),
        torch.eye(4) - 3.0 * torch.ones(4, 4) / 4,
        torch.tensor([[0.0, 2.0], [2.0, 0.0]]),
        torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.5])),
        torch.tensor([[1.0, 2.5], [2.5, 1.0]]),
    ],
)
def test_an_indefinite_gram_is_refused(gram: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"not positive semidefinite.*pass XᵀX"):
        compensation(gram)


# --- gptq


def by_definition(
    weight: Tensor, grid: Grid, gram: Tensor, order: list[int]
) -> tuple[Tensor, Tensor]:
    """Codes, and how close each row came to a tie, in steps.

    In the given order each input is rounded to the nearest on its grid; after each the rest is
    the exact minimiser of (v - w)ᵀG(v - w) with what has been rounded so far held.
    """
    original, full = weight.double(), gram.double()
    scale, zero = wide(grid, weight.shape[1])
    codes, margin = torch.zeros_like(original), torch.full((len(weight),), 0.5).double()
    current, away = original.clone(), torch.zeros_like(original)
    for at, j in enumerate(order):
        done, rest = order[: at + 1], order[at + 1 :]
        position = current[:, j] / scale[:, j]
        inside = (position + zero[:, j] > grid.low - 0.5) & (position + zero[:, j] < grid.high)
        tie = (position - position.floor() - 0.5).abs()
        margin = torch.where(inside, torch.minimum(margin, tie), margin)
        codes[:, j] = (position.round() + zero[:, j]).clamp(grid.low, grid.high)
        away[:, j] = worth(grid, codes)[:, j] - original[:, j]
        if rest:
            pull = away[:, done] @ full[done][:, rest]
            moved = torch.linalg.solve(full[rest][:, rest], pull.T).T
            current[:, rest] = original[:, rest] - moved
    return codes, margin


def check_definition(weight: Tensor, grid: Grid, gram: Tensor, found: Compensation) -> int:
    """Compare the rows that come close to no tie; returns how many those are."""
    codes = gptq(weight, grid, found)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert codes.is_contiguous()
    want, margin = by_definition(weight, grid, gram, found.order.tolist())
    clear = margin > TIE
    assert torch.equal(codes[clear].double(), want[clear])
    return int(clear.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(150, None), (150, 30), (64, 16), (65, 5)])
def test_gptq_by_definition(
    columns: int, group_size: int | None, symmetric: bool, by_activation: bool, dtype: torch.dtype
) -> None:
    weight, gram = problem(rows=10, columns=columns, tokens=4 * columns)
    weight = weight.to(dtype)
    grid = make_grid(weight, 3, group_size, symmetric=symmetric)
    found = compensation(gram, by_activation=by_activation)
    assert check_definition(weight, grid, gram, found) >= 6


@repeatable
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 8),
    bits=st.integers(2, 5),
    symmetric=st.booleans(),
    by_activation=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gptq_by_definition_in_any_shape(
    rows: int, groups: int, size: int, bits: int, symmetric: bool, by_activation: bool, seed: int
) -> None:
    columns = groups * size
    weight, gram = problem(rows=rows, columns=columns, tokens=3 * columns + 8, seed=seed)
    grid = make_grid(weight, bits, size, symmetric=symmetric)
    check_definition(weight, grid, gram, compensation(gram, by_activation=by_activation))


def test_gptq_by_hand() -> None:
    """One input is rounded down by 0.4; the other, its copy but for a little, takes that up."""
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), -4, 3, torch.float32)
    codes = gptq(torch.tensor([[1.4, 1.3]]), grid, compensation(gram))
    assert codes.tolist() == [[1, 2]]  # 1.3 + 0.9·0.4 = 1.66


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("group_size", [None, 10])
def test_uncorrelated_inputs_are_rounded_to_the_nearest(
    group_size: int | None, by_activation: bool
) -> None:
    weight, _ = problem(columns=2 * BLOCK + 12)
    energy = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1
    grid = make_grid(weight, 3, group_size, symmetric=False)
    codes = gptq(weight, grid, compensation(torch.diag(energy), by_activation=by_activation))
    assert torch.equal(codes.float(), grid.nearest(weight))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("columns", [12, 100])
def test_better_than_nearest_on_average(columns: int, by_activation: bool, bits: int) -> None:
    weight, gram = problem(rows=40, columns=columns, tokens=3 * columns)
    grid = make_grid(weight, bits)
    codes = gptq(weight, grid, compensation(gram, by_activation=by_activation))
    ours = energies(grid.values(codes), weight, gram)
    nearest = energies(grid.values(grid.nearest(weight)), weight, gram)
    assert ours.mean() < 0.9 * nearest.mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_stay_within_the_range(bits: int, symmetric: bool) -> None:
    weight, gram = problem(rows=20, columns=70, tokens=30)
    grid = make_grid(0.3 * weight, bits, symmetric=symmetric)  # too narrow: many are clamped
    codes = gptq(weight, grid, compensation(gram))
    assert int(codes.min()) == grid.low
    assert int(codes.max()) == grid.high


def test_rows_are_independent() -> None:
    weight, gram = problem(rows=30, columns=100, tokens=300)
    found = compensation(gram, by_activation=True)
    grid = make_grid(weight, 3, 20)
    codes = gptq(weight, grid, found)
    for rows in ([4], [29, 0], list(range(5, 22))):
        part = grid._replace(scale=grid.scale[rows], zero_point=grid.zero_point[rows])
        assert torch.equal(gptq(weight[rows], part, found), codes[rows])


def test_nothing_is_changed() -> None:
    weight, gram = problem(columns=80, tokens=200)
    found, grid = compensation(gram), make_grid(weight, 3)
    kept = [tensor.clone() for tensor in (weight, *found, grid.scale, grid.zero_point)]
    first = gptq(weight, grid, found)
    after = (weight, *found, grid.scale, grid.zero_point)
    assert all(map(torch.equal, kept, after))
    assert torch.equal(gptq(weight.T.contiguous().T, grid, found), first)


def test_the_default_dtype_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 16, generator=generator), torch.randn(40, 16, generator=generator)
    grid, spread = make_grid(weight, 3), compensation(x.T @ x + torch.eye(16))
    wanted = spread.factor.clone(), gptq([weight], grid, spread)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = compensation(x.T @ x + torch.eye(16, dtype=torch.float32))
        codes = gptq([weight], grid, again)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(again.factor, wanted[0])
    assert torch.equal(codes, wanted[1])
