"""Check that an exported graph computes what its model computes, on the same input.

Model code that checks whether it is being exported may compute something else during the export.
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
from magr_fx.passes.tracing.make_fx import ReadersSeen, side_effects_undone
from magr_fx.passes.tracing.two_rows import TwoRows, two_rows

logger = logging.getLogger("magr_fx")

# Of ‖graph - model‖ / ‖model‖. On a CPU the graph of nearly every model gives the same bits, in
# half precision as well. A graph that is refused for its rounding alone does no harm: the model is
# then traced by make_fx, whose graph is right.
TOLERANCE = 1e-4
COARSE = 0.03  # if anything is computed in half precision


def check_same_output(
    graph_module: fx.GraphModule, model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec
) -> None:
    """Run the graph and the model on the input of the trace, and compare their outputs.

    They run on two rows of the input if these suffice (:mod:`~magr_fx.passes.tracing.two_rows`),
    otherwise on all rows. Both runs draw the same random numbers, and what they write is restored.
    The model's own hooks run, because they are a part of what it computes.

    If the two cannot be compared, a warning is logged. This is so if the model does not run, if the
    two outputs do not fit into memory, or if the model draws random numbers and its outputs differ
    from run to run with the same state of torch's generators. If the model's outputs are the same
    in each run, and the graph's are others, the graph is refused. make_fx can trace such a model.

    Args:
        graph_module: made by torch.export.
        model: in evaluation mode, its weights in memory.
        index: the position of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Raises:
        TraceError: the outputs differ, or the graph fails where the model runs.
    """
    try:
        found = _compare(graph_module, model, leaves, spec)
    except Exception as error:  # the model may raise anything on real values
        logger.warning(
            "the exported graph of %s could not be compared with the model itself (calibration "
            "batch %d), and is used without this check: %s: %s",
            *(type(model).__name__, index, type(error).__name__, first_line(error)),
        )
        return
    if found:
        raise TraceError(
            f"the exported graph of {type(model).__name__} computes something else than the model "
            f"itself with calibration batch {index}: {found} — code that checks whether it is "
            'being exported, or counts its calls, needs trace="make_fx"'
        )


def _compare(
    graph_module: fx.GraphModule, model: nn.Module, leaves: list[Any], spec: TreeSpec
) -> str:
    """How the graph's outputs differ from the model's; empty if they do not.

    Raises:
        Exception: the model does not run, or draws different random numbers each time.
    """
    state = torch_state({t.device for t in (*attributes(graph_module), *_tensors(leaves))})
    rows = two_rows(graph_module, leaves, spec)
    if rows is not None and _agree_on(rows, graph_module, model, spec, state):
        return ""
    failure, graphs = "", list[torch.Tensor]()
    try:
        graphs = _run_graph(graph_module, leaves, state)
    except Exception as error:  # an op may raise anything on real values
        if is_out_of_memory(error):
            raise
        failure = f"it fails with {type(error).__name__}: {first_line(error)}"
    models, _ = _run(model, leaves, spec, state)
    if failure:
        return failure
    tolerance = tolerance_of(model, models)
    found = difference(graphs, models, tolerance)
    if not found:
        return ""
    graphs.clear()
    if any(is_random(node) for node in all_nodes(graph_module)):
        again = difference(_run(model, leaves, spec, state)[0], models, tolerance)
        if again:
            raise RuntimeError("the model draws random numbers outside torch's generators")
    return f"its outputs {found}"


def _agree_on(
    rows: TwoRows, graph_module: fx.GraphModule, model: nn.Module, spec: TreeSpec, state: State
) -> bool:
    """Whether both return the same for the row that they share, and the model reads no value.

    If not, nothing is decided: all rows have to be compared.
    """
    try:
        graphs = rows.shared(_run_graph(graph_module, rows.of_graph, state))
        models, reads_values = _run(model, rows.of_model, spec, state, watched=True)
        models = rows.shared(models)
        return not reads_values and not difference(graphs, models, tolerance_of(model, models))
    except Exception:  # anything: the run on all rows then reports it
        return False


def _run_graph(
    graph_module: fx.GraphModule, leaves: list[Any], state: State | None
) -> list[torch.Tensor]:
    """The outputs of the graph with the random ``state``; its buffers are restored."""
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
    """The outputs of the model with the random ``state``, and whether it read any tensor's values.

    The latter is reliable only if ``watched``. All that the model writes is restored.
    """
    with (
        torch.compiler.set_stance("force_eager"),
        random_state(state),
        side_effects_undone(model) as seen,
        ReadersSeen(seen) if watched else contextlib.nullcontext(),
    ):
        wrapper = TensorsOnly(model, leaves, spec)
        wrapper.training = False  # the model is in evaluation mode already
        outputs: list[torch.Tensor] = wrapper(*_copies(leaves))
        return outputs, seen.reads_values


def tolerance_of(model: nn.Module, outputs: list[torch.Tensor]) -> float:
    """What is taken for rounding, by the coarsest dtype that anything is computed in."""
    with contextlib.suppress(StopIteration):
        device = next(model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            return COARSE
    floating = (t.dtype for t in (*model.parameters(), *outputs) if t.is_floating_point())
    return COARSE if any(dtype.itemsize < 4 for dtype in floating) else TOLERANCE


def _copies(leaves: list[Any]) -> list[torch.Tensor]:
    """Copies of the caller's tensors, which may be written to; one copy of each object."""
    copies = {id(tensor): tensor.clone() for tensor in _tensors(leaves)}
    return [copies[id(tensor)] for tensor in _tensors(leaves)]


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
