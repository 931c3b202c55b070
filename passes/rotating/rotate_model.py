"""Rotate the streams of a model: trace it, find them, rotate, and prove the outputs unchanged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn

from magr_fx.errors import ModelError, brief
from magr_fx.passes.graphs.decisions import State, random_state, torch_state
from magr_fx.passes.graphs.trace import Trace, calibration_mode
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import output_tensors, own_arguments
from magr_fx.passes.rotating.find_streams import find_streams
from magr_fx.passes.rotating.orthogonal import random_orthogonal
from magr_fx.passes.rotating.rotate_weights import parameters_of, rotate_weights
from magr_fx.passes.rotating.untie import UntiedHeads
from magr_fx.passes.tracing.compare_outputs import difference
from magr_fx.passes.tracing.make_fx import side_effects_undone
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.same_output import tolerance_of
from magr_fx.passes.tracing.trace_batches import Tracing
from magr_fx.reporting.rotation import Rotation

logger = logging.getLogger("magr_fx")
DOUBLE = 1e-9  # the tolerance where everything is computed in float64


def rotate(
    model: nn.Module, batches: list[Batch], tracing: Tracing, seed: int, *, untie: bool
) -> list[Rotation]:
    """Rotate every stream that can be, each by a random orthogonal matrix of its own.

    Args:
        model: unwrapped and checked, in memory as a whole.
        batches: the calibration: the model is traced on it, and compared on the first batch of
            each trace.
        tracing: how to trace.
        seed: of the matrices.
        untie: give heads that are tied to an embedding a weight of their own, where that lets a
            stream be rotated and changes no output.

    Returns:
        One for each stream that a weight reads.

    Raises:
        TraceError: the model cannot be traced.
        ModelError: the outputs change; the model is then as it was.
    """
    with calibration_mode(model), contextlib.ExitStack() as undone:
        state = torch_state({p.device for p in model.parameters()})
        untied = _untied(model, batches[0], state) if untie else None
        if untied is not None:
            undone.callback(untied.tie)  # unless all goes well
        traced = trace_or_read(model, batches, tracing)
        streams, biases = find_streams(dict.fromkeys(b.trace for b in traced), model)
        generator = torch.Generator().manual_seed(seed)
        chosen = [
            (s, random_orthogonal(s.block, generator, keeps_mean=s.keeps_mean))
            for s, _ in streams
            if not s.fixed
        ]
        changed = parameters_of((s for s, _ in chosen), biases)
        first: dict[Trace, Batch] = {}
        for one, batch in zip(traced, batches, strict=True):
            first.setdefault(one.trace, batch)
        before = [(batch, _outputs(model, batch, state)) for batch in first.values()]
        if chosen and not all(known for _, known in before):
            raise ModelError(
                f"{type(model).__name__} returns no tensor, so a rotation cannot be checked; "
                "nothing was changed"
            )
        with _restored_on_error(changed):
            rotate_weights(chosen, biases)
            for batch, known in before:
                _check(model, batch, known, state)
        if untied is not None:
            untied.tie(unless={id(parameter) for parameter in changed})
            logger.info("untied heads: %.1f MB more", untied.nbytes / 1e6)
        undone.pop_all()
    return [Rotation(name, s.block, len(s.axes), s.fixed) for s, name in streams]


def _untied(model: nn.Module, batch: Batch, state: State) -> UntiedHeads:
    """Untie the heads, if the model then still computes the same.

    Some models read in their configuration whether the head is tied, and compute something else.
    """
    before = _outputs(model, batch, state)
    untied = UntiedHeads(model)
    try:
        found = _changed(model, batch, before, state)
    except BaseException:
        untied.tie()
        raise
    if found:
        logger.warning(
            "%s computes something else when its head is untied: its outputs %s; the head stays "
            "tied",
            *(type(model).__name__, found),
        )
        untied.tie()
    return untied


def _check(model: nn.Module, batch: Batch, before: list[torch.Tensor], state: State) -> None:
    """Compare the rotated model's outputs with those of before.

    Raises:
        ModelError: they differ.
    """
    found = _changed(model, batch, before, state)
    if found:
        raise ModelError(
            "rotated, the model computes something else with calibration batch "
            f"{batch.index}: its outputs {found}. It is as it was; leave the rotation out"
        )


def _changed(model: nn.Module, batch: Batch, before: list[torch.Tensor], state: State) -> str:
    """How the outputs differ from those of before; empty if they do not.

    The tolerance is that of other comparisons, but less where all is computed in float64.
    """
    floating = [t.dtype for t in (*model.parameters(), *before) if t.is_floating_point()]
    double = bool(floating) and all(dtype == torch.float64 for dtype in floating)
    tolerance = DOUBLE if double else tolerance_of(model, before)
    return difference(_outputs(model, batch, state), before, tolerance)


@contextlib.contextmanager
def _restored_on_error(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give the parameters their values back if the block raises, or is interrupted."""
    kept = [parameter.detach().cpu().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        failed = None
        for parameter, value in zip(parameters, kept, strict=True):
            try:
                with torch.no_grad():
                    parameter.copy_(value)
            except RuntimeError as error:  # the others are restored all the same
                failed = error
        if failed is not None:
            raise ModelError(
                f"a rotation failed, and a weight could not be restored: {brief(failed)}. Load the "
                "model again"
            ) from failed
        raise


def _outputs(model: nn.Module, batch: Batch, state: State) -> list[torch.Tensor]:
    """The tensors that the model gives for a batch; it changes nothing of the caller's."""
    args, kwargs = own_arguments((batch.args, batch.kwargs))
    torch.clear_autocast_cache()  # it holds casts of the weights as they were
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            random_state(state),
            side_effects_undone(model),
        ):
            return output_tensors(model(*args, **kwargs))
    finally:
        torch.clear_autocast_cache()
