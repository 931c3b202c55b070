"""Which rows of an activation are tokens: what ``attention_mask`` marks as padding does not count.

A mask ``[batch, tokens]`` belongs to the values that descend from its own inputs: in an
encoder-decoder model the decoder's tokens have ``decoder_attention_mask`` (or none), and the
tokens of another modality have none at all, even where the shapes happen to agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from magr_fx.passes.trace import Trace

_TEXT = frozenset({"input_ids", "inputs_embeds"})
_DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels"})
# Ops that keep the order of the rows, so that a flattened mask still matches.
_FLATTENING = frozenset(
    {
        torch.ops.aten.view.default,
        torch.ops.aten.reshape.default,
        torch.ops.aten.flatten.using_ints,
    }
)


@dataclass(frozen=True)
class TokenMask:
    """The mask of one activation: which of the batch's values, and whether it must be flattened."""

    position: int
    flattened: bool

    def rows(self, values: tuple[object, ...], activation: torch.Tensor) -> torch.Tensor | None:
        """True for each token of ``activation[..., in]``; None where the mask has another shape."""
        mask = values[self.position]
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        if mask.shape == activation.shape[:-1]:
            return mask != 0
        if self.flattened and (mask.numel(),) == activation.shape[:-1]:
            return mask.reshape(-1) != 0
        return None

    def misses_padding(self, values: tuple[object, ...], activation: torch.Tensor) -> bool:
        """Whether there is padding that ``rows`` cannot find in this activation.

        An activation with fewer rows than the mask, such as a pooled one, has no padding left.
        """
        mask = values[self.position]
        return (
            isinstance(mask, torch.Tensor)
            and activation.numel() // activation.shape[-1] >= mask.numel()
            and bool((mask == 0).any())
        )


def token_masks(trace: Trace, activations: Iterable[fx.Node]) -> dict[fx.Node, TokenMask]:
    """The mask of each activation that has one."""
    names = trace.input_names
    if not {"attention_mask", "decoder_attention_mask"}.intersection(names):
        return {}
    sources = _sources(trace)
    masks = {}
    for node in activations:
        in_decoder = bool(sources[node] & _DECODER)
        name = "decoder_attention_mask" if in_decoder else "attention_mask"
        is_text = in_decoder or bool(sources[node] & _TEXT) or not _TEXT.intersection(names)
        if name in names and is_text:
            masks[node] = TokenMask(names.index(name), _is_flattened(node))
    return masks


def _sources(trace: Trace) -> dict[fx.Node, frozenset[str]]:
    """The names of the inputs that each node descends from."""
    names = iter(trace.input_names)
    sources: dict[fx.Node, frozenset[str]] = {}
    for node in trace.graph_module.graph.nodes:
        if node.op == "placeholder":
            sources[node] = frozenset({next(names)})
        else:
            sources[node] = frozenset().union(*(sources[n] for n in node.all_input_nodes))
    return sources


def _is_flattened(node: fx.Node) -> bool:
    """Whether ``[batch * tokens, in]`` was made from ``[batch, tokens, in]`` in that order."""
    flat = node.meta.get("val")
    while node.target in _FLATTENING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        value = node.meta.get("val")
        if (
            isinstance(value, torch.Tensor)
            and isinstance(flat, torch.Tensor)
            and (flat.dim(), value.dim()) == (2, 3)
            and flat.shape[-1] == value.shape[-1]
        ):
            return True
    return False
