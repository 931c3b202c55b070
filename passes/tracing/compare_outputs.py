"""In which way one list of tensors is another one, up to rounding, without a copy of either."""

from __future__ import annotations

from collections.abc import Iterator

import torch

PART = 2**20  # numbers that are compared at a time, in float64


def difference(ones: list[torch.Tensor], others: list[torch.Tensor], tolerance: float) -> str:
    """What tells the first tensors from the second ones; empty where that is rounding at most.

    Floating-point and complex values may differ by ``tolerance`` in ‖one - other‖ / ‖other‖. Where
    one is finite and the other is not, that is a difference, unless the one is all but the largest
    number of its dtype. Integers and truth values, such as an argmax, may differ in this share of
    their places: rounding turns an argmax over only where two values are all but the same.

    Args:
        ones: the outputs of one run.
        others: those of the other run, which may be on other devices.
        tolerance: how much is rounding.

    Returns:
        The end of a sentence that begins with "its outputs".
    """
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (ones, others)]
    if shapes[0] != shapes[1]:
        return f"have the shapes {shapes[0]} instead of {shapes[1]}"
    for one, other in zip(map(_dense, ones), map(_dense, others), strict=True):
        if one.is_floating_point() != other.is_floating_point():
            return f"have values of {one.dtype} instead of {other.dtype}"
        compare = _floating if other.is_floating_point() else _whole
        found = compare(one, other, tolerance)
        if found:
            return found
    return ""


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as an array of real numbers."""
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _floating(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> str:
    error = norm = other.new_zeros((), dtype=torch.float64)
    elsewhere = other.new_zeros((), dtype=torch.int64)
    most = min(torch.finfo(t.dtype).max for t in (one, other))
    for first, second in _parts(one, other, torch.float64):
        known = first.isfinite() & second.isfinite()
        # What is infinite may have been the largest number of its dtype but for the last bit.
        bounded = [t.nan_to_num(torch.nan, most, -most) for t in (first, second)]
        far = (bounded[0] - bounded[1]).abs() > tolerance * most
        lost = (first.isnan() & second.isfinite()) | (second.isnan() & first.isfinite())
        elsewhere = elsewhere + (~known & (far | lost)).sum()
        error = error + (first - second).where(known, 0).square().sum()
        norm = norm + second.where(known, 0).square().sum()
    if elsewhere.item():
        return f"are finite in other places, {int(elsewhere)} of {other.numel()}"
    error, norm = error.sqrt(), norm.sqrt()
    if error.item() > tolerance * norm.item():
        share = f"{float(error / norm):.2g} of" if norm.item() else f"{float(error):.2g} from"
        return f"differ by {share} their norm"
    return ""


def _whole(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> str:
    differ = other.new_zeros((), dtype=torch.int64)
    for first, second in _parts(one, other, torch.int64):
        differ = differ + (first != second).sum()
    if differ.item() > tolerance * other.numel():
        return f"differ in {int(differ)} of {other.numel()} integers"
    return ""


def _parts(
    one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in parts that belong together, in one dtype and on the second one's device."""
    if other.numel() > PART:  # halves are views, whatever the strides
        dim = max(range(other.dim()), key=other.shape.__getitem__)
        for first, second in zip(one.chunk(2, dim), other.chunk(2, dim), strict=True):
            yield from _parts(first, second, dtype)
    else:
        yield one.to(other.device, dtype), other.to(dtype)
