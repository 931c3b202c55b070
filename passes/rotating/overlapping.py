"""Parameters that share memory with another tensor of the model."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn


def overlapping(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of which a part is also a part of another tensor, or of itself.

    The other tensor is a parameter or a buffer. A parameter overlaps itself if it was expanded.
    A tied weight is one parameter under two names, and does not count. Two parameters may also be
    views of one tensor: what is written to one then changes the other.
    """
    spans: dict[str, list[tuple[int, int, Tensor]]] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.numel() and tensor.device.type != "meta":
            reach = sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            end = start + (reach + 1) * tensor.element_size()
            spans.setdefault(str(tensor.device), []).append((start, end, tensor))
    found = {id(p): p for p in model.parameters() if _overlaps_itself(p)}
    for on_device in spans.values():
        on_device.sort(key=lambda span: span[:2])
        last, reaching = None, 0
        for start, end, tensor in on_device:
            if last is not None and start < reaching:
                found |= {id(t): t for t in (last, tensor) if isinstance(t, nn.Parameter)}
            if end > reaching:
                last, reaching = tensor, end
    return list(found.values())


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may be one number in memory."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False
