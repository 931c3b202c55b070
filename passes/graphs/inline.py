"""Inline the sub-graphs of traced graphs, so that their nodes are handled like all others.

An autocast region, a region with another gradient mode, and an activation checkpoint are replaced
by their sub-graphs; nodes keep their autocast. A ``torch.cond`` is replaced by the branch that the
batch takes, so batches that take different branches get different graphs. Loops stay as they are.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from magr_fx.errors import TraceError
from magr_fx.passes.graphs.trace import Trace, TracedBatch, all_nodes, buffers_kept

AUTOCAST = "magr_autocast"  # key of a node's meta: arguments of torch.autocast, by device

_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast
_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_COND = torch.ops.higher_order.cond
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_GRAD_MODE = torch._C._set_grad_enabled  # calibration needs no gradients
_INLINED = frozenset(
    {_AUTOCAST_REGION, _GRAD_REGION, _CHECKPOINT, _COND, _ENTER, _EXIT, _GRAD_MODE}
)

Autocast = dict[str, tuple[Any, ...]]


def inline_regions(batches: list[TracedBatch], *, has_values: bool = True) -> list[TracedBatch]:
    """The batches on graphs without such regions; a graph that has none stays the same object.

    Args:
        batches: the traced batches.
        has_values: whether the weights are in memory.

    Raises:
        TraceError: the model has a ``torch.cond``, and its weights are not in memory.
    """
    flat: dict[tuple[Trace, tuple[bool, ...]], Trace] = {}
    result = []
    for batch in batches:
        trace = batch.trace
        targets = {node.target for node in all_nodes(trace.graph_module)}
        if _INLINED.isdisjoint(targets):
            result.append(batch)
            continue
        decided: tuple[bool, ...] = ()
        if _COND in targets:
            if not has_values:
                raise TraceError(
                    "the model chooses between branches (torch.cond) by values, but the weights of "
                    "an offloaded model have none while it is traced; load the model as a whole"
                )
            with buffers_kept([trace]):
                decided = _Predicates(trace.graph_module).of(batch.values)
        key = (trace, decided)
        if key not in flat:
            inliner = _Inliner(trace.graph_module, iter(decided))
            flat[key] = replace(trace, graph_module=inliner.inlined())
        result.append(replace(batch, trace=flat[key]))
    return result


@contextlib.contextmanager
def autocast_of(node: fx.Node) -> Iterator[None]:
    """Run the context under the node's autocast; without one, autocast is left unchanged."""
    regions: Autocast = node.meta.get(AUTOCAST, {})
    with contextlib.ExitStack() as inside:
        for device, dtype, enabled, cache in regions.values():
            context = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            inside.enter_context(context)
        yield


class _Inliner:
    """Makes one flat copy of a graph.

    Args:
        graph_module: the graph; the copy has the same parameters.
        decided: for each ``torch.cond``, in the order they run, whether its first branch is taken.
    """

    def __init__(self, graph_module: fx.GraphModule, decided: Iterator[bool]) -> None:
        self.root = graph_module
        self.decided = decided
        self.graph = fx.Graph()

    def inlined(self) -> fx.GraphModule:
        values: dict[fx.Node, Any] = {}
        output = self._copy(self.root, "", values, {})
        self.graph.output(output)
        self.graph.eliminate_dead_code(lambda node: node.op != "get_attr")  # sub-graphs
        return fx.GraphModule(self.root, self.graph)

    def _copy(
        self, module: fx.GraphModule, prefix: str, values: dict[fx.Node, Any], autocast: Autocast
    ) -> Any:
        """Copy the nodes of ``module``; returns what its output node returns, in new nodes."""
        outer: list[Autocast] = []  # the autocast outside each region that is open
        for node in module.graph.nodes:
            args, kwargs = _mapped((node.args, node.kwargs), values)
            if node.op == "output":
                return args[0]
            if node in values:  # an argument of the sub-graph
                continue
            if node.target is _ENTER:
                outer.append(autocast)
                autocast = {**autocast, args[0]: args[:4]}
            elif node.target is _EXIT:
                autocast = outer.pop()
            elif node.target is _AUTOCAST_REGION:
                inside = {**autocast, args[0]: args[:4]}
                values[node] = self._enter(module, prefix, node.args[4], args[5:], inside)
            elif node.target is _GRAD_REGION:
                values[node] = self._enter(module, prefix, node.args[1], args[2:], autocast)
            elif node.target is _CHECKPOINT:
                values[node] = self._enter(module, prefix, node.args[0], args[1:], autocast)
            elif node.target is _COND:
                branch = node.args[1 if next(self.decided) else 2]
                values[node] = self._enter(module, prefix, branch, args[3], autocast)
            elif node.target is operator.getitem and isinstance(args[0], (tuple, list)):
                values[node] = args[0][args[1]]
            elif node.target is not _GRAD_MODE:
                target = f"{prefix}{node.target}" if node.op in _NAMES else node.target
                new = self.graph.create_node(node.op, target, args, kwargs, node.name, node.type)
                new.meta = dict(node.meta)
                if autocast:
                    new.meta[AUTOCAST] = autocast
                values[node] = new
        return ()

    def _enter(
        self, module: fx.GraphModule, prefix: str, name: Any, operands: Any, autocast: Autocast
    ) -> Any:
        """Copy a sub-graph with ``operands`` as its arguments."""
        inner = getattr(module, str(name.target))
        placeholders = inner.graph.find_nodes(op="placeholder")
        values = dict(zip(placeholders, operands, strict=True))
        return self._copy(inner, f"{prefix}{name.target}.", values, autocast)


_NAMES = ("get_attr", "call_module")


class _Predicates(fx.Interpreter):
    """Runs a batch to record which branches it takes."""

    def of(self, values: tuple[Any, ...]) -> tuple[bool, ...]:
        self.decided: list[bool] = []
        inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        self.run(*inputs, enable_io_processing=False)
        return tuple(self.decided)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _COND:
            taken = bool(args[0])
            self.decided.append(taken)
            return self._inner(args[1 if taken else 2], args[3])
        if target is _AUTOCAST_REGION:
            device, dtype, enabled, cache, inner, *operands = args
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
                return self._inner(inner, operands)
        if target is _GRAD_REGION:
            return self._inner(args[1], args[2:])
        if target is _CHECKPOINT:
            return self._inner(args[0], args[1:])
        if target is _GRAD_MODE:
            return None
        return super().call_function(target, args, kwargs)

    def _inner(self, graph_module: fx.GraphModule, operands: Any) -> Any:
        inner = _Predicates(graph_module)
        inner.decided = self.decided
        return inner.run(*operands, enable_io_processing=False)


def _mapped(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(arguments, lambda node: values.get(node, node))
