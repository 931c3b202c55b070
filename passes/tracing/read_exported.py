"""Use a graph that torch.export has made already, without tracing it again."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen

from magr_fx.errors import CalibrationError, ConfigError
from magr_fx.passes.graphs.inline import inline_regions
from magr_fx.passes.graphs.torch_private import OperatorBase
from magr_fx.passes.graphs.trace import GUARDS, Trace, TracedBatch
from magr_fx.passes.graphs.unsupported_weights import unsupported_named
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.tracing.input_fit import fits
from magr_fx.passes.tracing.trace_batches import (
    AUTO,
    Tracing,
    bind,
    input_names,
    trace_batches,
)

_CONSTANTS = (type(None), bool, int, float, str)


def trace_or_read(
    model: nn.Module, batches: list[Batch], tracing: Tracing = AUTO
) -> list[TracedBatch]:
    """The batches as placeholder values: of an exported graph, or of new traces of the model.

    Raises:
        CalibrationError: a batch does not fit the exported graph, or the model's ``forward``.
        ConfigError: all experts are asked for, and the model is an exported graph or has none.
        TraceError: the model cannot be traced.
    """
    if isinstance(model, fx.GraphModule) and _is_exported(model):
        if tracing.all_experts:
            raise ConfigError(
                "calibrate_all_experts=True is not possible for an exported graph, whose routing "
                "of tokens to experts cannot be changed; pass the model itself to magr_transform"
            )
        return inline_regions(_read(model, batches))
    with unsupported_named(model):
        traced = trace_batches(model, batches, tracing)
    return inline_regions(traced, has_values=tracing.has_values)


def _is_exported(graph_module: fx.GraphModule) -> bool:
    """Whether it calls aten ops only, which torch.export makes and ``find_linears`` reads."""
    return all(
        _is_aten(node) if node.op == "call_function" else node.target == GUARDS
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_module", "call_method")
    )


def _is_aten(node: fx.Node) -> bool:
    """Whether the node calls an op, picks one of its results, or computes with sizes."""
    return (
        isinstance(node.target, OperatorBase)
        or node.target is operator.getitem
        or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
    )


def _read(graph_module: fx.GraphModule, batches: list[Batch]) -> list[TracedBatch]:
    """The batches as placeholder values of the exported graph."""
    trace = None
    traced = []
    for batch in batches:
        arguments = bind(graph_module, batch)
        values = _flatten(graph_module, arguments)
        if not fits(graph_module, values) or not _same_constants(graph_module, values):
            raise CalibrationError(
                f"calibration batch {batch.index} does not fit the graph, which was exported for "
                "other shapes, dtypes or constants; export it with dynamic_shapes, or pass the "
                "model itself to magr_transform"
            )
        trace = trace or Trace(graph_module, input_names(arguments), tracer="")
        traced.append(TracedBatch(batch.index, trace, values))
    return traced


def _flatten(graph_module: fx.GraphModule, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments as placeholder values; empty if they are nested in another way.

    They are in the order of the graph, whose mappings may have their keys in another order.
    """
    inputs: tuple[Any, ...] = tuple(arguments.values())
    codegen = graph_module.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return inputs
    spec = codegen.pytree_info.in_spec
    if [child.type for child in spec.children()] == [tuple, dict]:  # from torch.export
        positional, keyword = spec.children()
        count = positional.num_children
        inputs = inputs[:count], dict(zip(keyword.context, inputs[count:], strict=True))
    try:
        return tuple(spec.flatten_up_to(inputs))
    except ValueError:
        return ()


def _same_constants(graph_module: fx.GraphModule, values: tuple[Any, ...]) -> bool:
    """Whether each value that is no tensor is the one that the graph was made with."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return all(
        type(value) is type(node.meta["val"]) and value == node.meta["val"]
        for node, value in zip(placeholders, values, strict=True)
        if isinstance(node.meta.get("val", ...), _CONSTANTS)
    )
