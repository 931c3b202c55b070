"""Which rows of an activation are tokens: what ``attention_mask`` marks as padding does not count.

A mask ``[batch, tokens]`` belongs to the values that descend from its own inputs: in an
encoder-decoder model the decoder's tokens have ``decoder_attention_mask`` (or none), and the
tokens of another modality have none at all, even where the shapes happen to agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from magr_fx.passes.trace import Trace
from magr_fx.passes.weight_uses import Call

aten = torch.ops.aten

_TEXT = frozenset({"input_ids", "inputs_embeds"})
_DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels"})
# Ops that keep the order of the rows [batch * tokens] of their first argument.
_ROW_WISE = frozenset(
    {
        aten.dropout.default,
        aten.flatten.using_ints,
        aten.layer_norm.default,
        aten.linear.default,
        aten.reshape.default,
        aten.rms_norm.default,
        aten.to.dtype,
        aten.view.default,
    }
)


@dataclass(frozen=True)
class TokenMask:
    """The mask ``[batch, tokens]`` of what one call reads, as a position among the batch's values.

    ``tokens`` is the position of the input whose tokens the call's rows are, in the same order,
    or None where there is no telling.
    """

    mask: int
    tokens: int | None

    def keep(self, values: tuple[Any, ...]) -> torch.Tensor | None:
        """True for each token that counts; None where the call's rows do not match the mask."""
        mask: torch.Tensor = values[self.mask]
        if self.tokens is None or values[self.tokens].shape[:2] != mask.shape:
            return None
        return mask != 0

    def misses_padding(self, values: tuple[Any, ...], rows: int) -> bool:
        """Whether there is padding among so many rows, where ``keep`` does not tell.

        One row per sequence, such as a pooled one, has no padding left.
        """
        mask: torch.Tensor = values[self.mask]
        return rows > mask.shape[0] and bool((mask == 0).any())


def token_masks(trace: Trace, calls: Iterable[Call]) -> dict[Call, TokenMask]:
    """The mask of each call whose activation has one."""
    names = trace.input_names
    placeholders = trace.graph_module.graph.find_nodes(op="placeholder")
    shapes = [_shape(node) for node in placeholders]
    # A mask of more dimensions says which token sees which, not which one is padding.
    present = {
        name: at
        for at, name in enumerate(names)
        if name in ("attention_mask", "decoder_attention_mask") and len(shapes[at]) == 2
    }
    sources = _sources(trace) if present else {}
    text = _TEXT if _TEXT.intersection(names) else frozenset(names)
    masks = {}
    for call in calls if present else ():
        in_decoder = bool(sources[call.input] & _DECODER)
        mask = "decoder_attention_mask" if in_decoder else "attention_mask"
        inputs = sources[call.input] & (_DECODER if in_decoder else text)
        if mask in present and inputs:
            own = (at for at, name in enumerate(names) if name in inputs)
            tokens = next((at for at in own if _are_tokens_of(call, shapes[at][:2])), None)
            masks[call] = TokenMask(present[mask], tokens)
    return masks


def _sources(trace: Trace) -> dict[fx.Node, frozenset[str]]:
    """The names of the inputs that each node's values descend from, a mere size aside."""
    names = iter(trace.input_names)
    sources: dict[fx.Node, frozenset[str]] = {}
    for node in trace.graph_module.graph.nodes:
        if node.op == "placeholder":
            sources[node] = frozenset({next(names)})
        elif isinstance(node.meta.get("val"), torch.SymInt):
            sources[node] = frozenset()
        else:
            sources[node] = frozenset().union(*(sources[n] for n in node.all_input_nodes))
    return sources


def _are_tokens_of(call: Call, shape: tuple[Any, ...]) -> bool:
    """Whether the call's rows are the tokens of an input ``[batch, tokens]``, in its order.

    The symbols of the traced shapes tell, where sizes of one batch may agree by chance.
    """
    node, leading = call.input, _leading(call.input)
    if call.columns:  # its tokens are the last dimension
        return _same((*leading[:-1], *_shape(node)[-1:]), shape)
    while not _same(leading, shape):
        row_wise = node.target in _ROW_WISE or torch.Tag.pointwise in getattr(
            node.target, "tags", ()
        )
        if len(leading) != 1 or not row_wise or not isinstance(node.args[0], fx.Node):
            return False
        source = node.args[0]
        if not (_same(_leading(source), leading) or _is_flattened(node, source)):
            return False
        node, leading = source, _leading(source)
    return True


def _is_flattened(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``[batch * tokens, in]`` was made from ``[batch, tokens, in]``."""
    return len(_shape(source)) == 3 and _same(_shape(node)[-1:], _shape(source)[-1:])


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(
        statically_known_true(a == b) for a, b in zip(first, second, strict=True)
    )


def _leading(node: fx.Node) -> tuple[Any, ...]:
    return _shape(node)[:-1]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
