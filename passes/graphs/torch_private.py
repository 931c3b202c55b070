"""Private names of torch that several files use; all of them import these names from here.

A private name that is used in one file only is in that file. tests/test_private_api.py lists each
of them with what is relied on, and fails if that changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "GetAttrKey",
    "HigherOrderOperator",
    "MappingKey",
    "OpOverload",
    "OperatorBase",
    "TreeSpec",
    "expression_of",
    "is_fake",
    "schema_of",
    "statically_known_true",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "version_of",
]


def expression_of(size: torch.SymInt) -> Any:
    """A dynamic size as a sympy expression: a symbol, or a formula with ``free_symbols``."""
    return size.node.expr


def schema_of(op: Any) -> Any:
    """The op's schema, with its ``name`` and ``is_mutable``; None for anything but an op."""
    return op._schema if isinstance(op, OpOverload) else None


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is a tracer's tensor without values, for example that of torch.export."""
    return isinstance(tensor, FakeTensor)


def version_of(tensor: torch.Tensor) -> int:
    """A counter of the in-place writes to the tensor, and to all views of the same memory."""
    version: int = tensor._version
    return version
