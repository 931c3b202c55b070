"""torch.vmap in traced graphs. All uses of torch's private interface to vmap are in this file.

torch.export leaves a region of vmap in the graph: calls that start and end it, and between them ops
on batched tensors, whose shapes lack a dimension. make_fx cannot follow such tensors: the result of
the region is a constant of its graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_functorch: Any = torch._C._functorch
_DEPTHS = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}


def vmap_depth(node: fx.Node) -> int:
    """The node's change of the vmap nesting: 1 if it starts a region, -1 if it ends one, else 0.

    No node uses the values of these calls, but their places in the order of nodes matter.
    """
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return _DEPTHS.get(name, 0)


def in_transform() -> bool:
    """Whether the running code is inside torch.vmap, or another transform of torch.func."""
    return _functorch.peek_interpreter_stack() is not None


def run_inside(func: Any, args: Any) -> Any:
    """Run an autograd.Function inside a transform; NotImplemented for any other ``func``.

    torch cannot run these under a tracer. Calibration needs no gradients. If the Function has
    ``generate_vmap_rule``, then running its forward alone gives the same result.
    """
    if getattr(func, "__name__", "") != "custom_function_call" or not args:
        return NotImplemented
    if not getattr(args[0], "generate_vmap_rule", False):
        return NotImplemented
    return args[0].forward(*args[1:])


def is_batched(value: object) -> bool:
    """Whether it is a tensor of a transform of torch.func, of no use outside it."""
    return isinstance(value, torch.Tensor) and bool(_functorch.is_functorch_wrapped_tensor(value))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The ordinary tensor that a batched tensor wraps."""
    while is_batched(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
