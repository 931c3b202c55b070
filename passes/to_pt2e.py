"""rewritten model → PT2E: exported, prepared with the user's quantizer, calibrated, converted."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from magr_fx.errors import CalibrationError, HandoverError, TraceError
from magr_fx.passes.calibration import Batch
from magr_fx.passes.torch_private import tree_flatten, tree_map
from magr_fx.passes.trace import attributes
from magr_fx.passes.trace_batches import bind


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
        exported = torch.export.export(
            model, first.args, first.kwargs, dynamic_shapes=shapes, strict=False
        )
    except Exception as error:  # export lets through whatever the model's own code raises
        raise TraceError(
            f"PT2E needs the graph of torch.export, which refuses {type(model).__name__}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}; use a torchao "
            "config as target instead"
        ) from error
    return exported.module(check_guards=False), batches


def quantize_graph(
    graph_module: fx.GraphModule, quantizer: Quantizer, batches: list[Batch]
) -> fx.GraphModule:
    """Prepare, calibrate and convert: the quantized graph, with the model's rewritten weights.

    Raises:
        HandoverError: the quantizer left the graph as it was.
    """
    prepared = prepare_pt2e(graph_module, quantizer)
    for batch in batches:
        prepared(*batch.args, **batch.kwargs)
    converted: fx.GraphModule = convert_pt2e(prepared)
    if not any("dequantize" in str(node.target) for node in converted.graph.nodes):
        raise HandoverError(
            f"{type(quantizer).__name__} quantized nothing in the graph; give it a configuration "
            "(set_global, for one). The weights are rewritten (see magr_report)"
        )
    return converted


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
