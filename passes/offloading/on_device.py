"""Makes graphs that were traced on the CPU run on another device.

This moves the calibration, buffers and constants, and changes the device arguments of nodes.
Weights are moved later, with the block that reads them (see :mod:`resident`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import ModelError
from magr_fx.machine.addresses import address
from magr_fx.passes.graphs.inline import AUTOCAST
from magr_fx.passes.graphs.torch_private import tree_map_only
from magr_fx.passes.graphs.trace import TracedBatch, all_nodes


def on_device(batches: list[TracedBatch], device: torch.device) -> list[TracedBatch]:
    """The batches on a device. Their traces are changed to run there; the model is not moved.

    Args:
        batches: traced on the CPU.
        device: where to run them.

    Raises:
        ModelError: a graph reads a weight's memory through a tensor that is not a parameter.
    """
    copies: dict[int, torch.Tensor] = {}  # traces that share a buffer also share its copy
    for trace in dict.fromkeys(batch.trace for batch in batches):
        _move_attributes(trace.graph_module, device, copies)
        for node in all_nodes(trace.graph_module):
            _move(node, device)
    moved = tree_map_only(torch.Tensor, lambda t: t.to(device), [b.values for b in batches])
    return [replace(b, values=values) for b, values in zip(batches, moved, strict=True)]


def _move_attributes(
    graph_module: fx.GraphModule, device: torch.device, copies: dict[int, torch.Tensor]
) -> None:
    """Replace buffers and constants by copies on the device."""
    read = list(_attributes(graph_module))
    weights = {address(t) for *_, t in read if isinstance(t, nn.Parameter)} - {None}
    for owner, key, tensor in read:
        if isinstance(tensor, nn.Parameter):
            continue
        if tensor.numel() and address(tensor) in weights:
            raise ModelError(  # loading the weight would not load the values of this tensor
                f"the model reads a weight of shape {tuple(tensor.shape)} through a tensor that is "
                "no parameter; load the whole model instead of offloading or sharding it"
            )
        setattr(owner, key, copies.setdefault(id(tensor), tensor.to(device)))


def _attributes(graph_module: fx.GraphModule) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """The tensors that the graph and its sub-graphs read: (owning module, attribute, tensor)."""
    found: dict[tuple[nn.Module, str], torch.Tensor] = {}
    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.find_nodes(op="get_attr"):
            *path, key = str(node.target).split(".")
            owner = reduce(getattr, path, module)
            value = getattr(owner, key)
            if isinstance(value, torch.Tensor):
                found[owner, key] = value
    yield from ((owner, key, value) for (owner, key), value in found.items())


def _move(node: fx.Node, device: torch.device) -> None:
    """Replace the CPU by ``device`` in a node's arguments and autocast regions."""

    def there(given: torch.device) -> torch.device:
        return device if given.type == "cpu" else given

    node.args = tree_map_only(torch.device, there, node.args)
    node.kwargs = tree_map_only(torch.device, there, node.kwargs)
    regions: dict[str, tuple[Any, ...]] = node.meta.get(AUTOCAST, {})
    if "cpu" in regions:
        node.meta[AUTOCAST] = {device.type: (device.type, *regions["cpu"][1:])}
