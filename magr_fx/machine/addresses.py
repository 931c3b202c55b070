"""Where a tensor's memory is: what tells the memory of one tensor from that of another."""

from __future__ import annotations

import torch


def address(tensor: torch.Tensor) -> int | None:
    """The address of a tensor's storage, the same for all its views; None where there is none.

    Empty tensors, and those on the meta device, all say 0, though none of them is another's: look
    None up nowhere. A sparse tensor is made of others, which have the memory.
    """
    if tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()
    return storage.data_ptr() or None if storage.nbytes() else None
