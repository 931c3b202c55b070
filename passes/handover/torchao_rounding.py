"""torchao's quantization of a weight: its values, its grid, and tensors with other codes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, Int8Tensor, IntxUnpackedToInt8Tensor, quantize_
from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS

from magr_fx.rounding.grid import Grid, stacked

# Tensors with the values (qdata - zero_point)·scale, by row or by group, stored without packing.
GridTensor = (IntxUnpackedToInt8Tensor, Int8Tensor)
PARTS = ("qdata", "scale", "zero_point")
# The configs that produce such tensors.
GPTQ_CONFIGS = (
    "IntxWeightOnlyConfig",
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
)


def quantized_copy(weight: Tensor, target: AOBaseConfig) -> Tensor:
    """A copy of a weight, quantized by torchao's ``quantize_``.

    A weight ``[out, in]`` is quantized as that of an nn.Linear, a stack ``[experts, out, in]`` as a
    parameter by its name.
    """
    if weight.dim() > 2:
        holder = nn.Module()
        holder.stack = nn.Parameter(weight.detach().clone(), requires_grad=False)
        quantize_(holder, FqnToConfig(OrderedDict(stack=target)), filter_fn=None)
        return holder.stack
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if getattr(target, "set_inductor_config", False):  # it changes global settings
        target = replace(target, set_inductor_config=False)
    quantize_(linear, target)
    quantized = linear.weight
    # torchao makes the module refer to itself, so it would hold the copy until Python's garbage
    # collector runs.
    del linear.weight
    return quantized


class TorchaoRounding:
    """torchao's rounding of weights that are stacked because they share an input.

    Each weight is quantized separately, as in the final model.

    Args:
        target: the torchao config.
        rows: how many rows each weight has.
    """

    def __init__(self, target: AOBaseConfig, rows: Sequence[int]) -> None:
        self.target, self.rows = target, list(rows)

    def tensors(self, weight: Tensor) -> list[Tensor]:
        """torchao's tensor of each of the stacked weights ``[out, in]``."""
        return [quantized_copy(part, self.target) for part in torch.split(weight, self.rows)]

    def values(self, weight: Tensor) -> Tensor:
        """The dequantized weights, ``[out, in]`` float32."""
        return torch.cat([dequantized(tensor) for tensor in self.tensors(weight)])

    def grid(self, weight: Tensor) -> Grid:
        """The grid that torchao chooses; :func:`has_grid` must hold for its tensors."""
        return stacked([grid_of(tensor) for tensor in self.tensors(weight)])

    def on_grid(self, weight: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        """torchao's tensors with other codes, scales and zero points, each ``[out, ...]``.

        Args:
            weight: ``[out, in]``, from which all other fields of the tensors are made.
            parts: codes ``[out, in]``, scales and zero points ``[out, groups]``.
        """
        tensors = self.tensors(weight)
        for tensor, *new in zip(tensors, *(torch.split(p, self.rows) for p in parts), strict=True):
            if new[-1].is_floating_point():
                with_float_zero_point(tensor)
            for name, numbers in zip(PARTS, new, strict=True):
                stored = getattr(tensor, name)
                if stored is not None:
                    stored.copy_(numbers)
        return tensors


def with_float_zero_point(tensor: Tensor) -> None:
    """Give a torchao tensor room for zero points that are not whole, in its own dtype."""
    if isinstance(tensor, IntxUnpackedToInt8Tensor):
        tensor.zero_point = tensor.zero_point.to(tensor.scale.dtype)


def dequantized(tensor: Tensor) -> Tensor:
    """The values ``[out, in]`` of a torchao tensor, float32."""
    try:
        values = tensor.dequantize()
    except NotImplementedError:  # packed: only its kernel can read it
        identity = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
        values = functional.linear(identity, tensor).T
    return values.to(torch.float32)


def has_grid(tensor: Tensor) -> bool:
    """Whether :func:`grid_of` can read the tensor, and so GPTQ's codes can replace its own."""
    return isinstance(tensor, GridTensor) and len(tensor.scale) == len(tensor)  # not PerTensor


def grid_of(tensor: Tensor) -> Grid:
    """The grid of a torchao tensor for which :func:`has_grid` holds."""
    stored: Any = tensor
    scale, zero = stored.scale, stored.zero_point
    if isinstance(tensor, IntxUnpackedToInt8Tensor):
        low, high = _DTYPE_TO_QVALUE_BOUNDS[tensor.target_dtype]
    else:
        low, high = _DTYPE_TO_QVALUE_BOUNDS[torch.int8]
        if getattr(tensor, "reduce_range", False):
            low, high = low // 2, high // 2
    zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
    return Grid(scale, zero, low, high, tensor.dtype)
