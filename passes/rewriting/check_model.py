"""Refuse models that cannot be worked on, before anything is changed; errors name the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from magr_fx.errors import ConfigError, ModelError
from magr_fx.passes.finding.find_linears import FilterFn, Site
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.graphs.unsupported_weights import why_unsupported
from magr_fx.passes.offloading.sharded import is_shard


def check_model(
    model: nn.Module,
    filter_fn: FilterFn | None = None,
    *,
    offloaded: bool = False,
    sharded: bool = False,
) -> None:
    """Refuse a model that cannot be worked on, naming the parameter and the remedy.

    A weight of a dtype or layout that MagR does not support is accepted here, and skipped later.

    Args:
        model: the model.
        filter_fn: which weights to rewrite; the faults of others are ignored.
        offloaded: whether weights on the meta device are offloaded, and so have values.
        sharded: whether weights may be DTensors.

    Raises:
        ModelError: a parameter is on the meta device, not initialized, already quantized, or of
            another class that cannot be rewritten, or holds NaN or Inf; ``model`` is not an
            nn.Module, is TorchScript, or is a graph that reads an attribute that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, fx.GraphModule):
        _check_targets(model)
    fault = next(_faults(model, filter_fn, offloaded=offloaded, sharded=sharded), None)
    if fault is not None:
        raise ModelError(fault)


def _faults(
    model: nn.Module, filter_fn: FilterFn | None, *, offloaded: bool, sharded: bool
) -> Iterator[str]:
    """The faults of modules and parameters that ``filter_fn`` does not leave out."""

    def wanted(module: nn.Module, name: str) -> bool:
        # Called only for faults: a filter_fn may expect modules with weights.
        return filter_fn is None or filter_fn(module, name)

    finite: list[tuple[str, torch.Tensor, nn.Module, str]] = []
    known: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        fault = _fault_of_module(module_name or type(module).__name__, module)
        if fault is not None and wanted(module, module_name):
            yield fault
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}" if module_name else key
            elsewhere = (parameter.is_meta and offloaded) or (sharded and is_shard(parameter))
            if elsewhere or parameter in known:
                continue
            known.add(parameter)
            fault = _fault_of_parameter(name, parameter)
            if fault is not None:
                if wanted(module, module_name):
                    yield fault
            elif why_unsupported(parameter) is None:
                flag = _holds_numbers(parameter.detach())
                finite.append((name, flag, module, module_name))
    for name, flag, module, module_name in finite:
        if not bool(flag) and wanted(module, module_name):
            yield f"{name} {_BROKEN}"


def check_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights with −inf, which :func:`check_model` accepts because a mask may hold it.

    Raises:
        ModelError: a weight is not finite; the message names it.
    """
    flags = {name: weight.detach().isfinite().all() for name, weight in weights}
    for name, flag in flags.items():
        if not bool(flag):
            raise ModelError(f"{name} {_BROKEN}")


def check_not_frozen(model: nn.Module) -> None:
    """Refuse a model that is compiled with inductor's ``freezing``.

    The compiled code holds copies of the weights, and would still use the old ones.

    Raises:
        ModelError: a module is compiled so; the message names it.
    """
    for name, module in model.named_modules():
        compiled: Any = getattr(module, "_compiled_call_impl", None)  # by module.compile()
        config = getattr(getattr(module, "dynamo_ctx", None), "compiler_config", None)
        if config is None and hasattr(compiled, "get_compiler_config"):
            config = compiled.get_compiler_config()
        if isinstance(config, dict) and config.get("freezing"):
            raise ModelError(
                f"{name or type(module).__name__} is compiled with inductor's freezing. Its code "
                "keeps copies of the weights, and would not use the new ones. Call MagR on the "
                "model first, then compile it"
            )


def check_group_size(site: Site, group_size: int | None) -> None:
    """Raise :class:`ConfigError` if the group size does not divide the site's inputs."""
    inputs = site.shape[1]
    if group_size is not None and inputs % group_size:
        raise ConfigError(
            f"{site.name} {site.shape} has {inputs} inputs, which groups of {group_size} do "
            "not divide; choose another group size, or leave the layer out with filter_fn"
        )


_BROKEN = "holds NaN or Inf; repair or reload the model's weights"


def _holds_numbers(parameter: torch.Tensor) -> torch.Tensor:
    """Whether no element is NaN or +inf; :func:`check_finite` finds −inf."""
    return (parameter < torch.inf).all()  # False for NaN


def _check_targets(graph_module: fx.GraphModule, where: str = "the graph") -> None:
    """Check that all attributes that the graph and its sub-graphs read and call exist."""
    for node in graph_module.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        found: Any = graph_module
        for name in str(node.target).split("."):
            found = getattr(found, name, None)
        if found is None:
            raise ModelError(
                f"{where} reads {node.target} (node {node.name}), which its module no longer has: "
                "it was deleted or renamed after the graph was made; restore it, or make the graph "
                "again from the model"
            )
        if isinstance(found, fx.GraphModule):
            _check_targets(found, f"the sub-graph {node.target}")


def _fault_of_module(name: str, module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return f"{name} is TorchScript; start from the eager model"
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind.startswith("torch.ao.nn.quantized"):
        return f"{name} is already quantized ({kind}); start from the full-precision model"
    return None


def _fault_of_parameter(name: str, parameter: nn.Parameter) -> str | None:
    if isinstance(parameter, UninitializedParameter):
        return f"{name} is not initialized; run the model on one input first"
    if is_quantized(parameter):
        return (
            f"{name} is already quantized by torchao ({type(parameter.data).__name__}); "
            "MagR has to run before quantize_: start from the full-precision model"
        )
    if type(parameter.data) is not torch.Tensor and not parameter.is_nested:
        return (
            f"{name} is a {type(parameter.data).__name__}, which cannot be rewritten in place; "
            "run MagR before the weights are wrapped. Sharded weights (DTensor, FSDP2) work with "
            "magr_transform only"
        )
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        return (
            f"{name} was made under torch.inference_mode, so it cannot be written to elsewhere; "
            "load the model without inference_mode, or call MagR inside it"
        )
    if parameter.is_meta:
        return (
            f"{name} is on the meta device, without values; load the weights first "
            "(from_pretrained without device_map='meta', or model.to_empty and load_state_dict)"
        )
    return None
