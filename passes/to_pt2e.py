"""rewritten model → PT2E: exported, prepared with the user's quantizer, calibrated, converted."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from magr_fx.errors import (
    CalibrationError,
    ConfigError,
    HandoverError,
    MagRError,
    ModelError,
    TraceError,
    first_line,
)
from magr_fx.passes.calibration import Batch
from magr_fx.passes.tensors_only import own_arguments
from magr_fx.passes.torch_private import tree_flatten, tree_map
from magr_fx.passes.trace import GUARDS, attributes
from magr_fx.passes.trace_batches import bind
from magr_fx.quiet import torch_silenced


def is_pt2e_quantizer(target: object) -> bool:
    """Whether this is one of PT2E's quantizers, such as X86InductorQuantizer."""
    return isinstance(target, Quantizer)


def export_for_pt2e(model: nn.Module, batches: list[Batch]) -> tuple[fx.GraphModule, list[Batch]]:
    """The graph that PT2E works on, called as the model is, and the batches as it takes them.

    Its parameters are the model's own: what is rewritten in place is rewritten in both. Where the
    model is an exported graph, that is the graph.

    Raises:
        CalibrationError: the batches are not all of one form, which one graph has.
        TraceError: torch.export refused the model.
    """
    # Off anyway while calibrating; as an argument it would be one of every later call.
    batches = [Batch(b.index, b.args, _without_cache(b.kwargs)) for b in batches]
    forms = [_form(batch) for batch in batches]
    other = next((at for at, form in enumerate(forms) if form != forms[0]), None)
    if other is not None:
        raise CalibrationError(
            f"calibration batch {batches[other].index} has other arguments than batch "
            f"{batches[0].index}, or others of other types; PT2E quantizes one graph, which has "
            "one form of input"
        )
    if isinstance(model, fx.GraphModule):
        return model, batches
    first = batches[0]
    shapes = tree_map(_dynamic, bind(model, first))
    try:
        with torch_silenced():
            exported = torch.export.export(
                model, first.args, first.kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # export lets through whatever the model's own code raises
        raise TraceError(
            f"PT2E needs the graph of torch.export, which refuses {type(model).__name__}: "
            f"{type(error).__name__}: {first_line(error)}; use a torchao "
            "config as target instead"
        ) from error
    return exported.module(), batches


def try_quantizer(model: nn.Module, quantizer: Quantizer, batches: list[Batch]) -> None:
    """Do all of it once on a graph of its own, so that what fails does so before anything changed.

    Raises:
        ConfigError: the quantizer, or torchao, does not do with this model or this calibration.
        CalibrationError, TraceError, HandoverError: as the functions here.
    """
    if isinstance(model, fx.GraphModule):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own code, to copy a graph
            model = fx.GraphModule(model, copy.deepcopy(model.graph))
    graph_module, inputs = export_for_pt2e(model, batches)
    with contextlib.suppress(Exception):  # one that cannot be copied serves twice
        quantizer = copy.deepcopy(quantizer)
    try:
        with torch_silenced():  # a graph prints which of its lines failed
            quantize_graph(graph_module, quantizer, inputs)
    except (MagRError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever torchao, or the graph on one of the batches, raises
        raise ConfigError(
            f"PT2E cannot quantize {type(model).__name__} with {type(quantizer).__name__} and this "
            f"calibration: {type(error).__name__}: {first_line(error)}. "
            "Nothing was changed; use a torchao config as target instead"
        ) from error


def quantize_graph(
    graph_module: fx.GraphModule, quantizer: Quantizer, batches: list[Batch]
) -> fx.GraphModule:
    """Prepare, calibrate and convert: the quantized graph, with the model's rewritten weights.

    It refuses what it was not made for, see :class:`InputCheck`. The batches stay as they are.

    Raises:
        HandoverError: the quantizer left the graph as it was.
    """
    check = InputCheck(graph_module)
    prepared = prepare_pt2e(graph_module, quantizer)
    for batch in batches:
        args, kwargs = own_arguments((batch.args, batch.kwargs))
        prepared(*args, **kwargs)
    converted: fx.GraphModule = convert_pt2e(prepared)
    check.put_into(converted)
    if not any("dequantize" in str(node.target) for node in converted.graph.nodes):
        raise HandoverError(
            f"{type(quantizer).__name__} quantized nothing in the graph; give it a configuration "
            "(set_global, for one). The weights are rewritten (see magr_report)"
        )
    return converted


class _Expected(NamedTuple):
    """One input: a tensor of this dtype and these sizes, symbols by their names, or a constant."""

    dtype: torch.dtype | None
    sizes: tuple[int | str, ...] = ()
    constant: Any = None

    @classmethod
    def of(cls, value: Any) -> _Expected:
        if not isinstance(value, torch.Tensor):
            return cls(None, constant=value)
        return cls(value.dtype, tuple(n if isinstance(n, int) else str(n) for n in value.shape))

    def fits(self, leaf: Any, sizes: dict[str, int]) -> bool:
        if self.dtype is None:
            return type(leaf) is type(self.constant) and leaf == self.constant
        if not isinstance(leaf, torch.Tensor) or leaf.dtype != self.dtype:
            return False
        pairs = zip(self.sizes, leaf.shape, strict=False)
        return leaf.dim() == len(self.sizes) and all(
            # An open size was traced as 2 or more: a 1 would broadcast or squeeze another way.
            size == given if isinstance(size, int) else 2 <= given == sizes.setdefault(size, given)
            for size, given in pairs
        )

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.sizes))})" if self.dtype else repr(self.constant)


class InputCheck(nn.Module):
    """A module in the graph that refuses inputs for which the graph was not made.

    A graph has constants where the model's code branched on a size, or on what is no tensor. Which
    inputs it is right for is what torch.export says: the sizes of its placeholders, and its guards.

    Args:
        graph_module: by torch.export, before anything was changed in it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        values = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
        self.expected = [_Expected.of(value) for value in values]
        self.guards: Any = getattr(graph_module, GUARDS, None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *leaves: Any) -> None:
        """Raise :class:`ModelError` for inputs that the graph is not right for."""
        if torch.compiler.is_exporting():
            return
        if len(leaves) != len(self.expected) or not self._fits(leaves):
            given = [tuple(t.shape) if isinstance(t, torch.Tensor) else t for t in leaves]
            known = ", ".join(map(str, self.expected))
            raise ModelError(
                f"the quantized graph was made for inputs of [{known}], and is not right for "
                f"{given}: its calibration had none of these sizes or values. Calibrate with "
                "batches of different sizes, or quantize the model once more with such ones"
            )

    def put_into(self, graph_module: fx.GraphModule) -> None:
        """Have the graph begin with it, in the place of torch.export's own guards."""
        graph = graph_module.graph
        setattr(graph_module, GUARDS, self)
        if not any(node.op == "call_module" and node.target == GUARDS for node in graph.nodes):
            inputs = graph.find_nodes(op="placeholder")
            with graph.inserting_after(inputs[-1]):
                graph.call_module(GUARDS, tuple(inputs))
            graph_module.recompile()

    def _fits(self, leaves: tuple[Any, ...]) -> bool:
        sizes: dict[str, int] = {}
        if not all(e.fits(leaf, sizes) for e, leaf in zip(self.expected, leaves, strict=True)):
            return False
        try:
            if self.guards is not None:
                self.guards(*leaves)
        except AssertionError:  # what torch.export's guards raise
            return False
        return True


def still_read(graph_module: fx.GraphModule) -> set[int]:
    """The ids of the tensors that the graph reads as they are: the rest of them is quantized."""
    return {id(tensor) for tensor in attributes(graph_module)}


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if not (k == "use_cache" and v is False)}


def _form(batch: Batch) -> Any:
    leaves, spec = tree_flatten((batch.args, batch.kwargs))
    kinds = [
        (x.dtype, x.dim(), x.device) if isinstance(x, torch.Tensor) else repr(x) for x in leaves
    ]
    return kinds, spec


def _dynamic(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(value.shape) if size > 1}
