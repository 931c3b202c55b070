"""The boundary between two steps: the values of the earlier steps that the later ones need.

Values that can be recovered are not saved: the inputs, which the calibration has, and values that
are equal in both runs of the model, such as masks and positions. In a graph with in-place ops all
values are saved, because there it also matters which values share memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from magr_fx.machine.addresses import address
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.collecting.spill import SpilledTensor, load_spilled
from magr_fx.passes.graphs.decisions import set_torch_state, torch_state
from magr_fx.passes.graphs.torch_private import tree_flatten, tree_map
from magr_fx.passes.graphs.trace import is_mutation

Environment = dict[fx.Node, Any]
_VIEW, _SPILLED = "view of a stored tensor", "tensor of a device"
_INPUT, _SAME_AS_FIRST = "as the calibration has it", "as the first run has it"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
_COLLECTED = ("gram", "drift", "held", "tokens", "held_tokens", "padding_counted", "note")


def boundary(
    streams: Sequence[Sequence[Environment]],
    grams: Sequence[SharedGram],
    buffers: Sequence[torch.Tensor],
    stored: Sequence[torch.Tensor],
    devices: Iterable[torch.device],
) -> dict[str, Any]:
    """The state that later steps need: values by node name, unfinished grams, buffers, RNG state.

    Args:
        streams: for each run of the model and each batch, the values that later blocks read.
        grams: all grams.
        buffers: the tensors that the model writes in place.
        stored: the model's tensors. A value that shares their memory is saved as a view of them.
        devices: where random numbers are drawn.
    """
    places = {address(tensor): at for at, tensor in enumerate(stored)}
    places.pop(None, None)  # empty tensors have no address

    def kept(value: Any) -> Any:
        if isinstance(value, SpilledTensor):
            return {_SPILLED: vars(value)}
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            at = places.get(address(value))
            if at is not None:
                return {_VIEW: (at, value.size(), value.stride(), value.storage_offset())}
        return value

    def described(node: fx.Node, value: Any, first: Environment) -> Any:
        if node.graph in pure:
            if node.op == "placeholder":
                return _INPUT
            if node in first and _same_value(first[node], value):
                return _SAME_AS_FIRST
        return tree_map(kept, value)

    graphs = {node.graph for envs in streams for env in envs for node in env}
    pure = {graph for graph in graphs if not any(map(is_mutation, graph.nodes))}
    return {
        "streams": [
            [
                {
                    node.name: described(node, value, {} if at == 0 else first)
                    for node, value in env.items()
                }
                for env, first in zip(envs, streams[0], strict=True)
            ]
            for at, envs in enumerate(streams)
        ],
        "grams": {
            at: {key: getattr(shared, key) for key in _COLLECTED}
            for at, shared in enumerate(grams)
            if shared.gram is not None
        },
        "buffers": [buffer.detach() for buffer in buffers],
        "random": torch_state(devices),
    }


def _same_value(first: Any, second: Any) -> bool:
    """Whether two values of one node have the same bits, dtypes, devices, shapes and strides."""
    (ones, form), (others, other_form) = tree_flatten(first), tree_flatten(second)
    return form == other_form and all(map(_same_bits, ones, others))


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, SpilledTensor) and isinstance(other, SpilledTensor):
        keys = ("device", "dtype", "size", "stride", "offset")
        same = all(getattr(one, key) == getattr(other, key) for key in keys)
        return same and _same_bits(one.values, other.values)
    if type(one) is not torch.Tensor or type(other) is not torch.Tensor:
        return type(one) is type(other) and isinstance(one, (int, str)) and bool(one == other)
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    bits = _BITS.get(one.element_size())
    if bits is None or one.stride() != other.stride() or one.is_conj() or other.is_conj():
        return False
    if any(getattr(one, key) != getattr(other, key) for key in ("dtype", "device", "shape")):
        return False
    return torch.equal(one.detach().view(bits), other.detach().view(bits))


@torch.no_grad()
def restore(
    saved: dict[str, Any],
    streams: Sequence[Sequence[Environment]],
    graphs: Sequence[fx.Graph],
    grams: Sequence[SharedGram],
    buffers: Sequence[torch.Tensor],
    stored: Sequence[torch.Tensor],
    *,
    keep_spilled: bool,
) -> None:
    """Load a state that :func:`boundary` returned; ``graphs`` are the graphs of the batches.

    With ``keep_spilled`` spilled tensors are not moved to their device, which may not have enough
    memory for all batches.
    """

    def is_described(value: Any) -> bool:
        return isinstance(value, dict) and (_VIEW in value or _SPILLED in value)

    def value_of(kept: Any) -> Any:
        if not is_described(kept):
            return kept
        if _SPILLED in kept:
            return SpilledTensor(**kept[_SPILLED])
        at, size, stride, offset = kept[_VIEW]
        return stored[at].detach().as_strided(size, stride, offset)

    for envs, kept in zip(streams, saved["streams"], strict=True):
        for env, first, values, graph in zip(envs, streams[0], kept, graphs, strict=True):
            nodes = {node.name: node for node in graph.nodes}
            given = dict(env)
            env.clear()
            for name, value in values.items():
                node = nodes[name]
                if isinstance(value, str) and value == _INPUT:
                    env[node] = given[node]
                elif isinstance(value, str) and value == _SAME_AS_FIRST:
                    env[node] = first[node]
                else:
                    env[node] = tree_map(value_of, value, is_leaf=is_described)
            if not keep_spilled:
                load_spilled(env)
    for at, shared in enumerate(grams):
        for key, value in saved["grams"].get(at, {}).items():
            setattr(shared, key, value)
    for buffer, values in zip(buffers, saved["buffers"], strict=True):
        buffer.copy_(values)
    set_torch_state(saved["random"])
