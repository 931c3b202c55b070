"""torchao's rounding: what a quantized layer really multiplies with, and codes on its grids."""

from __future__ import annotations

from typing import Any

import pytest
import targets
import torch
from targets import ALL, DTYPES, DYNAMIC, INT8, ON_GRIDS, ONE_STEP, PACKED
from tiny_models import activations
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
from torchao.utils import TorchAOBaseTensor

from magr_fx.passes.handover.target import describe, shares_one_step
from magr_fx.passes.handover.torchao_rounding import (
    GPTQ_CONFIGS,
    TorchaoRounding,
    dequantized,
    grid_of,
    has_grid,
)
from magr_fx.rounding.grid import stacked

ROWS = (16, 32, 16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on(target: Any, dtype: torch.dtype) -> tuple[TorchaoRounding, Tensor]:
    """The rounding of three stacked weights, and their stack."""
    parts = targets.weights(ROWS, dtype)
    for part in parts:
        targets.quantized(part, target)  # skips where torchao cannot
    return TorchaoRounding(target, ROWS), torch.cat(parts)


@every_dtype
@pytest.mark.parametrize("target", ALL, ids=describe)
def test_values_are_what_each_layer_multiplies_with(target: Any, dtype: torch.dtype) -> None:
    torchao, weight = on(target, dtype)
    values = torchao.values(weight)
    assert (values.dtype, values.shape) == (torch.float32, weight.shape)
    wanted = torch.cat([targets.worth(part, target) for part in torch.split(weight, list(ROWS))])
    assert torch.equal(values.double(), wanted)


@pytest.mark.parametrize("target", [*DYNAMIC, *ONE_STEP, PACKED], ids=describe)
def test_values_give_the_layers_outputs(target: Any) -> None:
    """Where the inputs are quantized as well, or the codes cannot be read: on real inputs."""
    (weight,) = targets.weights((48,))
    linear = targets.quantized(weight, target)
    values = TorchaoRounding(target, [48]).values(weight)
    x = activations(50, targets.IN, seed=5)
    with torch.no_grad():
        outputs, lossless = linear(x), x @ weight.T
    assert (outputs - x @ values.T).norm() < 0.02 * outputs.norm()
    assert (outputs - x @ values.T).norm() < 0.9 * (outputs - lossless).norm()


@pytest.mark.parametrize("target", ONE_STEP, ids=describe)
def test_stacked_weights_have_a_step_each(target: Any) -> None:
    torchao, weight = on(target, torch.float32)
    as_one = TorchaoRounding(target, [sum(ROWS)]).values(weight)
    apart = torchao.values(weight)
    smallest, largest = slice(0, ROWS[0]), slice(ROWS[0] + ROWS[1], None)
    assert not torch.equal(apart[smallest], as_one[smallest])
    assert torch.equal(apart[largest], as_one[largest])  # whose step they share in one
    assert shares_one_step(target)


def test_only_those_with_one_step_share_it() -> None:
    assert [target for target in ALL if shares_one_step(target)] == ONE_STEP


@every_dtype
@pytest.mark.parametrize("target", ON_GRIDS, ids=describe)
def test_other_codes_on_the_grid_are_worth_what_the_grid_says(
    target: Any, dtype: torch.dtype
) -> None:
    torchao, weight = on(target, dtype)
    tensors = torchao.tensors(weight)
    assert all(has_grid(tensor) for tensor in tensors)
    own = stacked([grid_of(tensor) for tensor in tensors])
    own_codes = torch.cat([tensor.qdata for tensor in tensors])  # type: ignore[attr-defined]
    assert torch.equal(own.values(own_codes), torchao.values(weight))
    assert own.low <= int(own_codes.min()) <= int(own_codes.max()) <= own.high

    grid = torchao.grid(weight.flip(1) * 0.7)  # of other weights
    assert not torch.equal(grid.scale, own.scale)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(grid.low, grid.high + 1, weight.shape, generator=generator)
    codes = codes.to(torch.int8)
    made = torchao.on_grid(weight, (codes, grid.scale, grid.zero_point))
    wanted = grid.values(codes)
    for tensor, before, part in zip(made, tensors, torch.split(wanted, list(ROWS)), strict=True):
        assert type(tensor) is type(before)
        assert tensor.__tensor_flatten__()[1] == before.__tensor_flatten__()[1]  # type: ignore[attr-defined]
        assert torch.equal(tensor.dequantize().float(), part)
        assert torch.equal(dequantized(tensor), part)
        if target not in DYNAMIC:
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(tensor, requires_grad=False)
            assert torch.equal(targets.seen(linear), part.double())
    again = stacked([grid_of(tensor) for tensor in made])
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.zero_point, grid.zero_point)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_grid_has_two_to_the_bits_codes(bits: int) -> None:
    for mapping in (targets.SYMMETRIC, targets.ASYMMETRIC):
        torchao, weight = on(targets.intx(bits, mapping, 16), torch.float32)
        grid = torchao.grid(weight)
        assert (grid.low, grid.high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert grid.scale.shape == (sum(ROWS), targets.IN // 16)


@pytest.mark.parametrize("target", [*INT8, *DYNAMIC[:2]], ids=describe)
def test_a_reduced_range_has_half_the_codes(target: Any) -> None:
    torchao, weight = on(target, torch.float32)
    grid, (tensor, *_) = torchao.grid(weight), torchao.tensors(weight)
    half = 2 if getattr(target, "reduce_range", False) else 1
    assert (grid.low, grid.high) == (-128 // half, 127 // half)
    largest = int(tensor.qdata.abs().max())  # type: ignore[attr-defined]
    assert grid.high // 2 < largest <= -grid.low


def test_making_tensors_leaves_the_weight_alone() -> None:
    torchao, weight = on(targets.INTX[8], torch.float32)
    kept, grid = weight.clone(), torchao.grid(weight)
    torchao.on_grid(weight, (torch.zeros_like(weight).char(), grid.scale, grid.zero_point))
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("target", ALL, ids=describe)
def test_a_grid_is_where_every_row_has_codes_and_a_scale(target: Any) -> None:
    (weight,) = targets.weights((48,))
    tensor = targets.quantized(weight, target).weight
    assert isinstance(tensor, TorchAOBaseTensor)
    plain = type(tensor) in (IntxUnpackedToInt8Tensor, Int8Tensor)
    assert has_grid(tensor) == (plain and target not in ONE_STEP) == (target in ON_GRIDS)
    assert has_grid(tensor) <= (type(target).__name__ in GPTQ_CONFIGS)


def test_a_plain_tensor_has_no_grid() -> None:
    assert not has_grid(targets.weights((4,))[0])
