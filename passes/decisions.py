"""What two runs of one graph have to agree on: what was chosen, counted and drawn.

The original model and the quantized one run side by side, and their activations are compared token
by token. Were one to route a token elsewhere, or to draw other noise, there would be nothing to
compare. So the quantized run takes indices, masks and counts from the original one, and draws the
same random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from magr_fx.passes.vmap import is_batched

aten = torch.ops.aten
State = tuple[torch.Tensor, list[torch.Tensor]]  # of the CPU's generator, of each CUDA device's


@dataclass
class Decisions:
    """What one run of a block decided."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    random: dict[fx.Node, State] = field(default_factory=dict)  # before the node ran


def is_decision(value: Any) -> bool:
    """Whether a node's value is, or comes with (as topk's does), an index, a mask or a count."""
    return any(
        isinstance(leaf, int)
        or (
            isinstance(leaf, torch.Tensor)
            and not (leaf.is_floating_point() or leaf.is_complex())
            and not is_batched(leaf)  # which ends with its torch.vmap
        )
        for leaf in tree_leaves(value)
    )


def is_random(node: fx.Node) -> bool:
    """Whether the node may draw random numbers."""
    if node.target is aten.dropout.default and len(node.args) > 2 and node.args[2] is False:
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def torch_state() -> State:
    """Of torch's own generators, which a model draws from."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), on_cuda


@contextmanager
def random_state(state: State | None) -> Iterator[None]:
    """Draw from ``state``; what was in force is again afterwards. None changes nothing."""
    if state is None:
        yield
        return
    before = torch_state()
    try:
        set_torch_state(state)
        yield
    finally:
        set_torch_state(before)


def set_torch_state(state: State) -> None:
    """The inverse of :func:`torch_state`."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
