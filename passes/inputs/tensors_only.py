"""A model call as a function of tensors only: tracers need one."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from magr_fx.passes.graphs.module_calls import CallLog
from magr_fx.passes.graphs.torch_private import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

# Types of immutable constants whose repr shows the whole value (neither is true of NumPy arrays).
PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def own_arguments(arguments: Any) -> Any:
    """A call's arguments, with copies of all that forward could change: tensors, caches, lists.

    An object that is passed twice is copied once: self-attention, for instance, checks whether its
    arguments are the same tensor.
    """
    leaves, spec = tree_flatten(arguments)
    copies: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            copies.setdefault(id(leaf), leaf.detach().clone())
        elif not isinstance(leaf, PLAIN):
            copies.setdefault(id(leaf), copy.deepcopy(leaf))
    return tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], spec)


class TensorsOnly(nn.Module):
    """``model`` as a function of its input tensors; all other arguments are constants.

    It takes a flat list of tensors and returns one, so that export does not depend on the names,
    nesting, ``**kwargs`` and constants of the model's signature, nor on the type of its output.
    """

    def __init__(self, model: nn.Module, leaves: list[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.model = model
        self.signature = inspect.signature(model.forward)
        self.spec = spec
        self.log = CallLog()  # the modules that get an input tensor unchanged
        self.is_tensor = [isinstance(x, torch.Tensor) for x in leaves]
        # Copies of all that forward could change: a cache would keep the tracer's fake tensors.
        self.constants = [
            None if tensor else x if isinstance(x, PLAIN) else copy.deepcopy(x)
            for x, tensor in zip(leaves, self.is_tensor, strict=True)
        ]

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        leaves = [
            next(given) if is_tensor else constant
            for is_tensor, constant in zip(self.is_tensor, self.constants, strict=True)
        ]
        bound = inspect.BoundArguments(self.signature, tree_unflatten(leaves, self.spec))
        with self.log.noting(self.model, tensors):
            output = self.model(*bound.args, **bound.kwargs)
        return output_tensors(output)


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor that a model returns, in order, also those in dataclasses and other objects.

    Key-value caches of transformers are left out, as they are where they are switched off.
    """
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                found.append(leaf)
            elif id(leaf) not in seen and not isinstance(leaf, (*PLAIN, type, nn.Module)):
                seen.add(id(leaf))
                if not hasattr(leaf, "get_seq_length"):
                    walk(list(_fields(leaf)))

    walk(output)
    return found


def _fields(leaf: Any) -> Iterator[Any]:
    """What an object holds, by its dataclass fields, slots or attributes."""
    if dataclasses.is_dataclass(leaf):
        for field in dataclasses.fields(leaf):
            yield getattr(leaf, field.name, None)
        return
    yield from getattr(leaf, "__dict__", {}).values()
    for kind in type(leaf).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(leaf, name, None)
