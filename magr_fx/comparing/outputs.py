"""Two models of any kind on the same inputs → how far apart their outputs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from magr_fx.comparing.inputs import arguments_of, running
from magr_fx.comparing.statistics import clustered_mean
from magr_fx.errors import ModelError
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.finding.counted_tokens import Tokens
from magr_fx.passes.graphs.torch_private import tree_leaves
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.reporting.comparison import Outputs


def outputs_of(model: nn.Module, batch: Batch) -> list[tuple[str, Tensor]]:
    """Every floating-point tensor that the model returns, with the name of its output if any."""
    args, kwargs = arguments_of(batch, model)
    with running(model, batch):
        result = model(*args, **kwargs)
    named = result.items() if isinstance(result, Mapping) else [("", result)]
    leaves = ((name, leaf) for name, value in named for leaf in tree_leaves(value))
    tensors = ((str(name), leaf) for name, leaf in leaves if isinstance(leaf, Tensor))
    return [(name, leaf) for name, leaf in tensors if leaf.is_floating_point() and leaf.dim()]


def compare_outputs(
    original: Callable[[int], list[tuple[str, Tensor]]],
    model: nn.Module,
    quantized: nn.Module,
    batches: Sequence[Batch],
    ranks: Ranks,
    progress: bool | None,
) -> Outputs:
    """Compare all output vectors, along the last dimension; those of padding do not count.

    Args:
        original: the number of a batch → the original's outputs.
        model: the original, or one that is called like it.
        quantized: the other model.
        batches: the inputs of both.
        ranks: which share the batches.
        progress: whether to show a bar.

    Raises:
        ModelError: the models return tensors of different shapes, none, or NaN.
    """
    tokens = Tokens(batches, model)
    rows = [torch.empty(0, 5, dtype=torch.float64)]
    # Bars of several ranks would overwrite each other.
    hidden = ranks.rank > 0 or (None if progress is None else not progress)
    for at, batch in enumerate(tqdm(batches, "compare", unit="batch", disable=hidden)):
        if not ranks.owns(at):
            continue
        ours, theirs = original(at), outputs_of(quantized, batch)
        shapes = [[tuple(t.shape) for _, t in each] for each in (ours, theirs)]
        if shapes[0] != shapes[1] or not ours:
            raise ModelError(
                f"the models return floating-point tensors of the shapes {shapes[0]} and "
                f"{shapes[1]}, which cannot be compared"
            )
        for (name, one), (_, other) in zip(ours, theirs, strict=True):
            shape = (one.shape[0], one.shape[1] if one.dim() == 3 else 1)
            keep = tokens.counted(batch, shape, name) if one.dim() == 3 else None
            rows.append(_vectors(one, other.to(one.device), keep, batch, at))
    return _summary(ranks.concat(torch.cat(rows)))


def _vectors(one: Tensor, other: Tensor, keep: Tensor | None, batch: Batch, at: int) -> Tensor:
    """For each vector its window, ŷ·y, ‖ŷ - y‖², ‖y‖² and ‖ŷ‖², ``[vectors, 5]`` in float64."""
    y, made = one.double(), other.double()
    if y.dim() == 1:
        y, made = y[None], made[None]
    same = (y == made) & y.isinf()  # what is masked out, say
    y, made = y.masked_fill(same, 0), made.masked_fill(same, 0)
    window = torch.arange(len(y), device=y.device) + (at << 32)
    window = window.view(-1, *[1] * (y.dim() - 2)).expand(y.shape[:-1])
    product, error = (made * y).sum(-1), (made - y).square().sum(-1)
    norms = y.square().sum(-1), made.square().sum(-1)
    table = torch.stack([window.double(), product, error, *norms], -1)
    table = table.flatten(0, -2) if keep is None else table[keep.to(table.device)]
    if not bool(table.isfinite().all()):
        raise ModelError(f"an output of the models is NaN or infinite in batch {batch.index}")
    return table.cpu()


def _summary(rows: Tensor) -> Outputs:
    window, product, error, norm, own = rows.unbind(-1)
    both = (norm * own).sqrt()
    cosine = torch.where(both > 0, product / both, (norm == own).double())
    _, inverse = np.unique(window.numpy(), return_inverse=True)
    by_window = _ratio(np.bincount(inverse, error.numpy()), np.bincount(inverse, norm.numpy()))
    return Outputs(
        cosine=clustered_mean(cosine.numpy(), inverse),
        relative_error=float(_ratio(error.sum().numpy(), norm.sum().numpy())),
        by_window=by_window.tolist(),
    )


def _ratio(error: Any, norm: Any) -> Any:
    """√(‖ŷ - y‖²/‖y‖²): 0 where both are zero, and infinite where only y is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(np.where(error == 0, 0.0, error / norm))
