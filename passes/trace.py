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
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from magr_fx.errors import CalibrationError, TraceError
from magr_fx.passes.calibration import Batch
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

    Evaluation mode, no gradients, no key-value caches, no random numbers drawn from the
    caller's generators, and MultiheadAttention's fast path off (it hides its linears).
    """
    training = {module: module.training for module in model.modules()}
    caching = [
        config
        for module in model.modules()
        if getattr(config := getattr(module, "config", None), "use_cache", False) is True
    ]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        for config in caching:
            config.use_cache = False
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def buffers_kept(traces: Iterable[Trace]) -> Iterator[None]:
    """Restore, at the end, what running the traces changes in place: counters, running means."""
    changed = {}
    for trace in traces:
        for node in trace.graph_module.graph.nodes:
            if is_mutation(node):
                source = node
                while (source.target in VIEWS or is_mutation(source)) and source.args:
                    source = source.args[0]
                tensor = attribute(trace, source)
                if tensor is not None:
                    changed[id(tensor)] = (tensor, tensor.clone())
    try:
        yield
    finally:
        for tensor, saved in changed.values():
            tensor.copy_(saved)


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
        leaves, spec = tree_flatten(bind(model, batch))
        values = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        traces = known.setdefault(_signature(leaves, spec), [])
        trace = next((trace for trace in traces if fits(trace.graph_module, values)), None)
        if trace is None:
            trace = _export(model, batch.index, leaves, spec)
            traces.append(trace)
        traced.append(TracedBatch(batch.index, trace, values))
    return traced


def fits(graph_module: fx.GraphModule, values: tuple[Any, ...]) -> bool:
    """Whether the graph is right for these placeholder values, by its shapes and its guards."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(values):
        return False
    sizes: dict[Any, int] = {}
    for node, value in zip(placeholders, values, strict=True):
        traced = node.meta.get("val")
        if not isinstance(traced, torch.Tensor):
            continue
        if not isinstance(value, torch.Tensor) or traced.dtype != value.dtype:
            return False
        if traced.dim() != value.dim():
            return False
        for size, given in zip(traced.shape, value.shape, strict=True):
            # A symbolic size was traced as "2 or more": a 1 would broadcast or squeeze another way.
            expected = sizes.setdefault(size.node.expr, given) if _symbolic(size) else size
            if expected != given or (
                _symbolic(size) and given < 2 and statically_known_true(size >= 2)
            ):
                return False
    guards = getattr(graph_module, GUARDS, None)
    try:
        if guards is not None:
            guards(*values)
    except AssertionError:  # what torch.export's guards raise
        return False
    return True


def _symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


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


def input_names(model: nn.Module, arguments: dict[str, Any]) -> tuple[str, ...]:
    """The forward argument that each leaf of the bound arguments belongs to, in order.

    What goes through ``**kwargs`` has a name of its own.
    """
    parameters = inspect.signature(model.forward).parameters
    names: list[str] = []
    for name, value in arguments.items():
        extra = parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        for inner, part in value.items() if extra else [(name, value)]:
            names.extend([inner] * len(tree_leaves(part)))
    return tuple(names)


def _signature(leaves: list[Any], spec: TreeSpec) -> Any:
    """What one trace freezes: structure, dtypes, ranks, and the value of whatever is no tensor."""
    return repr(spec), *(
        (leaf.dtype, leaf.dim(), str(leaf.device)) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    )


class _TensorsOnly(nn.Module):
    """``model`` as a function of its input tensors alone, everything else frozen.

    Export then sees one flat list of tensors: names, nesting, ``**kwargs`` and constants of the
    model's signature make no difference, nor does the type that the model returns.
    """

    def __init__(self, model: nn.Module, leaves: list[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.model = model
        self.signature = inspect.signature(model.forward)
        self.spec = spec
        self.constants = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self.is_tensor = [isinstance(x, torch.Tensor) for x in leaves]

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        leaves = [
            next(given) if is_tensor else constant
            for is_tensor, constant in zip(self.is_tensor, self.constants, strict=True)
        ]
        bound = inspect.BoundArguments(self.signature, tree_unflatten(leaves, self.spec))
        output = self.model(*bound.args, **bound.kwargs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _export(model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec) -> Trace:
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    # A dimension of 1 (or 0) is always specialised by export: asking for it only logs a warning.
    shapes = tuple(
        {dim: torch.export.Dim.AUTO for dim, size in enumerate(t.shape) if size > 1}
        for t in tensors
    )
    wrapper = _TensorsOnly(model, leaves, spec)
    wrapper.eval()
    try:
        exported = torch.export.export(
            wrapper, tensors, strict=False, dynamic_shapes=(shapes,) if tensors else None
        )
        graph_module = exported.module()
    except Exception as error:  # export lets through whatever the model's own code raises
        message = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise TraceError(
            f"torch.export cannot trace {type(model).__name__} with calibration batch {index}: "
            f"{type(error).__name__}: {message.strip()} — check that the model itself runs on "
            "this batch; control flow that depends on tensor values cannot be exported"
        ) from error
    _strip_wrapper(graph_module)
    logger.debug(
        "traced %s for calibration batch %d: %d nodes",
        type(model).__name__,
        index,
        len(graph_module.graph.nodes),
    )
    if not fits(graph_module, tensors):
        raise TraceError(
            f"torch.export's graph of {type(model).__name__} refuses the very input that it was "
            f"traced with (calibration batch {index})"
        )
    arguments = tree_unflatten(leaves, spec)
    names = zip(input_names(model, arguments), leaves, strict=True)
    return Trace(graph_module, tuple(name for name, x in names if isinstance(x, torch.Tensor)))


def _strip_wrapper(graph_module: fx.GraphModule) -> None:
    """Take the wrapper's own name off the module paths that name the blocks."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind)
                for key, (path, kind) in stack.items()
            }
