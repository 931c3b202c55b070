"""PostedMask: which items a mask selects, without leaving the device idle while the host asks."""

from __future__ import annotations

import torch
from torch import Tensor


class PostedMask:
    """A boolean mask ``[items]`` whose count is on its way to the host.

    Boolean indexing makes the host wait for everything that was queued before. Here the count
    starts its way at once; work that is queued between this and :meth:`items` keeps the device
    busy meanwhile.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        count = mask.sum()
        self._arrived: torch.cuda.Event | None = None
        if count.is_cuda:
            self._count = torch.empty((), dtype=count.dtype, device="cpu", pin_memory=True)
            self._count.copy_(count, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._count = count

    def items(self) -> Tensor:
        """The selected indices, in order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        # A stable sort has the selected ones first, and a size that the host knows.
        order = torch.argsort(self._mask.to(torch.int8), descending=True, stable=True)
        return order[: int(self._count)]
