"""Names of torch without a promise that they stay, which several files use: all from here.

A private name that one file alone uses is in that file. tests/test_private_api.py lists each of
them, says what is relied on, and fails where that changes.
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
    """What an open size is in sympy: a symbol, or a formula with ``free_symbols``."""
    return size.node.expr


def schema_of(op: Any) -> Any:
    """The op's schema, with its ``name`` and ``is_mutable``; None for what is no op of torch."""
    return op._schema if isinstance(op, OpOverload) else None


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it has no values, and is of a tracer: torch.export's, for one."""
    return isinstance(tensor, FakeTensor)


def version_of(tensor: torch.Tensor) -> int:
    """A number that grows with every write to the tensor, or to another that shares its memory."""
    version: int = tensor._version
    return version
