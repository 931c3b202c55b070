"""A call of a model as a function of its tensors alone, which is what tracers take."""

from __future__ import annotations

import copy
import enum
import inspect
from typing import Any

import torch
from torch import nn

from magr_fx.passes.graphs.module_calls import CallLog
from magr_fx.passes.graphs.torch_private import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

# Constants that cannot change, and that print all that they are (a NumPy array does neither).
PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def own_arguments(arguments: Any) -> Any:
    """Copies of a call's arguments, of whatever forward could change: tensors, caches, lists.

    What is one object stays one: self-attention, for one, asks which arguments are the same.
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
    """``model`` as a function of its input tensors alone, everything else frozen.

    Export then sees one flat list of tensors: names, nesting, ``**kwargs`` and constants of the
    model's signature make no difference, nor does the type that the model returns.
    """

    def __init__(self, model: nn.Module, leaves: list[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.model = model
        self.signature = inspect.signature(model.forward)
        self.spec = spec
        self.log = CallLog()  # of modules that are given an input as it is
        self.is_tensor = [isinstance(x, torch.Tensor) for x in leaves]
        # Copies of whatever forward could change: a cache would keep the tracer's fake tensors.
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
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
