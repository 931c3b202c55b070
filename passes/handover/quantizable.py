"""sites → what torchao can quantize: whole parameters that still run as torchao's tensors.

``quantize_`` silently skips the modules that it does not know, and some modules that it quantizes
do not run afterwards. Such sites are neither quantized nor rewritten; the report lists each as
skipped, with its reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from magr_fx.errors import ConfigError
from magr_fx.passes.finding.find_linears import UNREACHED, FilterFn, Found, Site
from magr_fx.passes.graphs.torchao_private import takes_parameter_names
from magr_fx.passes.graphs.unsupported_weights import is_plain
from magr_fx.passes.graphs.weight_views import WeightView
from magr_fx.passes.handover.quantizable_weight import Place, QuantizableWeight
from magr_fx.passes.handover.target import ConfigOf, target_group_size
from magr_fx.passes.handover.trial import Trial, kind_of
from magr_fx.passes.known_layers.as_linears import Rebuilt, rebuildable

NOT_NAMED = "not rewritten: the target has no config for it, or different ones for its names"


def leave_out_unquantizable(
    found: Found,
    model: nn.Module,
    config_of: Callable[[str], AOBaseConfig | None],
    *,
    filter_fn: FilterFn | None,
) -> tuple[Found, list[QuantizableWeight]]:
    """Move the sites that torchao cannot quantize to the rejections, each with its reason.

    Args:
        found: the sites.
        model: the model.
        config_of: the torchao config by the name of the weight; None leaves it out.
        filter_fn: the caller's, for the linears that no calibration input reaches.

    Returns:
        The remaining sites, and the weights that torchao is to quantize: those of the remaining
        sites, and the linears that no calibration input reaches, which torchao quantizes alone.

    Raises:
        ConfigError: no site is left.
    """
    places = _places(model)
    reasons: dict[str, str] = {}
    weights = _in_rebuilt_modules(model, found, config_of)
    in_rebuilt = {weight.name for weight in weights}
    for site in found.sites:
        if site.name in in_rebuilt:
            continue
        config = config_of(site.name)
        reason = NOT_NAMED if config is None else _cannot_quantize(site, places[site.view], config)
        if reason is None:
            weights.append(QuantizableWeight(site.name, site.parameter, places[site.view]))
        else:
            reasons[site.name] = reason
    for unreached in (r for r in found.rejections if r.reason == UNREACHED):
        parameter = unreached.parameter
        if unreached.shape != tuple(parameter.shape):
            continue  # it is a slice of a parameter
        weight = QuantizableWeight(unreached.name, parameter, places[WeightView.of(parameter)])
        if (
            parameter.dim() == 2
            and parameter.numel() > 0
            and weight.is_linear
            and fits(parameter.shape[1], config_of(unreached.name))
            and (filter_fn is None or filter_fn(unreached.owner, unreached.name.rpartition(".")[0]))
        ):
            weights.append(weight)
    return _without(reasons, found), weights


def leave_out_unrunnable(
    found: Found,
    weights: list[QuantizableWeight],
    model: nn.Module,
    config_of: ConfigOf,
    trial: Trial,
) -> tuple[Found, list[QuantizableWeight]]:
    """Move the sites whose readers cannot work with a quantized weight to the rejections.

    A weight that meets its input in F.linear is a site. Still, torchao's tensors may fail there:
    inside F.multi_head_attention_forward, or where F.linear gets the weight by keyword. The graph
    does not show that, so ``trial`` runs the model.

    Raises:
        ConfigError: no site is left.
        ModelError: the model itself does not run.
    """
    reasons = {
        name: f"not rewritten: the model does not run with it quantized: {why}"
        for name, why in trial.refusals(model, weights, config_of).items()
    }
    # A weight that no input reaches was not read; another layer's weight of the same kind was.
    kinds = {
        kind_of(model, weight, config_of): weight.name
        for weight in weights
        if weight.name in reasons
    }
    sites = {site.name for site in found.sites}
    for weight in weights:
        like = kinds.get(kind_of(model, weight, config_of))
        if like is not None and weight.name not in sites and not weight.rebuilt:
            reasons[weight.name] = f"like {like}"
    return _without(reasons, found), [w for w in weights if w.name not in reasons]


def _in_rebuilt_modules(
    model: nn.Module, found: Found, config_of: Callable[[str], AOBaseConfig | None]
) -> list[QuantizableWeight]:
    """The weights of modules that are replaced by the same with nn.Linear.

    All weights of such a module are quantized, including those of experts that no token reaches.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    sites = {site.view: site.name for site in found.sites}
    refused = {id(r.parameter) for r in found.rejections if r.reason != UNREACHED}
    # The model itself cannot be replaced: no parent module holds it.
    modules = [rebuilt for rebuilt in rebuildable(model) if rebuilt.module is not model]
    holders: dict[WeightView, set[nn.Module]] = defaultdict(set)
    for rebuilt in modules:
        for held in rebuilt.weights:
            holders[WeightView.of(held.matrix)].add(rebuilt.module)
    strangers = {s.view for s in found.sites if not _read_within(model, holders[s.view], s)}
    weights = []
    for rebuilt in modules:
        views = [WeightView.of(held.matrix) for held in rebuilt.weights]
        own = [
            sites.get(view, names[held.parameter] + view.name(held.parameter))
            for held, view in zip(rebuilt.weights, views, strict=True)
        ]
        whole = all(
            (view in sites or id(held.parameter) not in refused)
            and view not in strangers
            and fits(view.shape[1], config_of(name))
            for held, view, name in zip(rebuilt.weights, views, own, strict=True)
        )
        if whole and any(view in sites for view in views):
            for (_, matrix, path), name in zip(rebuilt.weights, own, strict=True):
                weights.append(QuantizableWeight(name, matrix, [], rebuilt, path))
    return weights


def _read_within(model: nn.Module, holders: set[nn.Module], site: Site) -> bool:
    """Whether only these modules read the weight, which moves into a new module."""
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m in holders]
    for call in site.calls:
        stack = list((call.node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        if not any(path == name or path.startswith(f"{name}.") for name in names):
            return False
    return True


def keep_stacks(
    weights: list[QuantizableWeight], model: nn.Module, target: AOBaseConfig, trial: Trial
) -> list[QuantizableWeight]:
    """Leave fused experts fused where torchao's tensor of the whole stack runs in their forward.

    The stack is then one parameter, quantized by its name. Whether its tensor runs depends on the
    target and on the experts' implementation, so the model is run to find out.

    Args:
        weights: those to be quantized.
        model: the model.
        target: torchao's config.
        trial: runs the model with quantized weights.
    """
    if not takes_parameter_names(target):
        return weights
    kinds: dict[type[nn.Module], dict[Rebuilt, list[QuantizableWeight]]] = defaultdict(dict)
    for rebuilt in dict.fromkeys(weight.rebuilt for weight in weights if weight.rebuilt):
        stacks = _stacks(rebuilt, [weight for weight in weights if weight.rebuilt is rebuilt])
        if stacks:
            kinds[type(rebuilt.module)][rebuilt] = stacks
    every = [one for modules in kinds.values() for stacks in modules.values() for one in stacks]
    refused = trial.refusals(model, every, lambda _: target)
    for modules in kinds.values():
        stacks = [stack for stacks in modules.values() for stack in stacks]
        if not any(stack.name in refused for stack in stacks):
            weights = [weight for weight in weights if weight.rebuilt not in modules] + stacks
    return weights


def _stacks(rebuilt: Rebuilt, own: list[QuantizableWeight]) -> list[QuantizableWeight]:
    """The parameters ``[experts, out, in]`` of a module; empty if it has weights of other forms."""
    matrices: dict[nn.Parameter, list[str]] = defaultdict(list)
    for held, weight in zip(rebuilt.weights, own, strict=True):
        matrices[held.parameter].append(weight.name)
        if held.parameter.dim() != 3 or held.matrix.stride() != held.parameter.stride()[1:]:
            return []
    keys = {parameter: key for key, parameter in rebuilt.module.named_parameters(recurse=False)}
    if any(parameter not in keys for parameter in matrices):
        return []
    return [
        QuantizableWeight(
            name=f"{rebuilt.name}.{keys[parameter]}",
            weight=parameter,
            places=[Place(rebuilt.module, keys[parameter], f"{rebuilt.name}.{keys[parameter]}")],
            covers=tuple(names),
        )
        for parameter, names in matrices.items()
    ]


def _places(model: nn.Module) -> dict[WeightView, list[Place]]:
    """The modules that hold each matrix. Tied parameters share memory, and so one key."""
    places: dict[WeightView, list[Place]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.dim() == 2 and is_plain(parameter):
                name = f"{module_name}.{key}" if module_name else key
                places[WeightView.of(parameter)].append(Place(module, key, name))
    return places


def fits(inputs: int, config: AOBaseConfig | None) -> bool:
    """Whether a weight with so many inputs can be quantized with the config."""
    return config is not None and inputs % (target_group_size(config) or 1) == 0


def _cannot_quantize(site: Site, places: list[Place], target: AOBaseConfig) -> str | None:
    if not site.view.covers(site.parameter):
        return (
            "not rewritten: torchao quantizes whole parameters stored [out, in], and this weight "
            "is stored transposed or is a slice of a parameter"
        )
    reader = next((call.node.target for call in site.calls if not call.direct), None)
    if reader is not None:
        linear = reader is torch.ops.aten.linear.default
        how = "a cast or a view comes between" if linear else f"{reader} reads it"
        return f"not rewritten: torchao's tensors run in F.linear only, and {how}"
    if not (all(place.is_linear for place in places) or takes_parameter_names(target)):
        return (
            "not rewritten: it is not the weight of an nn.Linear, and "
            f"{type(target).__name__} quantizes nothing else"
        )
    return None


def _without(reasons: dict[str, str], found: Found) -> Found:
    """``found`` with the sites named in ``reasons`` moved to the rejections."""
    rejected = [site.rejected(reasons[site.name]) for site in found.sites if site.name in reasons]
    sites = [site for site in found.sites if site.name not in reasons]
    if not sites:
        raise ConfigError(
            f"torchao would quantize none of the {len(found.sites)} weights that were found; the "
            f"first, {rejected[0].name}, was {rejected[0].reason}. magr_transform still rewrites "
            "them"
        )
    return Found(sites, [*found.rejections, *rejected])
