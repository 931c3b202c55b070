"""Which rows of an activation are tokens: what ``attention_mask`` marks as padding does not count.

A mask ``[batch, tokens]`` belongs to the values that descend from its own inputs: in an
encoder-decoder model the decoder's tokens have ``decoder_attention_mask`` (or none), and the
tokens of another modality have none at all, even where the shapes happen to agree.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from magr_fx.passes.products import product_of
from magr_fx.passes.torch_private import statically_known_true
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
        aten.mm.default,
        aten.reshape.default,
        aten.rms_norm.default,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.to.dtype,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
# Ops that keep the order of the rows, the first dimension, of all their arguments that have them.
_ALL_ROW_WISE = frozenset({aten.bmm.default, aten.matmul.default})
# Ops that cut each row into parts.
_PARTS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}
)


Steps = tuple["fx.Node | int", ...]


@dataclass(frozen=True)
class TokenMask:
    """The mask ``[batch, tokens]`` of what one call reads, as a position among the batch's values.

    ``tokens`` is the position of the input whose tokens the call's rows are made of, or None where
    there is no telling. The rows are in the tokens' order but for what ``steps`` do to it, one
    after the other: a node picks rows by the indices that are its value, a number repeats each.
    """

    mask: int
    tokens: int | None
    steps: Steps = ()

    @property
    def gathers(self) -> tuple[fx.Node, ...]:
        """The nodes whose values :meth:`keep` needs."""
        return tuple(step for step in self.steps if isinstance(step, fx.Node))

    def keep(
        self, values: tuple[Any, ...], env: Mapping[fx.Node, Any] = MappingProxyType({})
    ) -> torch.Tensor | None:
        """True for each row that counts; None where the call's rows do not match the mask."""
        mask: torch.Tensor = values[self.mask]
        if self.tokens is None or values[self.tokens].shape[:2] != mask.shape:
            return None
        keep = mask != 0
        for step in self.steps:
            flat = keep.flatten()
            if isinstance(step, int):
                keep = flat.repeat_interleave(step)
            else:
                keep = flat[env[step].to(flat.device)]
        return keep

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
            found = ((at, _steps_from(call, shapes[at][:2])) for at in own)
            known = next(((at, steps) for at, steps in found if steps is not None), (None, ()))
            masks[call] = TokenMask(present[mask], *known)
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


def _steps_from(call: Call, shape: tuple[Any, ...]) -> Steps | None:
    """How the call's rows come from the tokens of an input ``[batch, tokens]``; None: unknown.

    The symbols of the traced shapes tell, where sizes of one batch may agree by chance.
    """
    leading = call.rows.leading(_shape(call.input))
    if _same(leading, shape):
        return ()
    return _walk(call.input, shape, set()) if len(_trimmed(leading)) == 1 else None


def _walk(node: fx.Node, shape: tuple[Any, ...], seen: set[fx.Node]) -> Steps | None:
    """How a value ``[rows, ...]`` comes from the tokens ``[batch, tokens]``."""
    if node in seen:
        return None
    seen.add(node)
    for source, step in _sources_of_rows(node):
        if step is None and _same(_leading(source), shape) and _is_flattened(node, source):
            return ()
        if step is not None or _same(_shape(source)[:1], _shape(node)[:1]):
            found = _walk(source, shape, seen)
            if found is not None:
                return found if step is None else (*found, step)
    return None


def _sources_of_rows(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | int | None]]:
    """The values ``[rows, ...]`` that the node's rows may come from, and what their order becomes.

    That is None where they stay in order, a node where rows are picked by the indices that are
    its value, and a number where each row is repeated so often.
    """
    target, args = node.target, node.args
    if target is operator.getitem and isinstance(args[0], fx.Node) and args[0].target in _PARTS:
        if isinstance(args[0].args[0], fx.Node):  # a part of each row
            yield args[0].args[0], None
        return
    if not args or not isinstance(args[0], fx.Node):
        return
    step: Any = None
    if target is aten.index.Tensor and isinstance(args[1], (list, tuple)) and len(args[1]) == 1:
        step = args[1][0]
    elif target is aten.index_select.default and args[1] == 0:
        step = args[2]
    elif target is aten.repeat_interleave.self_int and 0 in (*args[2:3], node.kwargs.get("dim")):
        step = args[1]
    if isinstance(step, int) or _is_index(step):
        yield args[0], step
    elif target in _ALL_ROW_WISE or torch.Tag.pointwise in getattr(target, "tags", ()):
        yield from ((source, None) for source in node.all_input_nodes)
    elif target is aten.addmm.default:
        if isinstance(args[1], fx.Node):
            yield args[1], None
    elif target in _ROW_WISE or _groups(node):
        yield args[0], None


def _groups(node: fx.Node) -> bool:
    """Whether it is a product of rows that are sorted by expert."""
    product = product_of(node, node.all_input_nodes[1:])
    return product is not None and product.route is not None


def _is_index(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype is torch.int64


def _trimmed(leading: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without ones after the rows: ``[tokens, 1, in]`` has the rows of ``[tokens, in]``."""
    while len(leading) > 1 and statically_known_true(leading[-1] == 1):
        leading = leading[:-1]
    return leading


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
