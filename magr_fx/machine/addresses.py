"""The address of a tensor's memory, which tells whether two tensors share it."""

from __future__ import annotations

import torch


def address(tensor: torch.Tensor) -> int | None:
    """The address of a tensor's storage, the same for all its views; None if it has none.

    Empty tensors and tensors on the meta device all have the address 0, although they share no
    memory; a sparse tensor consists of other tensors, which hold the memory. All of these give
    None, so None must not be used as a key.
    """
    if tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()
    return storage.data_ptr() or None if storage.nbytes() else None
