"""Two models of any kind on the same inputs → how far apart their outputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from magr_fx.comparing.inputs import Tokens, arguments_of
from magr_fx.comparing.statistics import clustered_mean
from magr_fx.errors import ModelError
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.graphs.torch_private import tree_leaves
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.reporting.comparison import Outputs


def outputs_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Every floating tensor that the model returns."""
    args, kwargs = arguments_of(batch, model)
    found = (leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor))
    return [leaf for leaf in found if leaf.is_floating_point() and leaf.dim()]


def compare_outputs(
    original: Callable[[int], list[Tensor]],
    quantized: nn.Module,
    batches: Sequence[Batch],
    ranks: Ranks,
    progress: bool | None,
) -> Outputs:
    """Compare all output vectors, along the last dimension; those of padding do not count.

    Args:
        original: the number of a batch → the original's outputs.
        quantized: the other model.
        batches: the inputs of both.
        ranks: which share the batches.
        progress: whether to show a bar.

    Raises:
        ModelError: the models return tensors of different shapes, none, or NaN.
    """
    tokens = Tokens(batches, quantized)
    rows = [torch.empty(0, 5, dtype=torch.float64)]
    hidden = None if progress is None else not (progress and ranks.rank == 0)
    for at, batch in enumerate(tqdm(batches, "compare", unit="batch", disable=hidden)):
        if not ranks.owns(at):
            continue
        ours, theirs = original(at), outputs_of(quantized, batch)
        shapes = [[tuple(t.shape) for t in each] for each in (ours, theirs)]
        if shapes[0] != shapes[1] or not ours:
            raise ModelError(
                f"the models return floating-point tensors of the shapes {shapes[0]} and "
                f"{shapes[1]}, which cannot be compared"
            )
        for one, other in zip(ours, theirs, strict=True):
            rows.append(_vectors(one, other.to(one.device), tokens, batch, at))
    return _summary(ranks.concat(torch.cat(rows)))


def _vectors(one: Tensor, other: Tensor, tokens: Tokens, batch: Batch, at: int) -> Tensor:
    """For each vector its window, ŷ·y, ‖ŷ - y‖², ‖y‖² and ‖ŷ‖², ``[vectors, 5]`` in float64."""
    y, made = one.double(), other.double()
    if y.dim() == 1:
        y, made = y[None], made[None]
    if bool((y.isnan() | made.isnan()).any()):
        raise ModelError(f"an output of the models is NaN in batch {batch.index}")
    window = torch.arange(len(y), device=y.device) + (at << 32)
    window = window.view(-1, *[1] * (y.dim() - 2)).expand(y.shape[:-1])
    sums = (
        (made * y).sum(-1),
        (made - y).square().sum(-1),
        y.square().sum(-1),
        made.square().sum(-1),
    )
    table = torch.stack([window.double(), *sums], -1)
    if y.dim() == 3:
        keep = tokens.counted(batch, *y.shape[:2])
        if keep is not None:
            return table[keep.to(table.device)].cpu()
    return table.flatten(0, -2).cpu()


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
