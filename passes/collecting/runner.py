"""Run the nodes of a traced graph, also with torchao's tensors in place of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from magr_fx.errors import CalibrationError
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.graphs.inline import autocast_of
from magr_fx.passes.graphs.trace import Trace, TracedBatch, attribute, is_mutation
from magr_fx.passes.graphs.unsupported_weights import blame


class Runner(fx.Interpreter):
    """Runs single nodes, with their inputs from ``env``."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.graph_module, garbage_collect_values=False)
        self._pure = not any(map(is_mutation, trace.graph_module.graph.nodes))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.linear.default:
            target = functional.linear  # torchao's tensors implement this, but not the aten op
        elif target is torch.ops.aten.view.default and self._pure:
            # On another device than that of the trace, the input may have other strides and need a
            # copy. Without in-place ops a copy gives the same result.
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def run_node(runner: Runner, node: fx.Node, batch: TracedBatch, *, quantized: bool = False) -> Any:
    """The node's value.

    Args:
        runner: has the values of the node's inputs.
        node: the node to run.
        batch: the calibration batch, for the error message.
        quantized: whether the weights before the node are quantized.

    Raises:
        CalibrationError: the op raised an error; the message names the layer and the batch.
    """
    try:
        with autocast_of(node):
            return runner.run_node(node)
    except Exception as error:  # an op may raise anything on real values
        if is_out_of_memory(error):
            raise
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        where = (stack[-1][0] if stack else "") or "the model"
        remedy = "Check that the model itself runs on this batch"
        if quantized:
            remedy = (
                "The weights before this layer were quantized by the target; calibrate with "
                "propagate=False, or choose another target"
            )
        read = ((str(n.target), attribute(batch.trace, n)) for n in node.all_input_nodes)
        remedy = blame((name, t) for name, t in read if isinstance(t, nn.Parameter)) or remedy
        raise CalibrationError(
            f"calibration batch {batch.index} fails in {where}, at {node.target}: "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error
