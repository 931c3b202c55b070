"""Whether an exported graph computes what its model does, on one and the same input.

Code that asks whether it is being exported may do something else then.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import TraceError, first_line
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.quiet import torch_silenced
from magr_fx.passes.graphs.decisions import State, is_random, random_state, torch_state
from magr_fx.passes.graphs.torch_private import TreeSpec
from magr_fx.passes.graphs.trace import Trace, all_nodes, attributes, buffers_kept
from magr_fx.passes.inputs.tensors_only import TensorsOnly
from magr_fx.passes.tracing.compare_outputs import difference
from magr_fx.passes.tracing.make_fx import ReadersSeen, nothing_kept
from magr_fx.passes.tracing.two_rows import TwoRows, two_rows

logger = logging.getLogger("magr_fx")

# Of ‖graph - model‖ / ‖model‖. On a CPU the graph of nearly every model gives the same bits, in
# half precision as well. What this refuses for its rounding is traced by make_fx, which is right.
TOLERANCE = 1e-4
COARSE = 0.03  # where something is computed in half precision


def check_same_output(
    graph_module: fx.GraphModule, model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec
) -> None:
    """Run both once on the input that the graph was traced with, and compare what they return.

    On two rows of it where these tell as much (:mod:`~magr_fx.passes.tracing.two_rows`), else
    on all. Both draw the same random numbers, and nothing keeps what the two runs write. The
    model's own hooks run, as they are a part of what it computes.

    What cannot be compared is told by a warning: a model that does not run, two outputs that do
    not fit into memory, and a model that draws random numbers and does not repeat itself from the
    same state of torch's generators. One that does repeat itself, and whose graph does not say the
    same, is refused: ``make_fx`` takes it as it runs.

    Args:
        graph_module: by torch.export.
        model: in evaluation mode, its weights in memory.
        index: the place of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Raises:
        TraceError: the graph returns something else, or fails where the model runs.
    """
    try:
        found = _compare(graph_module, model, leaves, spec)
    except Exception as error:  # whatever the model raises on real values
        logger.warning(
            "the exported graph of %s could not be compared with the model itself (calibration "
            "batch %d): %s: %s",
            *(type(model).__name__, index, type(error).__name__, first_line(error)),
        )
        return
    if found:
        raise TraceError(
            f"the exported graph of {type(model).__name__} computes something else than the model "
            f"itself with calibration batch {index}: {found} — code that asks whether it is "
            'being exported, or counts its calls, needs trace="make_fx"'
        )


def _compare(
    graph_module: fx.GraphModule, model: nn.Module, leaves: list[Any], spec: TreeSpec
) -> str:
    """What tells the graph from the model; empty where nothing does.

    Raises:
        Exception: the model does not run, or draws other random numbers each time.
    """
    state = torch_state({t.device for t in (*attributes(graph_module), *_tensors(leaves))})
    rows = two_rows(graph_module, leaves, spec)
    if rows is not None and _agree_on(rows, graph_module, model, spec, state):
        return ""
    failure, graphs = "", list[torch.Tensor]()
    try:
        graphs = _run_graph(graph_module, leaves, state)
    except Exception as error:  # whatever an op raises on real values
        if is_out_of_memory(error):
            raise
        failure = f"it fails with {type(error).__name__}: {first_line(error)}"
    models, _ = _run(model, leaves, spec, state)
    if failure:
        return failure
    tolerance = _tolerance(model, models)
    found = difference(graphs, models, tolerance)
    if not found:
        return ""
    graphs.clear()
    if any(is_random(node) for node in all_nodes(graph_module)):
        again = difference(_run(model, leaves, spec, state)[0], models, tolerance)
        if again:
            raise RuntimeError("it draws random numbers from elsewhere than torch's generators")
    return f"its outputs {found}"


def _agree_on(
    rows: TwoRows, graph_module: fx.GraphModule, model: nn.Module, spec: TreeSpec, state: State
) -> bool:
    """Whether both return the same for the row that they share, and the model looks at no value.

    False decides nothing: then all rows have to be compared.
    """
    try:
        graphs = rows.shared(_run_graph(graph_module, rows.of_graph, state))
        models, reads_values = _run(model, rows.of_model, spec, state, watched=True)
        models = rows.shared(models)
        return not reads_values and not difference(graphs, models, _tolerance(model, models))
    except Exception:  # whatever either raises: all rows will tell what it is
        return False


def _run_graph(
    graph_module: fx.GraphModule, leaves: list[Any], state: State | None
) -> list[torch.Tensor]:
    """What the graph returns when it draws from ``state``; no buffer keeps what it writes."""
    with buffers_kept([Trace(graph_module, ())]), random_state(state), torch_silenced():
        return list(graph_module(*_copies(leaves)))


def _run(
    model: nn.Module,
    leaves: list[Any],
    spec: TreeSpec,
    state: State | None,
    *,
    watched: bool = False,
) -> tuple[list[torch.Tensor], bool]:
    """What the model returns when it draws from ``state``; nothing keeps what it writes.

    If it is ``watched``, also whether it looked at the values of any tensor on its way.
    """
    with (
        torch.compiler.set_stance("force_eager"),
        random_state(state),
        nothing_kept(model) as seen,
        ReadersSeen(seen) if watched else contextlib.nullcontext(),
    ):
        wrapper = TensorsOnly(model, leaves, spec)
        wrapper.training = False  # as the model is already
        outputs: list[torch.Tensor] = wrapper(*_copies(leaves))
        return outputs, seen.reads_values


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
