"""Weights that MagR leaves alone for what they are: of other dtypes or layouts, or subclasses.

A model may hold them all the same, and run. They are skipped, each with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from magr_fx.errors import TraceError
from magr_fx.passes.graphs.torchao_private import is_quantized

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_SHOWN = 3  # names in a message


def why_unsupported(tensor: torch.Tensor) -> str | None:
    """Why MagR cannot work on a weight, as what follows its name; None where it can."""
    kind, reason = type(tensor.data), None
    if is_quantized(tensor):
        reason = f"is already quantized by torchao ({kind.__name__})"
    elif tensor.is_nested:
        reason = "is a nested tensor, which is no matrix"
    elif tensor.is_meta:
        reason = "is on the meta device, without values"
    elif tensor.layout is not torch.strided:
        reason = f"is stored as {tensor.layout}, and MagR works on dense matrices"
    elif kind is not torch.Tensor:
        reason = f"is a {kind.__name__}, which cannot be rewritten in place"
    elif tensor.dtype not in SUPPORTED:
        reason = f"is stored as {tensor.dtype}, and MagR works on floating numbers of 16 to 64 bits"
    return reason


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is numbers in memory of its own, at strides: what has an address."""
    return (
        tensor.layout is torch.strided
        and type(tensor.data) is torch.Tensor
        and not (tensor.is_nested or tensor.is_meta)
    )


def has_strides(tensor: torch.Tensor) -> bool:
    """Whether it has a shape and strides, or those of a dense one: not nested, nor compressed."""
    return not tensor.is_nested and tensor.layout not in _COMPRESSED


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its shape; of a nested tensor, which has none, how many tensors it holds."""
    return (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape)


def values_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a tensor's numbers, whatever it is; none on the meta device."""
    if is_plain(tensor):
        yield tensor
    elif hasattr(tensor.data, "__tensor_flatten__"):  # a subclass that is made of other tensors
        for name in tensor.data.__tensor_flatten__()[0]:
            yield from values_of(getattr(tensor.data, name))
    elif tensor.is_nested:
        yield from tensor.unbind()
    elif not tensor.is_meta:
        yield tensor.detach().to_dense()


@contextlib.contextmanager
def unsupported_named(model: nn.Module) -> Iterator[None]:
    """Have the error of a model that cannot be traced name the weights that may be why."""
    try:
        yield
    except TraceError as error:
        blamed = blame(model.named_parameters())
        if not blamed:
            raise
        raise TraceError(f"{error}. {blamed}") from error


def blame(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """That what does not run may do so for these weights; empty if all of them are supported."""
    reasons = ((name, weight, why_unsupported(weight)) for name, weight in weights)
    odd = [f"{name} {shape_of(weight)} {reason}" for name, weight, reason in reasons if reason]
    if not odd:
        return ""
    more = f" (and {len(odd) - _SHOWN} more are)" if len(odd) > _SHOWN else ""
    return (
        f"It may be for its weights: {'; '.join(odd[:_SHOWN])}{more}. Start from the "
        "full-precision, dense model, or convert them: parameter.data.to_dense(), for one, or "
        "parameter.data.to(torch.bfloat16) where it has no scales of its own"
    )
