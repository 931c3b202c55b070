"""rewritten model → torchao: the target's group size, a trial of it, and proof that it took."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from torchao.quantization.utils import recommended_inductor_config_setter

from magr_fx.errors import ConfigError, HandoverError
from magr_fx.memory import is_out_of_memory
from magr_fx.passes.as_linears import Rebuilt, replace_module
from magr_fx.passes.quantizable import Place, Quantizable
from magr_fx.passes.torchao_private import is_quantized
from magr_fx.passes.torchao_rounding import GPTQ_CONFIGS, has_grid, quantized_copy
from magr_fx.row_pieces import MULTIPLE

# The field that holds the weight's granularity, by the name of the config: names, because some of
# these classes are torchao prototypes that cost an import, or are gone in another release.
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
# One step for each row of a weight [out, in], or one for all of them.
_WHOLE_ROWS = (None, PerAxis(0), PerRow(-1), PerRow(1), PerTensor())


# Algorithms for scales and zero points that look at one row, or one group, at a time.
_BY_ROW = ("affine", "tinygemm", "min_max")


def target_group_size(target: AOBaseConfig) -> int | None:
    """Inputs per quantization group of a torchao config; None where it quantizes whole rows.

    Raises:
        ConfigError: ``target`` is no int weight-only or dynamic-activation int weight config, or
            quantizes something else than rows or groups of inputs.
    """
    kind = type(target).__name__
    name = _GRANULARITY_FIELD.get(kind)
    if name is None or not isinstance(target, AOBaseConfig):
        raise ConfigError(
            f"target must be a torchao config that quantizes weights to integers "
            f"({', '.join(_GRANULARITY_FIELD)}), got "
            f"{kind if isinstance(target, AOBaseConfig) else repr(target)}. Give an instance, such "
            "as IntxWeightOnlyConfig(weight_dtype=torch.int4); for several configs run "
            "magr_transform once with a filter_fn for each, then torchao's quantize_"
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
        f"target must quantize rows, or groups of inputs, as MagR does, got {describe(target)}"
    )


def shares_one_step(target: AOBaseConfig) -> bool:
    """Whether all rows of a weight have one step between them."""
    granularity = getattr(target, _GRANULARITY_FIELD[type(target).__name__])
    if isinstance(granularity, (list, tuple)):
        granularity = granularity[1]
    return isinstance(granularity, PerTensor)


def rows_are_independent(target: AOBaseConfig) -> bool:
    """Whether what becomes of a row does not depend on which others are quantized with it."""
    return not shares_one_step(target) and not any(
        _couples_rows(name, value) for name, value in fields_of(target).items()
    )


def _couples_rows(name: str, value: Any) -> bool:
    """Whether a field of a config chooses scales by something that looks at all rows at once.

    HQQ stops when the error of the whole weight does. An algorithm that is not known may, too.
    """
    chosen = str(value.value if isinstance(value, Enum) else value).lower()
    if name.endswith("choose_qparams_algorithm"):
        return chosen not in _BY_ROW
    return "hqq" in chosen or ("hqq" in name.lower() and bool(value))


def fields_of(target: AOBaseConfig) -> dict[str, Any]:
    """Every field of a config with its value, those that have their default value too."""
    return {field.name: getattr(target, field.name) for field in fields(target)}


def row_multiple(target: AOBaseConfig) -> int:
    """Where stacked weights may be cut between two rows, for each part to be quantized by itself.

    Tensors that are packed for a kernel come in panels of rows, which a cut must not go through
    (16 of PrototypeInt4WeightOnlyConfig on a CPU). All weights of a stack have whole panels, so
    that a multiple of :data:`magr_fx.row_pieces.MULTIPLE` is between two in each of them.
    """
    return 1 if type(target).__name__ in GPTQ_CONFIGS else MULTIPLE


def describe(target: AOBaseConfig) -> str:
    """A config of the table in brief: its class and the fields that differ from the defaults.

    For people only: nothing is decided by it, since another torchao can have other defaults.
    """
    usual = vars(type(target)())
    changed = [
        f"{name}={value if isinstance(value, Enum) else repr(value)}"
        for name, value in vars(target).items()
        if value != usual.get(name)
    ]
    return f"{type(target).__name__}({', '.join(changed)})"


def described_in_full(target: AOBaseConfig) -> str:
    """All that a config says: equal for two only if they ask for the same."""
    said = ", ".join(f"{name}={value!r}" for name, value in fields_of(target).items())
    return f"{type(target).__module__}.{type(target).__qualname__}({said})"


def try_target(
    weights: Iterable[tuple[str, torch.Tensor]], target: AOBaseConfig, *, gptq: bool = False
) -> None:
    """Quantize a copy of one weight of each shape, so that a config that fails does so now.

    Raises:
        ConfigError: torchao refuses the config on this machine, or would skip the weight, or
            (``gptq``) makes something of it that cannot take GPTQ's codes.
    """
    tried = set()
    for name, weight in weights:
        key = (weight.shape, weight.dtype, weight.device)
        if key in tried:
            continue
        tried.add(key)
        what = f"{name} {tuple(weight.shape)} ({weight.dtype}, {weight.device})"
        try:
            quantized = quantized_copy(weight, target)
        except Exception as error:  # whatever a kernel or a config of torchao raises
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"torchao cannot quantize {what} with {describe(target)}: "
                f"{type(error).__name__}: {error}. Leave the layer out with filter_fn, or choose "
                "another config"
            ) from error
        if not is_quantized(quantized):
            raise ConfigError(
                f"torchao would silently leave {what} as it is with {describe(target)}. Leave the "
                f"layer out with filter_fn, or choose a group size that divides {weight.shape[1]}"
            )
        try:
            token = weight.new_ones(1, weight.shape[1])
            usable = bool(functional.linear(token, quantized).isfinite().all())
        except Exception as error:  # whatever a kernel of torchao raises
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"torchao quantizes {what} with {describe(target)}, but what it makes of it does "
                f"not run here: {type(error).__name__}: {error}. Choose another config or dtype"
            ) from error
        if not usable:
            raise ConfigError(
                f"torchao makes NaN or Inf of {what} with {describe(target)}. Choose another config"
            )
        if gptq and not has_grid(quantized):
            raise ConfigError(
                f'rounding="gptq" cannot serve {describe(target)}: it needs whole-number '
                f"codes with a scale for each row or group, and got {type(quantized).__name__}. "
                f"It serves {', '.join(GPTQ_CONFIGS)}, per axis and per group, unpacked"
            )


def _with_places(model: nn.Module, weights: Iterable[Quantizable]) -> list[Quantizable]:
    """The weights, each with the places that hold it, once modules are built anew for them."""
    built: dict[Rebuilt, nn.Module] = {}
    result = []
    for weight in weights:
        if weight.rebuilt is None:
            result.append(weight)
            continue
        if weight.rebuilt not in built:
            built[weight.rebuilt] = replace_module(model, weight.rebuilt)
        linear = built[weight.rebuilt].get_submodule(weight.path)
        name = ".".join(part for part in (weight.rebuilt.name, weight.path, "weight") if part)
        result.append(weight._replace(places=[Place(linear, "weight", name)]))
    return result


def hand_over(
    model: nn.Module,
    target: AOBaseConfig,
    weights: Iterable[Quantizable],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Quantize the weights with torchao's ``quantize_``, and prove that it did.

    The weight of an nn.Linear goes by its module, as ``quantize_`` does by default; any other
    parameter goes by its name. Where ``tensors`` has a tensor for the weight's name, with codes
    of our own, it takes the weight's place instead.

    Raises:
        HandoverError: a weight is no torchao tensor afterwards; the message lists which.
    """
    weights = _with_places(model, weights)
    places = [place for weight in weights for place in weight.places]

    def is_open(module: nn.Module, key: str) -> bool:
        return not is_quantized(getattr(module, key))

    for weight in weights:
        if weight.name in tensors:
            own = nn.Parameter(tensors[weight.name], requires_grad=False)
            for module, key, _ in weight.places:
                setattr(module, key, own)
    if tensors and getattr(target, "set_inductor_config", False):
        recommended_inductor_config_setter()  # as quantize_ does
    linears = {id(place.module) for place in places if place.is_linear and is_open(*place[:2])}
    if linears:
        # A module that the model holds twice is asked about twice: hence is_open.
        quantize_(model, target, lambda m, _: id(m) in linears and is_open(m, "weight"))
    for module, key, _ in (place for place in places if not place.is_linear):
        if is_open(module, key):
            quantize_(module, FqnToConfig(OrderedDict({key: target})), filter_fn=None)

    left = [place.name for place in places if is_open(place.module, place.key)]
    if left:
        raise HandoverError(
            f"torchao left {len(left)} rewritten weights unquantized: {', '.join(left[:5])}. "
            "Their values are rewritten (see magr_report) and the model is partly quantized: "
            "load it again and leave these out with filter_fn"
        )
