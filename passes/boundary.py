"""Between two steps: what the later ones of a calibration run need of the earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from magr_fx.passes.decisions import set_torch_state, torch_state
from magr_fx.passes.shared_gram import SharedGram
from magr_fx.passes.spill import Away, come_back
from magr_fx.passes.torch_private import tree_map

Environment = dict[fx.Node, Any]
_VIEW, _AWAY = "view of a stored tensor", "tensor of a device"
_COLLECTED = ("gram", "drift", "held", "tokens", "held_tokens", "padding_counted", "note")


def boundary(
    streams: Sequence[Sequence[Environment]],
    grams: Sequence[SharedGram],
    buffers: Sequence[torch.Tensor],
    stored: Sequence[torch.Tensor],
    devices: Iterable[torch.device],
) -> dict[str, Any]:
    """The values alive, by their nodes' names; grams that are not complete; state of the model.

    Args:
        streams: for each run of the model, the values alive of each batch.
        grams: all grams.
        buffers: what the model writes in place.
        stored: the model's tensors: a value that shares their memory is kept as a view of them.
        devices: where random numbers are drawn.
    """
    places = {tensor.untyped_storage().data_ptr(): at for at, tensor in enumerate(stored)}

    def kept(value: Any) -> Any:
        if isinstance(value, Away):
            return {_AWAY: vars(value)}
        if isinstance(value, torch.Tensor):
            at = places.get(value.untyped_storage().data_ptr())
            if at is not None:
                return {_VIEW: (at, value.size(), value.stride(), value.storage_offset())}
        return value

    return {
        "streams": [
            [{node.name: tree_map(kept, value) for node, value in env.items()} for env in envs]
            for envs in streams
        ],
        "grams": {
            at: {key: getattr(shared, key) for key in _COLLECTED}
            for at, shared in enumerate(grams)
            if shared.gram is not None
        },
        "buffers": [buffer.detach() for buffer in buffers],
        "random": torch_state(devices),
    }


@torch.no_grad()
def restore(
    saved: dict[str, Any],
    streams: Sequence[Sequence[Environment]],
    graphs: Sequence[fx.Graph],
    grams: Sequence[SharedGram],
    buffers: Sequence[torch.Tensor],
    stored: Sequence[torch.Tensor],
    *,
    away: bool,
) -> None:
    """Put what :func:`boundary` gave in its places; ``graphs`` are those of the batches.

    With ``away`` what was away from its device stays so: not all batches may fit there.
    """

    def is_described(value: Any) -> bool:
        return isinstance(value, dict) and (_VIEW in value or _AWAY in value)

    def value_of(kept: Any) -> Any:
        if not is_described(kept):
            return kept
        if _AWAY in kept:
            return Away(**kept[_AWAY])
        at, size, stride, offset = kept[_VIEW]
        return stored[at].detach().as_strided(size, stride, offset)

    for envs, kept in zip(streams, saved["streams"], strict=True):
        for env, values, graph in zip(envs, kept, graphs, strict=True):
            nodes = {node.name: node for node in graph.nodes}
            env.clear()
            env.update(
                {nodes[n]: tree_map(value_of, v, is_leaf=is_described) for n, v in values.items()}
            )
            if not away:
                come_back(env)
    for at, shared in enumerate(grams):
        for key, value in saved["grams"].get(at, {}).items():
            setattr(shared, key, value)
    for buffer, values in zip(buffers, saved["buffers"], strict=True):
        buffer.copy_(values)
    set_torch_state(saved["random"])
