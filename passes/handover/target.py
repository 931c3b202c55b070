"""What a torchao config quantizes by: rows or groups; and its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, MappingType
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

from magr_fx.config import QuantizeOptions
from magr_fx.errors import ConfigError
from magr_fx.passes.handover.torchao_rounding import GPTQ_CONFIGS
from magr_fx.rounding.row_pieces import MULTIPLE

# Name of the config → the field with the weight's granularity. By name, because some of these
# classes are torchao prototypes, which are slow to import or missing in other releases.
_GRANULARITY_FIELD = {
    "IntxWeightOnlyConfig": "granularity",
    "Int8WeightOnlyConfig": "granularity",
    "Int4WeightOnlyConfig": "group_size",
    "PrototypeInt4WeightOnlyConfig": "group_size",
    "UIntxWeightOnlyConfig": "group_size",
    "Int8DynamicActivationIntxWeightConfig": "weight_granularity",
    "Int8DynamicActivationInt8WeightConfig": "granularity",
    "Int8DynamicActivationInt4WeightConfig": "group_size",
    "Int8DynamicActivationUIntxWeightConfig": "group_size",
}
# One scale for each row of a weight [out, in], or one for all rows.
_WHOLE_ROWS = (None, PerAxis(0), PerRow(-1), PerRow(1), PerTensor())


# These make IntxUnpackedToInt8Tensor, whose zero points may be of a floating dtype.
_FLOAT_ZERO_POINTS = ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig")

# Algorithms for scales and zero points that look at one row, or one group, at a time.
_BY_ROW = ("affine", "tinygemm", "min_max")

DESCRIBED = 4  # entries of FqnToConfig that a message names

# From 5 bits on it makes no difference whether a level is unused.
_FEW_BITS = {torch.int2: 2, torch.int3: 3, torch.int4: 4}  # type: ignore[attr-defined]

# The torchao config by the name of a weight.
ConfigOf = Callable[[str], AOBaseConfig]


@dataclass(frozen=True)
class Target:
    """The torchao config that will quantize the weights, and how they are prepared for it."""

    config: AOBaseConfig
    options: QuantizeOptions
    free_zero_points: bool = False  # whether zero points need not be whole numbers
    direct: bool = False  # whether torchao's tensors are made directly in any case

    @property
    def makes_tensors(self) -> bool:
        """Whether torchao's tensors are made directly, so that no weight is rewritten.

        torchao itself rounds to nearest, and zero points to whole numbers.
        """
        return self.options.rounding == "gptq" or self.free_zero_points or self.direct

    def config_of(self, name: str) -> AOBaseConfig:
        """The config of a weight: the same for all."""
        del name
        return self.config


def has_free_zero_points(zero_point: str | None, target: AOBaseConfig) -> bool:
    """Whether zero points need not be whole, by ``MagRConfig.zero_point`` and the target.

    Raises:
        ConfigError: ``zero_point`` is "free", but torchao's tensors cannot hold such a zero point.
    """
    if zero_point == "whole":
        return False
    fields = fields_of(target)
    holds = type(target).__name__ in _FLOAT_ZERO_POINTS and _is_unpacked(fields)
    if zero_point == "free":
        if not holds:
            raise ConfigError(
                f'zero_point="free" does not work with {describe(target)}, whose tensors hold '
                f"whole zero points only. Leave it out, or use {_FLOAT_ZERO_POINTS[0]} or "
                f"{_FLOAT_ZERO_POINTS[1]}, unpacked"
            )
        if not rows_are_independent(target):
            raise ConfigError(
                f'zero_point="free" fits scales to the rows, and {describe(target)} asks for an '
                "algorithm of its own: leave one of the two out"
            )
        return True
    mapping = fields.get("mapping_type", fields.get("weight_mapping_type"))
    bits = fields.get("weight_dtype")
    by_range = rows_are_independent(target)  # an algorithm for scales was not asked for
    return holds and by_range and mapping == MappingType.ASYMMETRIC and bits != torch.int8


def _is_unpacked(fields: dict[str, Any]) -> bool:
    """Whether a config makes IntxUnpackedToInt8Tensor, which is what its default is called."""
    found = [value for name, value in fields.items() if name.endswith("packing_format")]
    words = [str(value.value if isinstance(value, Enum) else value) for value in found]
    return all(word.startswith("unpacked") for word in words)


def target_group_size(target: AOBaseConfig) -> int | None:
    """Inputs per quantization group of a torchao config; None where it quantizes whole rows.

    Raises:
        ConfigError: ``target`` is not a torchao config for integer weights (weight-only, or with
            dynamic activations), or quantizes by something else than rows or groups of inputs.
    """
    kind = type(target).__name__
    name = _GRANULARITY_FIELD.get(kind)
    if name is None or not isinstance(target, AOBaseConfig):
        raise ConfigError(
            f"target must be a torchao config that quantizes weights to integers "
            f"({', '.join(_GRANULARITY_FIELD)}), got "
            f"{kind if isinstance(target, AOBaseConfig) else repr(target)}. Give an instance, such "
            "as IntxWeightOnlyConfig(weight_dtype=torch.int4). magr_quantize also takes an "
            "FqnToConfig of several; magr_transform is run once for each, with a filter_fn"
        )
    granularity = getattr(target, name)
    if isinstance(granularity, (list, tuple)):  # (activation, weight)
        granularity = granularity[1]
    if granularity in _WHOLE_ROWS:
        return None
    group_size = granularity.group_size if isinstance(granularity, PerGroup) else granularity
    if isinstance(group_size, int):
        return group_size
    raise ConfigError(
        "target must quantize weights by rows or by groups of inputs, got "
        f"{describe(target)}; choose another granularity"
    )


def shares_one_step(target: AOBaseConfig) -> bool:
    """Whether all rows of a weight share one scale."""
    granularity = getattr(target, _GRANULARITY_FIELD[type(target).__name__])
    if isinstance(granularity, (list, tuple)):
        granularity = granularity[1]
    return isinstance(granularity, PerTensor)


def rows_are_independent(target: AOBaseConfig) -> bool:
    """Whether each row is quantized independently of the other rows of its weight."""
    return not shares_one_step(target) and not any(
        _couples_rows(name, value) for name, value in fields_of(target).items()
    )


def _couples_rows(name: str, value: Any) -> bool:
    """Whether a field of a config selects an algorithm for scales that looks at all rows at once.

    HQQ does: it stops when the error of the whole weight no longer falls. Algorithms that are not
    known may look at all rows too, and count as if they did.
    """
    chosen = str(value.value if isinstance(value, Enum) else value).lower()
    if name.endswith("choose_qparams_algorithm"):
        return chosen not in _BY_ROW
    return "hqq" in chosen or ("hqq" in name.lower() and bool(value))


def fields_of(target: AOBaseConfig) -> dict[str, Any]:
    """Every field of a config with its value, including those with their default value."""
    return {field.name: getattr(target, field.name) for field in fields(target)}


def shorter_side(target: AOBaseConfig) -> float | None:
    """Of a grid with a whole zero point and all levels in use, the shorter side by the longer.

    For b bits (2ᵇ⁻¹ - 1)/2ᵇ⁻¹, such as ½ of -2, -1, 0 and 1. A row of the range ±t has a grid
    of this kind only if it is clipped to it: torchao's own zero point leaves one level unused. None
    for other configs, symmetric ones, 1 bit, and from 5 bits on, where it makes no difference.
    """
    by_name = fields_of(target)
    bits = _FEW_BITS.get(by_name.get("weight_dtype"))
    mapping = by_name.get("mapping_type", by_name.get("weight_mapping_type"))
    if mapping != MappingType.ASYMMETRIC or bits is None:
        return None
    return 1 - 2.0 ** (1 - bits)


def row_multiple(target: AOBaseConfig) -> int:
    """The number of rows at whose multiples stacked weights may be cut into parts.

    Some tensors are packed for a kernel in panels of rows, such as 16 rows of
    PrototypeInt4WeightOnlyConfig on a CPU, and a cut must not go through a panel. Every weight of
    a stack consists of whole panels, and each multiple of
    :data:`magr_fx.rounding.row_pieces.MULTIPLE` is a boundary of panels.
    """
    return 1 if type(target).__name__ in GPTQ_CONFIGS else MULTIPLE


def describe(target: AOBaseConfig) -> str:
    """A config in brief: its class and the fields that differ from the defaults.

    For messages only: defaults differ between releases of torchao, so no code may rely on it.
    """
    if isinstance(target, FqnToConfig):
        said = [f"{key}: {describe(c) if c else c}" for key, c in target.fqn_to_config.items()]
        rest = [f"{len(said) - DESCRIBED} more"] if len(said) > DESCRIBED else []
        return f"FqnToConfig({', '.join(said[:DESCRIBED] + rest)})"
    usual = vars(type(target)())
    changed = [
        f"{name}={value if isinstance(value, Enum) else repr(value)}"
        for name, value in vars(target).items()
        if value != usual.get(name)
    ]
    return f"{type(target).__name__}({', '.join(changed)})"


def described_in_full(target: AOBaseConfig) -> str:
    """All fields of a config: two descriptions are equal only if the configs are."""
    said = ", ".join(f"{name}={value!r}" for name, value in fields_of(target).items())
    return f"{type(target).__module__}.{type(target).__qualname__}({said})"
