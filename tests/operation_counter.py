"""Counts what really runs, operation by operation as PyTorch dispatches them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magr_fx.costs.planning import Work

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm_"}
# Operations of each, by the cube of the matrix.
_FACTORS = {"linalg_cholesky_ex": 1 / 3, "cholesky_inverse": 2 / 3, "_linalg_eigh": 4 / 3}


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up a :class:`Work`; a number of float64 counts as two operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # torchao's, which runs as the operations that it is made of
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.work += self._work(func, read, written)
        return out

    @staticmethod
    def _work(func: Any, read: list[torch.Tensor], written: list[torch.Tensor]) -> Work:
        name = func._schema.name.removeprefix("aten::")
        numbers = float(max((t.numel() for t in [*read, *written]), default=0))
        doubled = 2 if any(t.dtype == torch.float64 for t in read) else 1
        if name in _PRODUCTS:
            left, right = read[-2:]
            return Work(products=2.0 * doubled * left.numel() * right.shape[-1])
        if name in _FACTORS:
            return Work(factors=_FACTORS[name] * float(read[0].shape[-1]) ** 3)
        if name == "_cholesky_solve_helper":  # with the factor and with its transpose
            return Work(products=2.0 * read[0].numel() * read[1].shape[-1])
        if name == "addr_":  # a product of one column with one row
            return Work(products=2 * numbers, elementwise=numbers)
        if func.is_view or "attention" in name:  # which is one operation
            numbers = 0.0
        if name == "embedding":  # some rows of a table
            numbers = float(written[0].numel())
        return Work(elementwise=doubled * numbers)
