"""A call of a model as a function of its tensors alone, which is what tracers take."""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from magr_fx.passes.torch_private import TreeSpec, tree_leaves, tree_unflatten

# Constants that cannot change, and that print all that they are (a NumPy array does neither).
PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


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
        output = self.model(*bound.args, **bound.kwargs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def registrations_kept(model: nn.Module) -> Iterator[None]:
    """Take away what forward registers while it is traced, which may be fake tensors.

    Raises:
        RuntimeError: forward made parameters, which the trace would then have instead of them.
    """
    registries: list[dict[str, Any]] = [
        registry
        for module in model.modules()
        for registry in (module._parameters, module._buffers, module._modules)
    ]
    saved = [dict(registry) for registry in registries]
    parameters = [id(parameter) for parameter in model.parameters()]
    try:
        yield
        if [id(parameter) for parameter in model.parameters()] != parameters:
            raise RuntimeError("forward creates parameters; run the model on one input first")
    finally:
        for registry, before in zip(registries, saved, strict=True):
            registry.clear()
            registry.update(before)
