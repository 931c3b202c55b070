"""Rotate the streams of a model: trace it, find them, rotate, and prove the outputs unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from magr_fx.errors import ModelError
from magr_fx.passes.graphs.torch_private import tree_leaves, tree_map
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.rotating.find_streams import find_streams
from magr_fx.passes.rotating.orthogonal import random_orthogonal
from magr_fx.passes.rotating.rotate_weights import parameters_of, rotate_weights
from magr_fx.passes.tracing.compare_outputs import difference
from magr_fx.passes.tracing.make_fx import side_effects_undone
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.same_output import COARSE, TOLERANCE
from magr_fx.passes.tracing.trace_batches import Tracing
from magr_fx.reporting.rotation import Rotation


def rotate(model: nn.Module, batches: list[Batch], tracing: Tracing, seed: int) -> list[Rotation]:
    """Rotate every stream that can be, each by a random orthogonal matrix of its own.

    Args:
        model: unwrapped and checked, in memory as a whole.
        batches: the calibration: the model is traced on it, and compared on its first batch.
        tracing: how to trace.
        seed: of the matrices.

    Returns:
        One for each stream that a weight reads.

    Raises:
        TraceError: the model cannot be traced.
        ModelError: the outputs change; the model is then as it was.
    """
    with calibration_mode(model):
        traced = trace_or_read(model, batches, tracing)
        streams, biases = find_streams(dict.fromkeys(b.trace for b in traced), model)
        generator = torch.Generator().manual_seed(seed)
        chosen = [
            (s, random_orthogonal(s.block, generator, keeps_mean=s.keeps_mean))
            for s, _ in streams
            if not s.fixed
        ]
        changed = parameters_of((s for s, _ in chosen), biases)
        before = _outputs(model, batches[0])
        with _restored_on_error(changed):
            rotate_weights(chosen, biases)
            found = difference(_outputs(model, batches[0]), before, _tolerance(model))
            if found:
                raise ModelError(
                    "rotated, the model computes something else with calibration batch "
                    f"{batches[0].index}: its outputs {found}. It is as it was; leave the rotation "
                    "out"
                )
    return [Rotation(name, s.block, len(s.axes), s.fixed) for s, name in streams]


def untie_heads(model: nn.Module) -> int:
    """Give every linear that shares its weight with an embedding a copy of its own.

    Returns:
        The bytes that the copies take.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    added = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            old = module.weight
            module.weight = nn.Parameter(old.detach().clone(), old.requires_grad)
            added += old.nbytes
    config: Any = getattr(model, "config", None)
    if added and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # transformers would tie them again when it loads them
    return added


@contextlib.contextmanager
def _restored_on_error(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give the parameters their values back if the block raises, or is interrupted."""
    kept = [parameter.detach().cpu().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        raise


def _outputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The tensors that the model gives for a batch, which it does not change."""
    args, kwargs = tree_map(_copied, (batch.args, batch.kwargs))
    with torch.compiler.set_stance("force_eager"), side_effects_undone(model):
        outputs = model(*args, **kwargs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _tolerance(model: nn.Module) -> float:
    """What is taken for rounding, by the coarsest dtype of the model's weights."""
    wide = (torch.float32, torch.float64)
    coarse = any(p.dtype not in wide for p in model.parameters() if p.is_floating_point())
    return COARSE if coarse else TOLERANCE
