"""Compare two lists of tensors up to rounding, without a copy of either."""

from __future__ import annotations

from collections.abc import Iterator

import torch

PART = 2**20  # numbers that are compared at a time, in float64


def difference(ones: list[torch.Tensor], others: list[torch.Tensor], tolerance: float) -> str:
    """How the first tensors differ from the second; empty if they differ by rounding at most.

    Floating-point and complex values may differ by ``tolerance`` in ‖one - other‖ / ‖other‖. A
    value that is finite in one of the two only is a difference, unless it is nearly the largest
    number of its dtype. Of integers and booleans, such as an argmax, a share of ``tolerance`` may
    differ: rounding changes an argmax only where two values are nearly equal.

    Args:
        ones: the outputs of one run.
        others: the outputs of the other run, which may be on other devices.
        tolerance: the largest difference that is taken for rounding.

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
    """The tensor as a dense one of real numbers."""
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
        # Rounding by one last bit may turn the largest number of the dtype into infinity.
        bounded = [t.nan_to_num(torch.nan, most, -most) for t in (first, second)]
        far = (bounded[0] - bounded[1]).abs() > tolerance * most
        lost = (first.isnan() & second.isfinite()) | (second.isnan() & first.isfinite())
        elsewhere = elsewhere + (~known & (far | lost)).sum()
        error = error + (first - second).where(known, 0).square().sum()
        norm = norm + second.where(known, 0).square().sum()
    if elsewhere.item():
        return f"differ in infinite or NaN values ({int(elsewhere)} of {other.numel()})"
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
    """Corresponding parts of both, in ``dtype`` and on the second one's device."""
    if other.numel() > PART:  # halves are views, whatever the strides
        dim = max(range(other.dim()), key=other.shape.__getitem__)
        for first, second in zip(one.chunk(2, dim), other.chunk(2, dim), strict=True):
            yield from _parts(first, second, dtype)
    else:
        yield one.to(other.device, dtype), other.to(dtype)
