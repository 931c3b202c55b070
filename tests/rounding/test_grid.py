"""Grids of quantized weights, against torchao bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid_helpers import make_grid, wide, worth
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import activations
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from magr_fx.passes.handover.torchao_rounding import dequantized, grid_of, has_grid, quantized_copy
from magr_fx.rounding.grid import Grid

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
CODES = {n: getattr(torch, f"int{n}") for n in (2, 3, 4, 8)}


def intx(bits: int, granularity: Any, mapping: MappingType) -> AOBaseConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=CODES[bits], granularity=granularity, mapping_type=mapping
    )


TARGETS = {
    f"int{bits} {granularity} {mapping.name}": intx(bits, granularity, mapping)
    for bits in CODES
    for granularity in (PerAxis(0), PerGroup(32))
    for mapping in (MappingType.ASYMMETRIC, MappingType.SYMMETRIC)
} | {
    "Int8WeightOnly": Int8WeightOnlyConfig(),
    "Int8WeightOnly PerGroup 32": Int8WeightOnlyConfig(granularity=PerGroup(32)),
}


def some_weight(dtype: torch.dtype) -> Tensor:
    """Rows of several sizes, one of zeros, one that is positive only, and one with an outlier."""
    weight = activations(7, 96) * torch.logspace(-2, 1, 7).unsqueeze(-1)
    weight[1] = 0
    weight[2] = weight[2].abs() + 1
    weight[3, 5] = -30.0
    return weight.to(dtype)


@dtypes
@pytest.mark.parametrize("name", TARGETS)
def test_values_are_torchaos(name: str, dtype: torch.dtype) -> None:
    tensor: Any = quantized_copy(some_weight(dtype), TARGETS[name])
    assert has_grid(tensor)
    grid = grid_of(tensor)
    assert grid.scale.shape == (7, 96 // 32 if "32" in name else 1)
    assert grid.dtype == dtype
    values = grid.values(tensor.qdata)
    assert values.dtype == torch.float32
    assert torch.equal(values, tensor.dequantize().to(torch.float32))
    assert torch.equal(values, dequantized(tensor))


@dtypes
@pytest.mark.parametrize("name", TARGETS)
def test_every_code_is_worth_what_torchao_says(name: str, dtype: torch.dtype) -> None:
    tensor: Any = quantized_copy(some_weight(dtype), TARGETS[name])
    grid = grid_of(tensor)
    assert int(tensor.qdata.min()) >= grid.low
    assert int(tensor.qdata.max()) <= grid.high
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(grid.low, grid.high + 1, (7, 96), generator=draw, dtype=torch.int8)
    codes[:, 0], codes[:, 1] = grid.low, grid.high
    values = grid.values(codes)
    tensor.qdata.copy_(codes)
    assert torch.equal(values, tensor.dequantize().to(torch.float32))
    assert torch.equal(grid.values(codes.float()), values)


@dtypes
@pytest.mark.parametrize("name", TARGETS)
def test_nearest_is_what_torchao_rounds_to(name: str, dtype: torch.dtype) -> None:
    """But for ties: torchao divides in the weight's dtype."""
    weight = some_weight(dtype)
    tensor: Any = quantized_copy(weight, TARGETS[name])
    grid = grid_of(tensor)
    codes = grid.nearest(weight)
    scale, zero = wide(grid, 96)
    position = weight.double() / scale
    rounding = 2 * torch.finfo(dtype).eps * (position.abs() + 1)
    apart = (position - position.floor() - 0.5).abs() > rounding
    assert apart.float().mean() > (0.9 if dtype == torch.float32 else 0.1)
    assert torch.equal(codes[apart], tensor.qdata.float()[apart])
    assert ((codes - tensor.qdata).abs() <= 1 + rounding).all()
    # And in float64: no code within the range lies closer.
    chosen = (codes.double() - zero - position).abs()
    for change in (-1, 1):
        other = (codes.double() + change).clamp(grid.low, grid.high)
        assert (chosen <= (other - zero - position).abs() + 1e-6 * (position.abs() + 1)).all()


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A grid and rows for it, some of which lie beyond its ends."""
    rows, groups, size = (draw(st.integers(1, 4)) for _ in range(3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**16))
    weight = activations(rows, groups * size, seed=seed).to(dtype)
    grid = make_grid(weight, draw(st.integers(2, 8)), size, symmetric=draw(st.booleans()))
    if draw(st.booleans()):  # torchao keeps the steps of some weights in float32
        grid = grid._replace(scale=grid.scale.float() * 1.001)
    return grid, 1.5 * activations(rows, groups * size, seed=seed + 1)


@repeatable
@given(case=grids())
def test_columns_are_rounded_as_rows_are(case: tuple[Grid, Tensor]) -> None:
    grid, rows = case
    columns = rows.shape[1]
    codes = grid.nearest(rows)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, codes.round())
    assert ((codes >= grid.low) & (codes <= grid.high)).all()
    values = grid.values(codes)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    shuffled = grid.by_column(columns).permuted(order)
    for at, column in enumerate(order.tolist()):
        for steps, place in ((grid.by_column(columns), column), (shuffled, at)):
            code = torch.empty(len(rows))
            value = steps.round(place, rows[:, column], code)
            assert torch.equal(code, codes[:, column])
            assert torch.equal(value, values[:, column])
            assert value.dtype == torch.float32


@repeatable
@given(case=grids())
def test_values_in_float64(case: tuple[Grid, Tensor]) -> None:
    grid, rows = case
    codes = grid.nearest(rows)
    torch.testing.assert_close(
        grid.values(codes).double(),
        worth(grid, codes),
        rtol=torch.finfo(grid.dtype).eps,
        atol=0,
    )


@repeatable
@given(case=grids())
def test_memory_layout_does_not_matter(case: tuple[Grid, Tensor]) -> None:
    grid, rows = case
    transposed = rows.T.contiguous().T
    codes = grid.nearest(rows)
    assert torch.equal(grid.nearest(transposed), codes)
    assert torch.equal(grid.values(codes.T.contiguous().T), grid.values(codes))


def test_values_by_hand() -> None:
    scale = torch.tensor([[0.5, 2.0]])
    grid = Grid(scale, torch.tensor([[1, -2]], dtype=torch.int8), -2, 1, torch.float32)
    rows = torch.tensor([[-0.6, 9.0, 5.1, -9.0]])
    codes = grid.nearest(rows)
    assert codes.tolist() == [[0, 1, 1, -2]]
    assert grid.values(codes).tolist() == [[-0.5, 0.0, 6.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [2, 4])
def test_one_input_at_a_time_is_rounded_as_all_at_once(
    bits: int, groups: int, free: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits)
    rows, columns = 7, 12
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.randn(rows, columns, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5).to(dtype)
    zero = torch.rand(rows, groups, generator=generator) * 2 - 1
    grid = Grid(scale, zero.to(dtype) if free else zero.round().to(torch.int8), low, high, dtype)
    wanted = grid.values(grid.nearest(weight))
    by_column = grid.by_column(columns)
    steps = scale.float().repeat_interleave(columns // groups, 1)
    for column in range(columns):
        codes = torch.empty(rows)
        found = by_column.round(column, weight[:, column].clone(), codes)
        assert codes.min() >= low
        assert codes.max() <= high
        assert torch.equal(codes, codes.round())
        # Two codes may be nearly as near: the distances count, in steps.
        distances = [(one - weight[:, column]).abs() / steps[:, column]
                     for one in (found, wanted[:, column])]  # fmt: skip
        slack = 1e-5 if dtype == torch.float32 else 0.05
        assert (distances[0] - distances[1]).abs().max() <= slack
        full = torch.zeros(rows, columns)
        full[:, column] = codes
        torch.testing.assert_close(found, grid.values(full)[:, column], rtol=1e-6, atol=1e-6)
