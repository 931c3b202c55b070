"""Trace a model for every calibration batch: by torch.export where it can, else by make_fx."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import CalibrationError, ConfigError, TraceError
from magr_fx.passes.graphs.module_calls import CALLS, named_leaves
from magr_fx.passes.graphs.torch_private import TreeSpec, tree_flatten
from magr_fx.passes.graphs.trace import Trace, TracedBatch
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.calibration_forms import describe_failure, describe_misfit
from magr_fx.passes.inputs.dataclass_inputs import dataclasses_open
from magr_fx.passes.inputs.tensors_only import PLAIN
from magr_fx.passes.known_layers.all_experts import all_experts
from magr_fx.passes.tracing.export import export
from magr_fx.passes.tracing.input_fit import fits
from magr_fx.passes.tracing.make_fx import run_and_trace
from magr_fx.passes.tracing.same_output import check_same_output

logger = logging.getLogger("magr_fx")

TRACERS = ("auto", "export", "make_fx")


@dataclass(frozen=True)
class Tracing:
    """How to trace.

    Attributes:
        tracer: "export", "make_fx", or "auto": torch.export, and make_fx for all batches if
            torch.export cannot trace the model for one of them.
        all_experts: whether every token is sent to every expert.
        has_values: whether the weights are in memory while the model is traced.

    Raises:
        ConfigError: ``tracer`` is none of these.
    """

    tracer: str = "auto"
    all_experts: bool = False
    has_values: bool = True

    def __post_init__(self) -> None:
        if self.tracer not in TRACERS:
            raise ConfigError(f"trace must be one of {', '.join(TRACERS)}, got {self.tracer!r}")

    def without_values(self) -> Tracing:
        """The same options for an offloaded or sharded model, which cannot be run as a whole.

        Raises:
            ConfigError: ``tracer`` is "make_fx", which runs the model.
        """
        if self.tracer == "make_fx":
            raise ConfigError(
                'trace="make_fx" runs the model, but an offloaded or sharded model cannot be run '
                'as a whole; use trace="export", or load the whole model into memory'
            )
        return replace(self, tracer="export", has_values=False)


AUTO = Tracing()


def trace_batches(
    model: nn.Module, batches: list[Batch], tracing: Tracing = AUTO
) -> list[TracedBatch]:
    """Trace ``model`` for the batches; a new trace is made only if no earlier one fits a batch.

    With torch.export, dimensions in which the batches differ are dynamic where torch.export can
    make them so. What it specialises (a batch of 1, a length that the code computes with) is in the
    trace's guards and placeholder shapes. Every batch is checked against these: no input is run on
    a graph that was made for another.

    With make_fx, shapes are fixed, and each batch has its own graph. Batches of the same shapes
    share one only if the model provably read no tensor's values.

    Args:
        model: in evaluation mode.
        batches: the calibration.
        tracing: the options.

    Raises:
        CalibrationError: a batch's arguments do not fit ``forward``.
        ConfigError: ``all_experts`` is set, but the model has no experts that support it.
        TraceError: the model cannot be traced.
    """
    if tracing.all_experts:
        with all_experts(model):
            return trace_batches(model, batches, replace(tracing, all_experts=False))
    with dataclasses_open([(batch.args, batch.kwargs) for batch in batches]):
        return _trace(model, batches, tracing)


def _trace(model: nn.Module, batches: list[Batch], tracing: Tracing) -> list[TracedBatch]:
    if tracing.tracer == "make_fx":
        return _run(model, batches, "")
    try:
        last = tracing.tracer == "export"
        return _exported(model, batches, compare=tracing.has_values, last=last)
    except TraceError as error:
        if tracing.tracer == "export":
            raise
        refusal = error
    logger.info("%s; tracing by make_fx instead", refusal)
    try:
        return _run(model, batches, str(refusal))
    except TraceError as error:
        raise TraceError(f"{error}. Before that, {refusal}") from error


def _exported(
    model: nn.Module, batches: list[Batch], *, compare: bool, last: bool
) -> list[TracedBatch]:
    open_sizes = _open_sizes(model, batches)

    def make(index: int, leaves: list[Any], spec: TreeSpec) -> tuple[fx.GraphModule, bool]:
        dynamic = open_sizes[_signature(leaves, spec)]
        graph_module = export(model, index, leaves, spec, dynamic)
        if not fits(graph_module, _tensors(leaves)):
            raise TraceError(
                f"the graph that torch.export made of {type(model).__name__} rejects the input "
                f'that it was traced with (calibration batch {index}) — it needs trace="make_fx"'
            )
        if compare:
            check_same_output(graph_module, model, index, leaves, spec)
        return graph_module, True

    return _traced(model, batches, make, "export", "", explain=last)


def _run(model: nn.Module, batches: list[Batch], refusal: str) -> list[TracedBatch]:
    def make(index: int, leaves: list[Any], spec: TreeSpec) -> tuple[fx.GraphModule, bool]:
        return run_and_trace(model, index, leaves, spec)

    return _traced(model, batches, make, "make_fx", refusal, explain=True)


def _traced(
    model: nn.Module,
    batches: list[Batch],
    make: Callable[[int, list[Any], TreeSpec], tuple[fx.GraphModule, bool]],
    tracer: str,
    refusal: str,
    *,
    explain: bool,
) -> list[TracedBatch]:
    """Give each batch a trace that fits it.

    ``make`` returns a graph, and whether other batches may share it. With ``explain``, a
    :class:`TraceError` also says what may be wrong with the form of the batch.
    """
    known: dict[Hashable, list[Trace]] = {}
    traced = []
    for batch in batches:
        arguments = bind(model, batch)
        leaves, spec = tree_flatten(arguments)
        values = _tensors(leaves)
        traces = known.setdefault(_signature(leaves, spec), [])
        trace = next((trace for trace in traces if fits(trace.graph_module, values)), None)
        if trace is None:
            logger.info("tracing %s for calibration batch %d", type(model).__name__, batch.index)
            try:
                graph_module, reusable = make(batch.index, leaves, spec)
            except TraceError as error:
                remedy = describe_failure(model, batch.args, batch.kwargs) if explain else ""
                if not remedy:
                    raise
                raise TraceError(f"{error}. If the form of the batch is wrong: {remedy}") from error
            names = zip(input_names(arguments), leaves, strict=True)
            tensors = tuple(name for name, x in names if isinstance(x, torch.Tensor))
            calls = graph_module.meta.pop(CALLS)
            trace = Trace(graph_module, tensors, tracer, refusal, calls)
            if reusable:
                traces.append(trace)
        traced.append(TracedBatch(batch.index, trace, values))
    return traced


def _open_sizes(model: nn.Module, batches: list[Batch]) -> dict[Hashable, list[set[int]]]:
    """For each signature, and each of its leaves, the dimensions that are to be dynamic.

    These are the first dimension, and those in which the batches differ; each costs time. If a mask
    leaves anything out, those of its sequences and tokens are dynamic too: by their symbols tokens
    are told from dimensions that have the same size by chance.
    """
    first: dict[Hashable, list[Any]] = {}
    dynamic: dict[Hashable, list[set[int]]] = {}
    for batch in batches:
        arguments = bind(model, batch)
        leaves, spec = tree_flatten(arguments)
        key = _signature(leaves, spec)
        if key not in first:
            first[key] = leaves
            dynamic[key] = [
                set(range(min(leaf.dim(), 1))) if isinstance(leaf, torch.Tensor) else set()
                for leaf in leaves
            ]
        masked = _of_masked_tokens(input_names(arguments), leaves)
        for dims, found in zip(dynamic[key], masked, strict=True):
            dims.update(found)
        for known, leaf, dims in zip(first[key], leaves, dynamic[key], strict=True):
            if isinstance(leaf, torch.Tensor):
                sizes = zip(known.shape, leaf.shape, strict=True)
                dims.update(dim for dim, (one, other) in enumerate(sizes) if one != other)
    return dynamic


def _of_masked_tokens(names: tuple[str, ...], leaves: list[Any]) -> list[set[int]]:
    """The dimensions of each leaf that have the size of a mask's first or last two dimensions.

    Of a leaf that is no mask, only the first two dimensions are considered. A mask with the same
    value everywhere is ignored, because it leaves no token out.
    """
    masks = [
        leaf
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and "mask" in name
        if leaf.numel() and bool((leaf != leaf.flatten()[0]).any())
    ]
    sizes = {size for mask in masks for size in (mask.shape[0], *mask.shape[-2:])}
    return [
        {
            dim
            for dim, size in enumerate(leaf.shape)
            if size in sizes and (dim < 2 or "mask" in name)
        }
        if isinstance(leaf, torch.Tensor)
        else set()
        for name, leaf in zip(names, leaves, strict=True)
    ]


def _tensors(leaves: list[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def bind(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments that ``forward`` receives for the batch, by name.

    Raises:
        CalibrationError: ``forward`` does not take these arguments.
    """
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*batch.args, **batch.kwargs).arguments)
    except TypeError as error:
        raise CalibrationError(
            f"calibration batch {batch.index} does not fit {type(model).__name__}.forward: "
            f"{error}. A tensor is taken as the first argument, a tuple or list as positional "
            "arguments, a mapping as keyword arguments"
            f"{describe_misfit(signature, batch.args, batch.kwargs)}"
        ) from error


def input_names(arguments: dict[str, Any]) -> tuple[str, ...]:
    """The name of each leaf of the bound arguments, in order: the ``forward`` argument it is in.

    A value in a mapping (also that of ``**kwargs``) is named by its key, a value in a named tuple
    by its field.
    """
    return tuple(name for name, _ in named_leaves(arguments))


def _signature(leaves: list[Any], spec: TreeSpec) -> Any:
    """What one trace fixes: structure, and each tensor's dtype, number of dimensions and device.

    Also the value of each argument that is no tensor, and which arguments are the same tensor:
    self-attention, for example, checks that.
    """
    first: dict[int, int] = {}
    signature: list[Any] = [repr(spec)]
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            same = first.setdefault(id(leaf), at)
            signature.append((leaf.dtype, leaf.dim(), str(leaf.device), same))
        else:
            # A plain value is compared by its repr; any other object, to be safe, by its identity.
            signature.append(repr(leaf) if isinstance(leaf, PLAIN) else id(leaf))
    return tuple(signature)
