"""What a weight takes in a packed file: codes, scales and zero points."""

from __future__ import annotations

from typing import Any

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import MappingType

from magr_fx.errors import ConfigError
from magr_fx.passes.handover.target import describe, fields_of, shares_one_step, target_group_size
from magr_fx.passes.handover.torchao_rounding import GPTQ_CONFIGS

_BITS = {getattr(torch, f"int{bits}"): bits for bits in range(1, 9)}


def code_bits(config: AOBaseConfig) -> int:
    """The bits of a code.

    Raises:
        ConfigError: this is no config whose codes can be set.
    """
    if type(config).__name__ not in GPTQ_CONFIGS:
        raise ConfigError(
            f"a Budget chooses among {', '.join(GPTQ_CONFIGS)}, got {describe(config)}"
        )
    return _BITS[fields_of(config).get("weight_dtype", torch.int8)]


def stored_bits(
    shape: tuple[int, int], config: AOBaseConfig, dtype: torch.dtype, *, free: bool
) -> int:
    """The bits that a weight ``[out, in]`` takes when its codes are packed.

    Args:
        shape: of the weight.
        config: torchao's.
        dtype: of the weight, which is that of the scales where the config does not say another.
        free: whether zero points are not rounded; they then take as many bits as a scale.
    """
    rows, inputs = shape
    bits, fields = code_bits(config), fields_of(config)
    scales = rows * (inputs // (target_group_size(config) or inputs))
    if shares_one_step(config):
        scales = 1
    by_field: Any = fields.get("scale_dtype", fields.get("weight_scale_dtype"))
    of_scale = 8 * (by_field or dtype).itemsize
    mapping = fields.get("mapping_type", fields.get("weight_mapping_type", MappingType.SYMMETRIC))
    of_zero = 0 if mapping != MappingType.ASYMMETRIC else of_scale if free else bits
    return rows * inputs * bits + scales * (of_scale + of_zero)
