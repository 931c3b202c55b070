"""torchao's int weight configs that work on any CPU, and what their tensors are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import activations
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from toys import INT

IN = 64  # inputs that every target divides
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def intx(bits: int, mapping: MappingType, group_size: int | None, **options: Any) -> Any:
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    return IntxWeightOnlyConfig(INT[bits], granularity, mapping, **options)


SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
WIDER = MappingType.SYMMETRIC_NO_CLIPPING_ERR

INTX = [
    intx(bits, mapping, group_size)
    for bits in range(1, 9)
    for mapping in (SYMMETRIC, ASYMMETRIC, WIDER)
    for group_size in (None, 16)
    if (bits, mapping) != (1, WIDER)  # its only code above 0 is 0: torchao makes NaN of it
]
ODD_SCALES = [
    intx(4, SYMMETRIC, None, scale_dtype=torch.float16),
    intx(4, ASYMMETRIC, 16, scale_dtype=torch.bfloat16),
    intx(3, SYMMETRIC, None, intx_choose_qparams_algorithm="hqq_scale_only"),
    intx(3, SYMMETRIC, 16, intx_choose_qparams_algorithm="hqq_scale_only"),
]
INT8 = [
    Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False),
    Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False),
]
DYNAMIC = [
    Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    Int8DynamicActivationInt8WeightConfig(reduce_range=True, set_inductor_config=False),
    Int8DynamicActivationIntxWeightConfig(INT[4], PerGroup(16)),
    Int8DynamicActivationIntxWeightConfig(INT[3], PerAxis(0), ASYMMETRIC),
]
ONE_STEP = [
    Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
    Int8DynamicActivationInt8WeightConfig(
        granularity=[PerRow(), PerTensor()], set_inductor_config=False
    ),
]
PACKED = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
# What has whole-number codes with a scale for each row or group, and all that there is.
ON_GRIDS = [*INTX, *ODD_SCALES, *INT8, *DYNAMIC]
ALL = [*ON_GRIDS, *ONE_STEP, PACKED]


def quantized(weight: Tensor, target: Any) -> nn.Linear:
    """A plain nn.Linear without a bias after ``quantize_``; skips where its kernel is missing."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone())
    try:
        quantize_(linear, target)
    except Exception as error:  # whatever a missing kernel raises
        if target is not PACKED:
            raise
        pytest.skip(f"torchao: {error}")
    return linear


@torch.no_grad()
def seen(linear: nn.Linear) -> Tensor:
    """What the layer multiplies with, from what it makes of the identity; float64 [out, in]."""
    identity = torch.eye(linear.weight.shape[1], dtype=linear.weight.dtype)
    outputs: Tensor = linear(identity)
    return outputs.T.double()


def worth(weight: Tensor, target: Any) -> Tensor:
    """What ``quantize_`` makes of a weight, float64."""
    linear = quantized(weight, target)
    if target in DYNAMIC or target in ONE_STEP:  # the identity would be quantized as well
        return linear.weight.dequantize().double()
    return seen(linear)


def weights(rows: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights of very different magnitudes, with an outlier each."""
    made = []
    for at, count in enumerate(rows):
        weight = activations(count, IN, seed=70 + at) / 8
        weight[0, at] = 1.5
        made.append((weight * 4.0**at).to(dtype))
    return made
