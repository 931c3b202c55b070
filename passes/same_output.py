"""Whether an exported graph computes what its model does, on one and the same input.

Code that asks whether it is being exported may do something else then.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import TraceError
from magr_fx.passes.decisions import is_random
from magr_fx.passes.make_fx import writes_undone
from magr_fx.passes.tensors_only import TensorsOnly, registrations_kept
from magr_fx.passes.torch_private import TreeSpec
from magr_fx.passes.trace import Trace, all_nodes, buffers_kept

logger = logging.getLogger("magr_fx")

TOLERANCE = 1e-3  # of ‖graph - model‖ / ‖model‖; the kernels are mostly the same
COARSE = 0.1  # where something is computed in half precision


def check_same_output(
    graph_module: fx.GraphModule, model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec
) -> None:
    """Run both once on the input that the graph was traced with, and compare what they return.

    Nothing keeps what the two runs write. Graphs with random numbers are not compared, nor a model
    whose forward hooks would see one run more, nor an input that one of the two fails on: to say so
    is up to the check of the calibration.

    Args:
        graph_module: by torch.export.
        model: in evaluation mode, its weights in memory.
        index: the place of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Raises:
        TraceError: they return something else.
    """
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if hooked or any(is_random(node) for node in all_nodes(graph_module)):
        return
    try:
        with buffers_kept([Trace(graph_module, ())]):
            graphs = list(graph_module(*_copies(leaves)))
        with (
            torch.compiler.set_stance("force_eager"),
            _attributes_kept(model),
            registrations_kept(model),
            writes_undone(model),
        ):
            wrapper = TensorsOnly(model, leaves, spec)
            wrapper.training = False  # as the model is already
            models = wrapper(*_copies(leaves))
    except Exception as error:  # whatever an op raises on real values
        logger.debug("the exported graph was not compared with its model: %s", error)
        return
    difference = _difference(graphs, models, _tolerance(model, models))
    if difference:
        raise TraceError(
            f"the exported graph of {type(model).__name__} computes something else than the model "
            f"itself with calibration batch {index}: {difference} — code that asks whether it is "
            'being exported, or counts its calls, needs trace="make_fx"'
        )


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restore what forward assigns to attributes of its modules, as torch.export does."""
    saved = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)


def _difference(graphs: list[torch.Tensor], models: list[torch.Tensor], tolerance: float) -> str:
    """In which way the graph's outputs are not the model's; empty where they are."""
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (graphs, models)]
    if shapes[0] != shapes[1]:
        return f"its outputs have the shapes {shapes[0]} instead of {shapes[1]}"
    for graph, own in zip(graphs, models, strict=True):
        if not own.is_floating_point():
            continue
        known = graph.isfinite() & own.isfinite()
        one, other = (t.double().where(known, 0) for t in (graph.to(own.device), own))
        error, norm = (one - other).norm().item(), other.norm().item()
        if error > tolerance * norm:
            share = f"{error / norm:.2g} of" if norm else f"{error:.2g} from"
            return f"its outputs differ by {share} their norm"
    return ""


def _tolerance(model: nn.Module, outputs: list[torch.Tensor]) -> float:
    with contextlib.suppress(StopIteration):
        device = next(model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            return COARSE
    floating = (t.dtype for t in (*model.parameters(), *outputs) if t.is_floating_point())
    return COARSE if any(dtype.itemsize < 4 for dtype in floating) else TOLERANCE


def _copies(leaves: list[Any]) -> list[torch.Tensor]:
    """The tensors, which are the caller's and may be written to; one copy of each."""
    copies = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return [copies[id(leaf)] for leaf in leaves if isinstance(leaf, torch.Tensor)]
