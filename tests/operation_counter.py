"""Counts the products that really run, as PyTorch dispatches them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm_"}


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up ``flops``: a multiplication and an addition are two; in float64 they count twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # torchao's, which runs as the operations that it is made of
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if name in _PRODUCTS:
            times = 2.0 if read[-1].dtype == torch.float64 else 1.0
            self.flops += 2.0 * times * read[-2].numel() * read[-1].shape[-1]
        elif name == "_cholesky_solve_helper":  # with the factor and with its transpose
            self.flops += 2.0 * read[0].numel() * read[1].shape[-1]
        elif name == "addr_":  # a product of one column with one row
            self.flops += 2.0 * read[0].numel()
        return out
