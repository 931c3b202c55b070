"""Weights that MagR cannot rewrite: other dtypes or layouts, or tensor subclasses.

A model with such weights may run nevertheless. They are skipped, each with its reason.
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
    """Why MagR cannot work on a weight, as text to follow its name; None if it can."""
    kind, reason = type(tensor.data), None
    if is_quantized(tensor):
        reason = f"is already quantized by torchao ({kind.__name__})"
    elif tensor.is_nested:
        reason = "is a nested tensor, which is not a matrix"
    elif tensor.is_meta:
        reason = "is on the meta device, without values"
    elif tensor.layout is not torch.strided:
        reason = f"is stored as {tensor.layout}, but MagR needs a dense matrix"
    elif kind is not torch.Tensor:
        reason = f"is a {kind.__name__}, which cannot be rewritten in place"
    elif tensor.dtype not in SUPPORTED:
        reason = f"is stored as {tensor.dtype}, but MagR needs floating numbers of 16 to 64 bits"
    return reason


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is an ordinary strided tensor, whose elements have memory addresses."""
    return (
        tensor.layout is torch.strided
        and type(tensor.data) is torch.Tensor
        and not (tensor.is_nested or tensor.is_meta)
    )


def has_strides(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor with strides, neither nested nor in a compressed sparse layout."""
    return not tensor.is_nested and tensor.layout not in _COMPRESSED


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its shape; for a nested tensor, which has none, the number of tensors in it."""
    return (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape)


def values_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold the values of any tensor; none for the meta device."""
    if is_plain(tensor):
        yield tensor
    elif hasattr(tensor.data, "__tensor_flatten__"):  # a subclass that wraps other tensors
        for name in tensor.data.__tensor_flatten__()[0]:
            yield from values_of(getattr(tensor.data, name))
    elif tensor.is_nested:
        yield from tensor.unbind()
    elif not tensor.is_meta:
        yield tensor.detach().to_dense()


@contextlib.contextmanager
def unsupported_named(model: nn.Module) -> Iterator[None]:
    """Add the names of unsupported weights, which may be the cause, to a TraceError."""
    try:
        yield
    except TraceError as error:
        blamed = blame(model.named_parameters())
        if not blamed:
            raise
        raise TraceError(f"{error}. {blamed}") from error


def blame(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The sentences that name unsupported weights as a possible cause; empty without any."""
    reasons = ((name, weight, why_unsupported(weight)) for name, weight in weights)
    odd = [f"{name} {shape_of(weight)} {reason}" for name, weight, reason in reasons if reason]
    if not odd:
        return ""
    more = f" (and {len(odd) - _SHOWN} more)" if len(odd) > _SHOWN else ""
    return (
        f"The cause may be these weights: {'; '.join(odd[:_SHOWN])}{more}. Start from the "
        "full-precision, dense model, or convert them, for example by parameter.data.to_dense(), "
        "or by parameter.data.to(torch.bfloat16) if the weight has no separate scales"
    )
