"""model → traced graphs: torch.export with dynamic shapes, one trace per input signature."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import MappingKey, TreeSpec, tree_flatten, tree_flatten_with_path

from magr_fx.errors import CalibrationError, TraceError
from magr_fx.passes.calibration import Batch
from magr_fx.passes.export import PLAIN, export
from magr_fx.passes.weight_views import VIEWS

logger = logging.getLogger("magr_fx")

GUARDS = "_guards_fn"  # where torch.export keeps its input check in a graph module


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced graph whose parameters are the model's own objects.

    ``input_names`` are the forward arguments that the placeholders come from, in order.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TracedBatch:
    """One calibration batch as the placeholder values of the trace that it fits."""

    index: int
    trace: Trace
    values: tuple[Any, ...]


def attribute(trace: Trace, node: Any) -> torch.Tensor | None:
    """The parameter or buffer that a ``get_attr`` node reads; None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = reduce(getattr, str(node.target).split("."), trace.graph_module)
    return value if isinstance(value, torch.Tensor) else None


def is_mutation(node: fx.Node) -> bool:
    """Whether the node changes one of its inputs in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper; any other module as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Inference as calibration needs it; every state is restored, also after an error.

    Evaluation mode, no gradients, no key-value caches, no random numbers drawn from the caller's
    generators, and MultiheadAttention's fast path off (it hides its linears).
    """
    with contextlib.ExitStack() as restored:
        for module in model.modules():
            restored.callback(setattr, module, "training", module.training)
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False) is True:
                restored.callback(setattr, config, "use_cache", True)
                config.use_cache = False
        with contextlib.suppress(NotImplementedError):  # an exported graph: its mode is baked in
            model.eval()
        mha = torch.backends.mha
        restored.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        cuda = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
        restored.enter_context(torch.random.fork_rng(devices=cuda))
        with torch.no_grad():
            yield


@contextlib.contextmanager
def buffers_kept(traces: Iterable[Trace]) -> Iterator[None]:
    """Restore, at the end, what running the traces changes in place: counters, running means."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for trace in traces:
        for node in trace.graph_module.graph.nodes:
            # Every buffer, as not every op that writes to one says so (batch_norm does not). A
            # parameter, which is large, only where an op that writes reads it.
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
                if not _equal(tensor, saved):  # also: some that never change cannot be written
                    tensor.copy_(saved)


def written_in_place(traces: Iterable[Trace]) -> list[torch.Tensor]:
    """The parameters and buffers that an op of the traces reads and writes in place."""
    nodes = [(trace, node) for trace in traces for node in trace.graph_module.graph.nodes]
    found = [_stored(t, s) for t, node in nodes if is_mutation(node) for s in node.all_input_nodes]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same values, NaN being one."""
    return torch.equal(first, second) or bool(
        ((first == second) | (first.isnan() & second.isnan())).all()
    )


def _stored(trace: Trace, node: Any) -> torch.Tensor | None:
    """The parameter or buffer that the node's value is a view of, or None."""
    while isinstance(node, fx.Node) and (node.target in VIEWS or is_mutation(node)) and node.args:
        node = node.args[0]
    return attribute(trace, node)


def trace_batches(model: nn.Module, batches: list[Batch]) -> list[TracedBatch]:
    """Trace ``model`` for every batch, and again only for a batch that no earlier trace fits.

    Dimensions are dynamic where torch.export can make them so. What it specialises (a batch of
    1, a length that the code computes with) is in the trace's guards and placeholder shapes,
    which every batch is checked against: an input is never run on a graph made for another.

    Raises:
        CalibrationError: a batch's arguments do not fit ``forward``.
        TraceError: torch.export refused the model.
    """
    known: dict[Any, list[Trace]] = {}
    traced = []
    for batch in batches:
        arguments = bind(model, batch)
        leaves, spec = tree_flatten(arguments)
        values = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        traces = known.setdefault(_signature(leaves, spec), [])
        trace = next((trace for trace in traces if fits(trace.graph_module, values)), None)
        if trace is None:
            graph_module = export(model, batch.index, leaves, spec)
            if not fits(graph_module, values):
                raise TraceError(
                    f"torch.export's graph of {type(model).__name__} refuses the very input that "
                    f"it was traced with (calibration batch {batch.index})"
                )
            names = zip(input_names(arguments), leaves, strict=True)
            trace = Trace(graph_module, tuple(n for n, x in names if isinstance(x, torch.Tensor)))
            traces.append(trace)
            logger.debug("traced %s for calibration batch %d", type(model).__name__, batch.index)
        traced.append(TracedBatch(batch.index, trace, values))
    return traced


def fits(graph_module: fx.GraphModule, values: tuple[Any, ...]) -> bool:
    """Whether the graph is right for these placeholder values, by its shapes and its guards."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(values):
        return False
    sizes: dict[Any, int] = {}  # what each symbol stands for
    pairs = zip(placeholders, values, strict=True)
    if not all(_fits(node.meta.get("val"), value, sizes) for node, value in pairs):
        return False
    guards = getattr(graph_module, GUARDS, None)
    try:
        if guards is not None:
            guards(*values)
    except AssertionError:  # what torch.export's guards raise
        return False
    return True


def _fits(traced: Any, value: Any, sizes: dict[Any, int]) -> bool:
    """Whether a value has the traced tensor's dtype and its sizes, or sizes for its symbols."""
    if not isinstance(traced, torch.Tensor):
        return True
    if not isinstance(value, torch.Tensor):
        return False
    if (traced.dtype, traced.dim()) != (value.dtype, value.dim()):
        return False
    for size, given in zip(traced.shape, value.shape, strict=True):
        expected: int = size
        if isinstance(size, torch.SymInt):
            expected = sizes.setdefault(size.node.expr, given)
            # It was traced as "2 or more": a 1 would broadcast or squeeze another way.
            if given < 2 and statically_known_true(size >= 2):
                return False
        if expected != given:
            return False
    return True


def bind(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch by argument name, as ``forward`` would receive it."""
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*batch.args, **batch.kwargs).arguments)
    except TypeError as error:
        raise CalibrationError(
            f"calibration batch {batch.index} does not fit {type(model).__name__}.forward: "
            f"{error}. A tensor is taken as the first argument, a tuple or list as positional "
            "arguments, a mapping as keyword arguments"
        ) from error


def input_names(arguments: dict[str, Any]) -> tuple[str, ...]:
    """The forward argument that each leaf of the bound arguments belongs to, in order.

    What lies in a mapping, that of ``**kwargs`` included, goes by its own key there.
    """
    names: list[str] = []
    for argument, value in arguments.items():
        for path, _ in tree_flatten_with_path(value)[0]:
            keys = [str(key.key) for key in path if isinstance(key, MappingKey)]
            names.append(keys[-1] if keys else argument)
    return tuple(names)


def _signature(leaves: list[Any], spec: TreeSpec) -> Any:
    """What one trace freezes: structure, dtypes, ranks, and the value of whatever is no tensor.

    Also which arguments are one and the same tensor: self-attention, for one, asks that.
    """
    first: dict[int, int] = {}
    signature: list[Any] = [repr(spec)]
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            same = first.setdefault(id(leaf), at)
            signature.append((leaf.dtype, leaf.dim(), str(leaf.device), same))
        else:
            # By what it prints if that is all of it, else, safely, by which object it is.
            signature.append(repr(leaf) if isinstance(leaf, PLAIN) else id(leaf))
    return tuple(signature)
