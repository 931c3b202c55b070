"""Rotate the weights of streams, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from magr_fx.passes.rotating.streams import Axis, Fold, Stream


def parameters_of(
    streams: Iterable[Stream], biases: Mapping[Axis, nn.Parameter | None]
) -> list[nn.Parameter]:
    """Every parameter that :func:`rotate_weights` changes."""
    found: dict[int, nn.Parameter] = {}
    for stream in streams:
        for axis in stream.axes:
            found[id(axis.parameter)] = axis.parameter
        for axis, fold in stream.folds.items():
            changed = (fold.weight, fold.shift, biases[axis] if fold.shift is not None else None)
            found |= {id(one): one for one in changed if one is not None}
    return list(found.values())


@torch.no_grad()
def rotate_weights(
    streams: Iterable[tuple[Stream, Tensor]], biases: Mapping[Axis, nn.Parameter | None]
) -> None:
    """Move norms' weights into the weights behind them, and rotate every stream.

    With x the normed value, W the weight that reads it, g and b the norm's weight and shift:
    W(g∘x + b) = (W·diag g)x + W·b. Then every axis of a stream becomes p·Q; of a weight that reads
    (x·Q)(W·Q)ᵀ = x·Wᵀ remains.

    Args:
        streams: with the orthogonal matrix ``[block, block]`` of each.
        biases: of the weights that read a stream.
    """
    streams = list(streams)
    values: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def value(parameter: nn.Parameter) -> Tensor:
        return values.setdefault(id(parameter), (parameter, parameter.detach().double()))[1]

    def change(parameter: nn.Parameter, new: Tensor) -> None:
        values[id(parameter)] = (parameter, new)

    folds: set[Fold] = set()
    for stream, _ in streams:
        for axis, fold in stream.folds.items():
            weight = value(axis.parameter)
            if fold.shift is not None:
                bias = biases[axis]
                if bias is not None:
                    shift = value(fold.shift)
                    added = weight @ shift if axis.at == 1 else weight.T @ shift
                    change(bias, value(bias) + added)
            if fold.weight is not None:
                scale = value(fold.weight) + float(fold.plus_one)
                change(axis.parameter, weight * (scale if axis.at == 1 else scale[:, None]))
            folds.add(fold)
    for fold in folds:
        if fold.weight is not None:
            change(fold.weight, torch.full_like(value(fold.weight), 1.0 - fold.plus_one))
        if fold.shift is not None:
            change(fold.shift, torch.zeros_like(value(fold.shift)))
    for stream, matrix in streams:
        for axis in stream.axes:
            change(axis.parameter, _rotated(value(axis.parameter), axis.at, matrix))
    for parameter, new in values.values():
        parameter.copy_(new)


def _rotated(value: Tensor, at: int, matrix: Tensor) -> Tensor:
    """``value`` with each block of its axis ``at`` multiplied by the matrix."""
    last = value.movedim(at, -1)
    blocks = last.reshape(*last.shape[:-1], -1, len(matrix)) @ matrix.to(value.device)
    return blocks.reshape(last.shape).movedim(-1, at)
