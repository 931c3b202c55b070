"""Graphs that were traced on the CPU, to run on another device.

Weights come there with the block that reads them (see :mod:`magr_fx.passes.resident`); all else
does here: the calibration, buffers and constants, and what nodes make on a device of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from magr_fx.errors import ModelError
from magr_fx.passes.inline import AUTOCAST
from magr_fx.passes.trace import Trace, TracedBatch, all_nodes, attributes


@contextlib.contextmanager
def on_device(
    batches: list[TracedBatch], device: torch.device | None
) -> Iterator[list[TracedBatch]]:
    """The batches for a device; their traces are on it for as long as it is open.

    Args:
        batches: traced on the CPU.
        device: where to run them; None is the CPU, on which they are.

    Raises:
        ModelError: a graph reads a weight's memory under another name than the weight's.
    """
    if device is None:
        yield batches
        return
    traces = list(dict.fromkeys(batch.trace for batch in batches))
    held: dict[int, torch.Tensor] = {}
    for trace in traces:
        held.update((id(tensor), tensor) for tensor in _held(trace))
    own = {id(tensor): tensor.detach() for tensor in held.values()}
    try:
        for trace in traces:
            for node in all_nodes(trace.graph_module):
                _move(node, device)
        for tensor in held.values():
            tensor.data = tensor.to(device)
        moved = tree_map_only(torch.Tensor, lambda t: t.to(device), [b.values for b in batches])
        yield [replace(b, values=values) for b, values in zip(batches, moved, strict=True)]
    finally:
        for key, tensor in held.items():
            tensor.data = own[key]


def _held(trace: Trace) -> Iterator[torch.Tensor]:
    """The buffers and constants of a trace."""
    parameters: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for module in trace.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for tensor in attributes(module):
                (parameters if isinstance(tensor, nn.Parameter) else others).append(tensor)
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    for tensor in others:
        # Its values would not come with the weight's.
        if tensor.numel() and tensor.untyped_storage().data_ptr() in weights:
            raise ModelError(
                f"the model reads a weight of shape {tuple(tensor.shape)} through a tensor that is "
                "no parameter; load it as a whole in place of offloading or sharding it"
            )
    yield from others


def _move(node: fx.Node, device: torch.device) -> None:
    """Let a node that says where it works, as the CPU it was traced on, say this device."""

    def there(given: torch.device) -> torch.device:
        return device if given.type == "cpu" else given

    node.args = tree_map_only(torch.device, there, node.args)
    node.kwargs = tree_map_only(torch.device, there, node.kwargs)
    regions: dict[str, tuple[Any, ...]] = node.meta.get(AUTOCAST, {})
    if "cpu" in regions:
        node.meta[AUTOCAST] = {device.type: (device.type, *regions["cpu"][1:])}
