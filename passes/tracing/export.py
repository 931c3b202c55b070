"""One call of a model → its aten graph, by torch.export with dynamic shapes."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import TraceError, first_line
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.quiet import torch_silenced
from magr_fx.passes.graphs.module_calls import CALLS
from magr_fx.passes.graphs.torch_private import TreeSpec
from magr_fx.passes.graphs.trace import all_nodes
from magr_fx.passes.inputs.tensors_only import TensorsOnly
from magr_fx.passes.tracing.module_state import attributes_kept


def export(
    model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec, dynamic: Sequence[Set[int]]
) -> fx.GraphModule:
    """The graph of ``model`` as a function of the tensors among ``leaves``, all else frozen.

    Args:
        model: its Parameter objects become the graph's own.
        index: the place of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.
        dynamic: for each leaf, the dimensions whose sizes the graph is to leave open. Each costs
            time: a graph with all of them open can take a hundred times as long to trace.

    Raises:
        TraceError: torch.export refused the model.
    """
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    # A dimension of 1 (or 0) is always specialised by export: asking for it only logs a warning.
    shapes = tuple(
        {dim: torch.export.Dim.AUTO for dim in dims if leaf.shape[dim] > 1}
        for leaf, dims in zip(leaves, dynamic, strict=True)
        if isinstance(leaf, torch.Tensor)
    )
    try:
        with (
            attributes_kept(model),
            torch_silenced(),
        ):
            wrapper = TensorsOnly(model, leaves, spec)
            wrapper.training = False  # as the model is already
            exported = torch.export.export(
                wrapper, tensors, strict=False, dynamic_shapes=(shapes,) if tensors else None
            )
        graph_module = exported.module()
        graph_module.meta[CALLS] = tuple(wrapper.log.calls)
    except Exception as error:  # export lets through whatever the model's own code raises
        if is_out_of_memory(error):
            raise
        remedy = "check that the model itself runs on this batch"
        if "data-dependent" in str(error).lower():
            remedy = 'control flow that depends on tensor values needs trace="make_fx"'
        raise TraceError(
            f"torch.export cannot trace {type(model).__name__} with calibration batch {index}: "
            f"{type(error).__name__}: {first_line(error)} — {remedy}"
        ) from error
    _strip_wrapper(graph_module)
    return graph_module


def _strip_wrapper(graph_module: fx.GraphModule) -> None:
    """Take the wrapper's own name off the module paths that name the blocks."""
    for node in all_nodes(graph_module):
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind)
                for key, (path, kind) in stack.items()
            }
