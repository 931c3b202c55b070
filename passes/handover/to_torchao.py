"""rewritten model → torchao: try the target, quantize, and check that every weight is quantized."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.utils import recommended_inductor_config_setter

from magr_fx.errors import ConfigError, HandoverError
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.handover.quantizable_weight import Place, QuantizableWeight
from magr_fx.passes.handover.target import describe, described_in_full
from magr_fx.passes.handover.torchao_rounding import GPTQ_CONFIGS, has_grid, quantized_copy
from magr_fx.passes.known_layers.as_linears import Rebuilt, replace_module


def try_target(
    name: str, weight: torch.Tensor, target: AOBaseConfig, *, gptq: bool = False
) -> None:
    """Quantize a copy of a weight, so that a config that fails is refused early.

    Raises:
        ConfigError: torchao fails with the config on this machine, or would skip the weight; or
            its tensor does not run, gives NaN or Inf, or (``gptq``) cannot hold GPTQ's codes.
    """
    what = f"{name} {tuple(weight.shape)} ({weight.dtype}, {weight.device})"
    try:
        quantized = quantized_copy(weight, target)
    except Exception as error:  # torchao's kernels and configs can raise anything
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
    except Exception as error:  # torchao's kernels can raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"torchao quantizes {what} with {describe(target)}, but the quantized tensor does "
            f"not run here: {type(error).__name__}: {error}. Choose another config or dtype"
        ) from error
    if not usable:
        raise ConfigError(
            f"{what}, quantized by torchao with {describe(target)}, gives NaN or Inf. Choose "
            "another config"
        )
    if gptq and not has_grid(quantized):
        raise ConfigError(
            f"{describe(target)} makes a {type(quantized).__name__} of {name}, without integer "
            'codes and a scale for each row or group; rounding="gptq" needs these, and so does an '
            f"FqnToConfig of several grids. Choose {', '.join(GPTQ_CONFIGS)}, per axis or per "
            "group, unpacked"
        )


def _with_places(model: nn.Module, weights: Iterable[QuantizableWeight]) -> list[QuantizableWeight]:
    """Replace the modules of ``rebuilt`` weights, and fill in the places that hold them."""
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


def _is_open(module: nn.Module, key: str) -> bool:
    return not is_quantized(getattr(module, key))


def hand_over(
    model: nn.Module,
    config_of: Callable[[str], AOBaseConfig | None],
    weights: Iterable[QuantizableWeight],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Quantize the weights with torchao's ``quantize_``, and check that it did.

    The weight of an nn.Linear is quantized through its module, as ``quantize_`` does by default;
    any other parameter through its name. A weight whose name is in ``tensors`` is replaced by that
    torchao tensor, whose codes were made here. ``config_of`` gives the config by a weight's name.

    Raises:
        HandoverError: a weight is not a torchao tensor afterwards; the message lists which.
    """
    weights = _with_places(model, weights)
    places = [place for weight in weights for place in weight.places]

    for weight in weights:
        if weight.name in tensors:
            own = nn.Parameter(tensors[weight.name], requires_grad=False)
            for module, key, _ in weight.places:
                setattr(module, key, own)
    by_config: dict[str, tuple[AOBaseConfig, list[Place]]] = {}
    for weight in weights:
        config = config_of(weight.name)
        if config is not None:
            by_config.setdefault(described_in_full(config), (config, []))[1].extend(weight.places)
    for config, chosen in by_config.values():
        if tensors and getattr(config, "set_inductor_config", False):
            recommended_inductor_config_setter()  # as quantize_ does
        _quantize(model, config, chosen)

    left = [place.name for place in places if _is_open(place.module, place.key)]
    if left:
        raise HandoverError(
            f"torchao left {len(left)} weights unquantized: {', '.join(left[:5])}. The model is "
            "changed (see magr_report) and partly quantized: load it again, and leave these "
            "weights out with filter_fn"
        )


def _quantize(model: nn.Module, config: AOBaseConfig, places: list[Place]) -> None:
    """Quantize what these places hold, where that is not done yet."""
    linears = {id(place.module) for place in places if place.is_linear and _is_open(*place[:2])}
    if linears:
        # quantize_ visits a module twice if the model holds it twice: hence _is_open.
        quantize_(model, config, lambda m, _: id(m) in linears and _is_open(m, "weight"))
    for module, key, _ in (place for place in places if not place.is_linear):
        if _is_open(module, key):
            quantize_(module, FqnToConfig(OrderedDict({key: config})), filter_fn=None)
