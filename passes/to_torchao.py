"""rewritten model → torchao: the target's group size, what it can take, and proof that it took.

``quantize_`` skips in silence what it does not know: weights that are not an nn.Linear's, and,
with some configs, sizes that the group does not divide. Here a site that would be skipped is
either an error before anything is changed, or a reported skip that is not rewritten either.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER
from torchao.utils import TorchAOBaseTensor

from magr_fx.errors import ConfigError, HandoverError
from magr_fx.passes.find_linears import UNREACHED, FilterFn, Found, Site, is_linear_weight

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


def target_group_size(target: AOBaseConfig) -> int | None:
    """Inputs per quantization group of a torchao config; None where it quantizes whole rows.

    Raises:
        ConfigError: ``target`` is no int weight-only or dynamic-activation int weight config.
    """
    name = _GRANULARITY_FIELD.get(type(target).__name__)
    if name is None or not isinstance(target, AOBaseConfig):
        raise ConfigError(
            f"target must be a torchao config that quantizes weights to integers "
            f"({', '.join(_GRANULARITY_FIELD)}), got {target!r}. For several configs run "
            "magr_transform once with a filter_fn for each, then torchao's quantize_"
        )
    granularity = getattr(target, name)
    if isinstance(granularity, (list, tuple)):  # (activation, weight)
        granularity = granularity[1]
    if isinstance(granularity, PerGroup):
        granularity = granularity.group_size
    if granularity is None or isinstance(granularity, (PerAxis, PerRow, PerTensor)):
        return None
    if isinstance(granularity, int):
        return granularity
    raise ConfigError(f"target has a weight granularity that MagR does not know: {granularity!r}")


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether this is one of torchao's quantized tensors."""
    return isinstance(tensor, TorchAOBaseTensor)


def leave_out_unquantizable(found: Found, target: AOBaseConfig) -> Found:
    """Move the sites that ``target`` cannot quantize to the rejections, each with its reason."""
    rejections = list(found.rejections)
    sites = []
    for site in found.sites:
        reason = _cannot_quantize(site, target)
        if reason is None:
            sites.append(site)
        else:
            rejections.append(site.rejected(reason))
    if not sites:
        first = rejections[len(found.rejections)]
        raise ConfigError(
            f"torchao would quantize none of the {len(found.sites)} weights that were found; the "
            f"first, {first.name}, was {first.reason}. magr_transform still rewrites them"
        )
    return Found(sites, rejections)


def _cannot_quantize(site: Site, target: AOBaseConfig) -> str | None:
    if not site.view.covers(site.parameter):
        return "not rewritten: torchao quantizes whole weights stored [out, in], and this is not one"
    if not all(call.direct for call in site.calls):
        return (
            "not rewritten: torchao's tensors run in F.linear only, and this weight is also "
            f"read by {site.calls[0].node.target}"
        )
    if not site.is_linear_weight and not _takes_parameter_names(target):
        return (
            "not rewritten: it belongs to no nn.Linear, and "
            f"{type(target).__name__} quantizes nothing else"
        )
    return None


def _takes_parameter_names(target: AOBaseConfig) -> bool:
    handler = _QUANTIZE_CONFIG_HANDLER[type(target)]
    return "parameter_name" in inspect.signature(handler).parameters


class Quantizable(NamedTuple):
    """A whole parameter that torchao is to quantize."""

    name: str
    parameter: nn.Parameter
    of_linear: bool


def quantizables(found: Found, group_size: int | None, filter_fn: FilterFn | None) -> list[Quantizable]:
    """The sites, and the linears that calibration never reached, which torchao quantizes alone."""
    unreached = [
        Quantizable(r.name, r.parameter, True)
        for r in found.rejections
        if r.reason == UNREACHED
        and is_linear_weight(r.owner, r.parameter)
        and r.parameter.shape[1] % (group_size or 1) == 0
        and (filter_fn is None or filter_fn(r.owner, r.name.rpartition(".")[0]))
    ]
    return [Quantizable(s.name, s.parameter, s.is_linear_weight) for s in found.sites] + unreached


def try_target(weights: Iterable[Quantizable], target: AOBaseConfig) -> None:
    """Quantize a copy of one weight of each shape, so that a config that fails does so now.

    Raises:
        ConfigError: torchao refuses the config on this machine, or would skip the weight.
    """
    tried = set()
    for name, weight, _ in weights:
        key = (weight.shape, weight.dtype, weight.device)
        if key in tried:
            continue
        tried.add(key)
        what = f"{name} {tuple(weight.shape)} ({weight.dtype}, {weight.device}) with {target}"
        probe = nn.Linear(1, 1, bias=False, device="meta")
        probe.out_features, probe.in_features = weight.shape
        probe.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        try:
            quantize_(probe, target)
        except Exception as error:  # whatever a kernel or a config of torchao raises
            raise ConfigError(
                f"torchao cannot quantize {what}: {type(error).__name__}: {error}"
            ) from error
        if not is_quantized(probe.weight):
            raise ConfigError(
                f"torchao would silently leave {name} as it is: {what}. Leave the layer out with "
                f"filter_fn, or choose a group size that divides {weight.shape[1]}"
            )


def hand_over(model: nn.Module, target: AOBaseConfig, weights: list[Quantizable]) -> None:
    """Quantize the weights with torchao's ``quantize_``, and prove that it did.

    The weight of an nn.Linear goes by its module, as ``quantize_`` does by default; any other
    parameter goes by its name.

    Raises:
        HandoverError: a weight is no torchao tensor afterwards; the message lists which.
    """
    linears = {id(w.parameter) for w in weights if w.of_linear}
    if linears:
        quantize_(model, target, lambda module, _: id(getattr(module, "weight", None)) in linears)
    others = OrderedDict((w.name, target) for w in weights if not w.of_linear)
    if others:
        quantize_(model, FqnToConfig(others), filter_fn=None)
    # ``weights`` keeps the old parameters alive, so their ids are still theirs alone.
    old = {id(w.parameter) for w in weights}
    names = {w.name for w in weights}
    left = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in old or (name in names and not is_quantized(parameter))
    ]
    if left:
        raise HandoverError(
            f"torchao left {len(left)} rewritten weights unquantized: {', '.join(left[:5])}. "
            "Their values are rewritten (see magr_report) and the model is partly quantized: "
            "load it again and leave these out with filter_fn"
        )
