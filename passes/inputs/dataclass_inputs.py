"""Lets torch's pytree find the tensors in dataclasses among a model's inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree


@contextlib.contextmanager
def dataclasses_open(values: Any) -> Iterator[None]:
    """Register the dataclasses among ``values`` with torch's pytree inside the context.

    This relies on private functions of torch, because only those can remove a type again: the
    registry is the same before and after.
    """
    with contextlib.ExitStack() as registered:
        for kind in _kinds(values):
            names = [field.name for field in fields(kind)]
            _register(kind, names)
            registered.callback(pytree._deregister_pytree_node, kind)
        yield


def _kinds(values: Any) -> list[type[Any]]:
    """The types of the dataclasses that pytree treats as leaves, with those nested in them."""
    found: dict[type[Any], None] = {}
    pending = pytree.tree_leaves(values)
    while pending:
        value = pending.pop()
        if not is_dataclass(value) or isinstance(value, type) or not _is_its_fields(value):
            continue
        found[type(value)] = None
        pending.extend(pytree.tree_leaves([getattr(value, f.name) for f in fields(value)]))
    return list(found)


def _is_its_fields(value: Any) -> bool:
    """Whether a dataclass holds all its fields, and no other attribute."""
    names = {field.name for field in fields(value)}
    held = set(getattr(value, "__dict__", names))
    return held <= names and all(hasattr(value, name) for name in names)


def _register(kind: type[Any], names: list[str]) -> None:
    def flatten(value: Any) -> tuple[list[Any], list[str]]:
        return [getattr(value, name) for name in names], names

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[str]]:
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in names], names

    def unflatten(children: Iterable[Any], context: Any) -> Any:
        made = object.__new__(kind)  # its __init__ may change the values
        for name, child in zip(context, children, strict=True):
            object.__setattr__(made, name, child)
        return made

    pytree._private_register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
