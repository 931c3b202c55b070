"""Whether an exported graph computes what its model does, on one and the same input.

Code that asks whether it is being exported may do something else then.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import TraceError
from magr_fx.passes.decisions import is_random, random_state, torch_state
from magr_fx.passes.make_fx import nothing_kept
from magr_fx.passes.tensors_only import TensorsOnly
from magr_fx.passes.torch_private import TreeSpec
from magr_fx.passes.trace import Trace, all_nodes, attributes, buffers_kept

logger = logging.getLogger("magr_fx")

PART = 2**20  # numbers that are compared at a time, in float64
TOLERANCE = 1e-3  # of ‖graph - model‖ / ‖model‖; the kernels are mostly the same
COARSE = 0.1  # where something is computed in half precision


def check_same_output(
    graph_module: fx.GraphModule, model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec
) -> None:
    """Run both once on the input that the graph was traced with, and compare what they return.

    Both draw the same random numbers, and nothing keeps what the two runs write. The model's own
    hooks run, as they are a part of what it computes. A graph that draws random numbers may draw
    them in another order than the model: one that returns something else is not refused for it.
    Nor is an input that one of the two fails on: to say so is up to the check of the calibration.

    Args:
        graph_module: by torch.export.
        model: in evaluation mode, its weights in memory.
        index: the place of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Raises:
        TraceError: they return something else.
    """
    devices = {t.device for t in (*attributes(graph_module), *_tensors(leaves))}
    state = torch_state(devices)
    try:
        with buffers_kept([Trace(graph_module, ())]), random_state(state):
            graphs = list(graph_module(*_copies(leaves)))
        with (
            torch.compiler.set_stance("force_eager"),
            random_state(state),
            nothing_kept(model),
        ):
            wrapper = TensorsOnly(model, leaves, spec)
            wrapper.training = False  # as the model is already
            models = wrapper(*_copies(leaves))
        difference = _difference(graphs, models, _tolerance(model, models))
    except Exception as error:  # whatever an op raises on real values
        logger.info(
            "the exported graph of %s was not compared with the model itself: %s: %s",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return
    if difference and any(is_random(node) for node in all_nodes(graph_module)):
        logger.info(
            "the exported graph of %s draws random numbers, and cannot be compared with the model "
            "itself: %s",
            type(model).__name__,
            difference,
        )
    elif difference:
        raise TraceError(
            f"the exported graph of {type(model).__name__} computes something else than the model "
            f"itself with calibration batch {index}: {difference} — code that asks whether it is "
            'being exported, or counts its calls, needs trace="make_fx"'
        )


def _difference(graphs: list[torch.Tensor], models: list[torch.Tensor], tolerance: float) -> str:
    """In which way the graph's outputs are not the model's; empty where they are."""
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (graphs, models)]
    if shapes[0] != shapes[1]:
        return f"its outputs have the shapes {shapes[0]} instead of {shapes[1]}"
    for graph, own in zip(graphs, models, strict=True):
        if not (own.is_floating_point() or own.is_complex()):
            continue
        error, norm = _sizes(graph, own)
        if error > tolerance * norm:
            share = f"{error / norm:.2g} of" if norm else f"{error:.2g} from"
            return f"its outputs differ by {share} their norm"
    return ""


def _sizes(graph: torch.Tensor, own: torch.Tensor) -> tuple[float, float]:
    """‖graph - own‖ and ‖own‖ of what is finite in both, a part at a time: logits are large."""
    error = norm = 0.0
    pairs = zip(*(torch.split(t.reshape(-1), PART) for t in (graph, own)), strict=True)
    for part, wanted in pairs:
        wide = torch.complex128 if wanted.is_complex() else torch.float64
        known = part.to(wanted.device).isfinite() & wanted.isfinite()
        one, other = (t.to(known.device, wide).where(known, 0) for t in (part, wanted))
        error += float((one - other).abs().square().sum())
        norm += float(other.abs().square().sum())
    return math.sqrt(error), math.sqrt(norm)


def _tolerance(model: nn.Module, outputs: list[torch.Tensor]) -> float:
    with contextlib.suppress(StopIteration):
        device = next(model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            return COARSE
    floating = (t.dtype for t in (*model.parameters(), *outputs) if t.is_floating_point())
    return COARSE if any(dtype.itemsize < 4 for dtype in floating) else TOLERANCE


def _copies(leaves: list[Any]) -> list[torch.Tensor]:
    """The tensors, which are the caller's and may be written to; one copy of each."""
    copies = {id(tensor): tensor.clone() for tensor in _tensors(leaves)}
    return [copies[id(tensor)] for tensor in _tensors(leaves)]


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
