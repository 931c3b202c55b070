"""torchao's tensors in the format "pack-quantized" of compressed-tensors: b bits for each weight.

torchao's tensors of this kind hold a byte for each weight, whatever the bits. The codes are packed
by compressed-tensors itself, an optional dependency.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchao.quantization import MappingType

from magr_fx.errors import ConfigError, ModelError
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.handover.target import ConfigOf, target_group_size
from magr_fx.passes.handover.torchao_rounding import grid_of, has_grid

logger = logging.getLogger("magr_fx")

# The bits of which vLLM's and SGLang's kernels for this format take zero points
# (WNA16_ZP_SUPPORTED_TYPES_MAP in both).
ZERO_POINTS = (4, 8)


class Layout(NamedTuple):
    """How a weight is quantized: weights with the same layout are one group of the format."""

    bits: int
    group_size: int | None  # None: whole rows
    symmetric: bool  # all zero points are 0


def check_installed() -> None:
    """Raise a ConfigError with the command to run if compressed-tensors is missing."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(
            "the format of compressed-tensors needs that package: pip install 'magr-fx[packed]'"
        )


def layout_of(name: str, tensor: Tensor) -> Layout:
    """The layout of one of torchao's tensors.

    Raises:
        ModelError: the format cannot hold the tensor; the message names the remedy.
    """
    if not has_grid(tensor):
        raise ModelError(
            f"{name} is a {type(tensor).__name__}, which pack-quantized cannot hold: quantize with "
            "IntxWeightOnlyConfig or Int8WeightOnlyConfig, per row or in groups"
        )
    stored: Any = tensor
    if getattr(stored, "activation_quantization", None) is not None or (
        getattr(stored, "act_quant_kwargs", None) is not None
    ):
        raise ModelError(
            f"{name} quantizes its inputs too, and pack-quantized is for weights only: quantize "
            "with IntxWeightOnlyConfig or Int8WeightOnlyConfig"
        )
    grid = grid_of(tensor)
    zero = grid.zero_point
    if zero.is_floating_point() and not bool((zero == zero.round()).all()):
        raise ModelError(
            f"{name} has zero points that are not whole, which pack-quantized cannot hold: "
            'quantize with MagRConfig(zero_point="whole")'
        )
    columns, groups = tensor.shape[1], grid.scale.shape[1]
    bits = (grid.high - grid.low + 1).bit_length() - 1
    return Layout(bits, None if groups == 1 else columns // groups, not bool(zero.any()))


def packed(tensor: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of the format that take the weight's place in its module.

    ``weight_packed`` ``[out, ceil(in·bits/32)]`` int32, ``weight_scale`` ``[out, groups]`` in the
    scale's dtype, ``weight_shape`` ``[2]``, and, unless the layout is symmetric,
    ``weight_zero_point`` ``[ceil(out·bits/32), groups]`` int32. A value is (code - zero)·scale.

    Args:
        tensor: one of torchao's, for which :func:`layout_of` holds.
        layout: of all weights of its group: not symmetric as soon as one of them is not.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    stored: Any = tensor
    grid = grid_of(tensor)
    found = {
        "weight_packed": pack_to_int32(stored.qdata, layout.bits),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if not layout.symmetric:
        zero = grid.zero_point.to(torch.int8)
        found["weight_zero_point"] = pack_to_int32(zero, layout.bits, packed_dim=0)
    # Some of them are parts of larger storages, which would be saved with them.
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in found.items()}


def check_format(target: object) -> None:
    """Raise a ConfigError if the format cannot hold what this config makes of weights."""
    if type(target).__name__ not in ("IntxWeightOnlyConfig", "Int8WeightOnlyConfig"):
        raise ConfigError(
            f"{type(target).__name__} makes no tensors that pack-quantized can hold: give "
            "IntxWeightOnlyConfig or Int8WeightOnlyConfig, such as int4-group-64"
        )


class Packing:
    """Packs tensors one shard after the other, as they come.

    Args:
        config_of: the torchao config of a weight, by its name.

    Attributes:
        layouts: of those that were packed, by the names of their modules.
    """

    def __init__(self, config_of: ConfigOf) -> None:
        self._config_of = config_of
        self.layouts: dict[str, Layout] = {}

    def __call__(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The plain tensors that take their place, and no metadata.

        Raises:
            ModelError: as :func:`layout_of`.
        """
        flat: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not is_quantized(tensor):
                flat[name] = tensor
                continue
            module = name.removesuffix(".weight")
            layout, config = layout_of(name, tensor), self._config_of(name)
            mapping = getattr(config, "mapping_type", MappingType.SYMMETRIC)
            self.layouts[module] = layout._replace(
                group_size=target_group_size(config),
                symmetric=layout.symmetric and mapping != MappingType.ASYMMETRIC,
            )
            parts = packed(tensor, self.layouts[module])
            flat |= {f"{module}.{part}": value for part, value in parts.items()}
        return flat, {}


def linears_besides(model: nn.Module, names: Container[str]) -> list[str]:
    """The names of the linears that are not among ``names``."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in names
    ]


def in_groups(layouts: Mapping[str, Layout], inputs: Mapping[str, int]) -> dict[str, Layout]:
    """The same layouts, as few different ones as possible.

    A weight with one group counts as grouped if others have groups of as many inputs. A layout is
    symmetric only if all weights with the same bits and groups are.

    Args:
        layouts: by the names of the modules.
        inputs: the length of the rows, likewise.
    """
    grouped = {(layout.bits, layout.group_size) for layout in layouts.values()}
    layouts = {
        name: layout._replace(group_size=inputs[name])
        if layout.group_size is None and (layout.bits, inputs[name]) in grouped
        else layout
        for name, layout in layouts.items()
    }
    whole = {
        layout._replace(symmetric=False) for layout in layouts.values() if not layout.symmetric
    }
    return {
        name: layout._replace(symmetric=layout._replace(symmetric=False) not in whole)
        for name, layout in layouts.items()
    }


def quantization_config(layouts: Mapping[str, Layout], ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model's ``config.json``; logs which engines cannot run it.

    Args:
        layouts: by the names of the modules, from :func:`in_groups`.
        ignored: the names of the linears that are not quantized.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    by_layout: dict[Layout, list[str]] = defaultdict(list)
    for name, layout in layouts.items():
        by_layout[layout].append(name)
    groups = {}
    for at, (layout, names) in enumerate(by_layout.items()):
        args = QuantizationArgs(
            num_bits=layout.bits,
            type="int",
            symmetric=layout.symmetric,
            strategy="channel" if layout.group_size is None else "group",
            group_size=layout.group_size,
        )
        targets = ["Linear"] if len(by_layout) == 1 else names
        groups[f"group_{at}"] = QuantizationScheme(targets=targets, weights=args)
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=ignored,
    )
    _tell_who_runs_it(by_layout)
    made: dict[str, Any] = config.to_dict()
    if len(by_layout) == 1 and not next(iter(by_layout)).symmetric:
        made["dequantize"] = True
    return made


def _tell_who_runs_it(layouts: Iterable[Layout]) -> None:
    """Log what transformers 5, vLLM and SGLang do not take."""
    kinds = list(layouts)
    if len(kinds) > 1 and not all(layout.symmetric for layout in kinds):
        logger.warning(
            "transformers 5 does not load several layouts with zero points (here %d); give all "
            "weights the same bits and groups, or a symmetric mapping",
            len(kinds),
        )
    unserved = sorted({k.bits for k in kinds if not k.symmetric and k.bits not in ZERO_POINTS})
    if unserved:
        logger.warning(
            "vLLM and SGLang run zero points of 4 and 8 bits only (here %s): the directory is for "
            "transformers. For them take a symmetric mapping, or 4 bits",
            ", ".join(map(str, unserved)),
        )
