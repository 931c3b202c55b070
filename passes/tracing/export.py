"""Trace one call of a model to its aten graph, by torch.export with dynamic shapes."""

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
    """Trace ``model`` as a function of the tensors in ``leaves``; other leaves are constants.

    Args:
        model: the graph uses its Parameter objects, not copies of them.
        index: the position of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.
        dynamic: for each leaf, the dimensions that are to be dynamic in the graph. Each costs
            time: with all of them dynamic, tracing can take a hundred times as long.

    Raises:
        TraceError: torch.export cannot trace the model, or the model itself does not run.
    """
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    # torch.export always specialises a size of 1 or 0: to ask for it would only log a warning.
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
            wrapper.training = False  # the model is in evaluation mode already
            exported = torch.export.export(
                wrapper, tensors, strict=False, dynamic_shapes=(shapes,) if tensors else None
            )
        graph_module = exported.module()
        graph_module.meta[CALLS] = tuple(wrapper.log.calls)
    except Exception as error:  # also anything that the model's own code raises
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
    """Remove the wrapper's own name from the module paths, by which blocks are named."""
    for node in all_nodes(graph_module):
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind)
                for key, (path, kind) in stack.items()
            }
