"""Decisions on which two runs of one graph must agree: indices, masks, counts, random numbers.

The original model and the quantized one run side by side, and their activations are compared token
by token. If one of them routed a token to another expert, or drew other noise, the two could not be
compared. So the quantized run takes indices, masks and counts from the original run, and draws the
same random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from magr_fx.passes.graphs.torch_private import HigherOrderOperator, schema_of, tree_leaves
from magr_fx.passes.graphs.vmap import is_batched

aten = torch.ops.aten
# Arguments with which an op draws no random numbers: if they are False, and if they are 0.
_TRAINS, _SHARES = ("train", "training"), ("dropout", "dropout_p")
# Ops that make random numbers for other ops, whatever their dropout probability.
_SEEDS = frozenset(
    {aten._fill_mem_eff_dropout_mask_.default, aten._cudnn_init_dropout_state.default}
)
State = dict[str, torch.Tensor]  # states of torch's generators, by device name


@dataclass
class Decisions:
    """The decisions of one run of a block."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    random: dict[fx.Node, State] = field(default_factory=dict)  # before the node ran


def is_decision(value: Any) -> bool:
    """Whether a node's value is or contains (as topk's does) an index, a mask or a count."""
    return any(
        isinstance(leaf, int)
        or (
            isinstance(leaf, torch.Tensor)
            and not (leaf.is_floating_point() or leaf.is_complex())
            and not is_batched(leaf)  # it is of no use outside its torch.vmap
        )
        for leaf in tree_leaves(value)
    )


def is_random(node: fx.Node) -> bool:
    """Whether the node may draw random numbers.

    Many ops can but do not: dropout outside of training, or attention without dropout. A loop or
    another region may if its sub-graphs may.
    """
    op = node.target
    if isinstance(op, HigherOrderOperator):
        return any(is_random(inner) for graph in _sub_graphs(node) for inner in graph.nodes)
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()) or op in _SEEDS:
        return op in _SEEDS
    schema = schema_of(op)
    for at, argument in enumerate(() if schema is None else schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name, default)
        if argument.name in _TRAINS and given is False:
            return False
        if argument.name in _SHARES and isinstance(given, (int, float)) and given == 0:
            return False
        if argument.name == "p" and "dropout" in str(op) and given in (0, 1):
            return False
    return True


def _sub_graphs(node: fx.Node) -> Iterator[fx.Graph]:
    """The graphs that the node calls."""
    for source in node.all_input_nodes:
        value: Any = node.graph.owning_module if source.op == "get_attr" else None
        for name in str(source.target).split("."):
            value = getattr(value, name, None)
        if isinstance(value, fx.GraphModule):
            yield value.graph


def torch_state(devices: Iterable[torch.device]) -> State:
    """The states of torch's generators that a model draws from: the CPU's and its devices'.

    Other GPUs are left out: to read their state initialises them, which takes some of their memory.
    """
    names = sorted({str(device) for device in devices if device.type not in ("cpu", "meta")})
    states = {name: torch.get_device_module(name).get_rng_state(name) for name in names}
    return {"cpu": torch.get_rng_state(), **states}


@contextmanager
def random_state(state: State | None) -> Iterator[None]:
    """Draw random numbers from ``state``, and restore the old one; None changes nothing."""
    if state is None:
        yield
        return
    before = torch_state(map(torch.device, state))
    try:
        set_torch_state(state)
        yield
    finally:
        set_torch_state(before)


def set_torch_state(state: State) -> None:
    """Set torch's generators to what :func:`torch_state` returned."""
    for name, values in state.items():
        if name == "cpu":
            torch.set_rng_state(values)
        else:
            torch.get_device_module(name).set_rng_state(values, name)
