"""Traced graphs, what they read and write, and the mode of a model while it is traced."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from magr_fx.passes.graphs.decisions import random_state, torch_state
from magr_fx.passes.graphs.module_calls import ModuleCall
from magr_fx.passes.graphs.torch_private import schema_of
from magr_fx.passes.graphs.weight_views import VIEWS

GUARDS = "_guards_fn"  # the attribute of a graph module with torch.export's input check


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced graph whose parameters are the model's own objects.

    Attributes:
        graph_module: the graph.
        input_names: the ``forward`` arguments that the placeholders come from, in order.
        tracer: which tracer made the graph: "export", "make_fx", or "" if it was given.
        refusal: why torch.export did not make it; empty if it did, or was not asked.
        calls: calls of inner modules that were given unchanged inputs, or masks.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    tracer: str = "export"
    refusal: str = ""
    calls: tuple[ModuleCall, ...] = ()


@dataclass(frozen=True, eq=False)
class TracedBatch:
    """One calibration batch: the trace that it fits, and its values of the placeholders."""

    index: int
    trace: Trace
    values: tuple[Any, ...]


def attribute(trace: Trace, node: Any) -> torch.Tensor | None:
    """The parameter or buffer that a ``get_attr`` node reads; None for any other node."""
    value = stored(trace, node)
    return value if isinstance(value, torch.Tensor) else None


def stored(trace: Trace, node: Any) -> Any:
    """What a ``get_attr`` node reads, such as a tensor or a sub-graph; None for other nodes."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return reduce(getattr, str(node.target).split("."), trace.graph_module)


def all_nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of the graph and of its sub-graphs."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def attributes(graph_module: fx.GraphModule) -> Iterator[torch.Tensor]:
    """The parameters, buffers and constants that the graph reads."""
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = reduce(getattr, str(node.target).split("."), graph_module)
        if isinstance(value, torch.Tensor):
            yield value


def is_mutation(node: fx.Node) -> bool:
    """Whether the node changes one of its inputs in place."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper; any other module as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextlib.contextmanager
def calibration_mode(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Set the model up for calibration; all state is restored at the end, also after an error.

    It is in evaluation mode, without gradients and key-value caches. The random generators of
    torch, NumPy and Python are restored at the end. MultiheadAttention's fast path is off, because
    it hides its linears. ``device`` is where the model will run, if not where its parameters are.
    """
    with contextlib.ExitStack() as restored:
        for module in model.modules():
            restored.callback(setattr, module, "training", module.training)
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False) is True:
                restored.callback(setattr, config, "use_cache", True)
                config.use_cache = False
        with contextlib.suppress(NotImplementedError):  # an exported graph, whose mode is fixed
            model.eval()
        mha = torch.backends.mha
        restored.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
        devices |= {device} if device is not None else set()
        restored.enter_context(random_state(torch_state(devices)))
        restored.callback(random.setstate, random.getstate())
        restored.callback(np.random.set_state, np.random.get_state())
        with torch.no_grad():
            yield


@contextlib.contextmanager
def buffers_kept(traces: Iterable[Trace]) -> Iterator[None]:
    """Restore, at the end, what the traces change in place, such as counters and running means."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for trace in traces:
        for node in trace.graph_module.graph.nodes:
            # Every buffer is saved: the schema of an op that writes to one may not say so (that of
            # batch_norm does not). Parameters are large: saved only if an in-place op reads them.
            buffer = attribute(trace, node)
            tensors = [] if isinstance(buffer, nn.Parameter) else [buffer]
            if is_mutation(node):
                tensors.extend(_stored(trace, source) for source in node.all_input_nodes)
            for tensor in tensors:
                if tensor is not None and id(tensor) not in kept:
                    kept[id(tensor)] = (tensor, tensor.detach().clone())
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in kept.values():
                if not _equal(tensor, saved):  # unchanged ones may be read-only
                    tensor.copy_(saved)


def written_in_place(traces: Iterable[Trace]) -> list[torch.Tensor]:
    """The parameters and buffers that an in-place op of the traces reads or writes."""
    nodes = [(trace, node) for trace in traces for node in trace.graph_module.graph.nodes]
    found = [_stored(t, s) for t, node in nodes if is_mutation(node) for s in node.all_input_nodes]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; NaN equals NaN."""
    return torch.equal(first, second) or bool(
        ((first == second) | (first.isnan() & second.isnan())).all()
    )


def _stored(trace: Trace, node: Any) -> torch.Tensor | None:
    """The parameter or buffer that the node's value is a view of, or None."""
    while isinstance(node, fx.Node) and (node.target in VIEWS or is_mutation(node)) and node.args:
        node = node.args[0]
    return attribute(trace, node)
