"""One call of a model → its aten graph, by torch.export with dynamic shapes."""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from magr_fx.errors import TraceError

# Constants that cannot change, and that print all that they are (a NumPy array does neither).
PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def export(model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec) -> fx.GraphModule:
    """The graph of ``model`` as a function of the tensors among ``leaves``, all else frozen.

    Args:
        model: its Parameter objects become the graph's own.
        index: the place of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Raises:
        TraceError: torch.export refused the model.
    """
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    # A dimension of 1 (or 0) is always specialised by export: asking for it only logs a warning.
    shapes = tuple(
        {dim: torch.export.Dim.AUTO for dim, size in enumerate(t.shape) if size > 1}
        for t in tensors
    )
    parameters = [id(parameter) for parameter in model.parameters()]
    try:
        with _registrations_kept(model), warnings.catch_warnings():
            wrapper = _TensorsOnly(model, leaves, spec)
            wrapper.training = False  # as the model is already
            # That forward assigned a tensor to an attribute, which export then puts back.
            warnings.filterwarnings("ignore", "The tensor attribute")
            exported = torch.export.export(
                wrapper, tensors, strict=False, dynamic_shapes=(shapes,) if tensors else None
            )
            if [id(parameter) for parameter in model.parameters()] != parameters:
                raise RuntimeError("forward creates parameters; run the model on one input first")
        graph_module = exported.module()
    except Exception as error:  # export lets through whatever the model's own code raises
        message = next((line for line in str(error).splitlines() if line.strip()), "no message")
        remedy = "check that the model itself runs on this batch"
        if "data-dependent" in str(error).lower():
            remedy = "control flow that depends on tensor values cannot be exported"
        raise TraceError(
            f"torch.export cannot trace {type(model).__name__} with calibration batch {index}: "
            f"{type(error).__name__}: {message.strip()} — {remedy}"
        ) from error
    _strip_wrapper(graph_module)
    return graph_module


@contextlib.contextmanager
def _registrations_kept(model: nn.Module) -> Iterator[None]:
    """Take away what forward registers while it is traced: it is made of fake tensors."""
    registries: list[dict[str, Any]] = [
        registry
        for module in model.modules()
        for registry in (module._parameters, module._buffers, module._modules)
    ]
    saved = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, before in zip(registries, saved, strict=True):
            registry.clear()
            registry.update(before)


class _TensorsOnly(nn.Module):
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


def _strip_wrapper(graph_module: fx.GraphModule) -> None:
    """Take the wrapper's own name off the module paths that name the blocks."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind)
                for key, (path, kind) in stack.items()
            }
