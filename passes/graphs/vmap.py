"""torch.vmap in traced graphs; everything of torch's private interface to it that is relied on.

torch.export leaves a region of vmap in the graph: calls that start and end it, and between them ops
on batched tensors, whose shapes lack a dimension. make_fx loses track of such tensors: what comes
out of the region is a constant to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_functorch: Any = torch._C._functorch
_DEPTHS = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}


def vmap_depth(node: fx.Node) -> int:
    """1 where a region starts, -1 where one ends, else 0: no op reads these, but order matters."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return _DEPTHS.get(name, 0)


def in_transform() -> bool:
    """Whether the code that runs now is inside torch.vmap, or another transform of torch.func."""
    return _functorch.peek_interpreter_stack() is not None


def run_inside(func: Any, args: Any) -> Any:
    """What ``func`` returns in such code, for an autograd.Function; NotImplemented for any other.

    torch has no rule for these under a tracer. Calibration needs no gradient, and a Function that
    has its rule of torch.vmap generated is what its forward computes.
    """
    if getattr(func, "__name__", "") != "custom_function_call" or not args:
        return NotImplemented
    if not getattr(args[0], "generate_vmap_rule", False):
        return NotImplemented
    return args[0].forward(*args[1:])


def is_batched(value: object) -> bool:
    """Whether this is a tensor of such code, of no use outside of it."""
    return isinstance(value, torch.Tensor) and bool(_functorch.is_functorch_wrapped_tensor(value))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The ordinary tensor that it is made of."""
    while is_batched(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
