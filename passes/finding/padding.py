"""Which rows of an activation count: those of tokens, not those that a mask marks as padding.

A mask applies to the values that depend on the inputs whose tokens it is for. In an encoder-decoder
model, the decoder's tokens have ``decoder_attention_mask`` (or none). The tokens of another
modality have no mask, even if the shapes agree by chance.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from magr_fx.passes.finding.mask_inputs import Mask, MaskInputs
from magr_fx.passes.finding.products import product_of
from magr_fx.passes.finding.weight_uses import Call
from magr_fx.passes.graphs.torch_private import statically_known_true
from magr_fx.passes.graphs.trace import Trace, TracedBatch

aten = torch.ops.aten

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
# Ops that keep the order of the rows, the first dimension, of all their arguments with rows.
_ALL_ROW_WISE = frozenset({aten.bmm.default, aten.matmul.default})
# Of these, ops that may only add or remove dimensions of 1 before the rows.
_SHAPES = frozenset(
    {
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
# Ops that cut each row into parts.
_PARTS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}
)


TURN = "turn"  # exchanges the tokens' two dimensions
Steps = tuple["fx.Node | int | str", ...]


@dataclass(eq=False)
class TokenMask:
    """Which rows of the input of some calls are tokens that count.

    ``tokens`` is the position of the input whose tokens the calls' rows come from; None if that is
    unknown. The rows are in the tokens' order, changed by each of ``steps`` in turn. A node picks
    rows by its value, indices or booleans. A number repeats each row that often. ``TURN`` exchanges
    the two dimensions of the tokens, as for ``[tokens, batch, in]``.
    """

    masks: tuple[Mask, ...]
    tokens: int | None
    steps: Steps = ()
    _kept: dict[Any, torch.Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def gathers(self) -> tuple[fx.Node, ...]:
        """The nodes whose values :meth:`keep` needs."""
        return tuple(step for step in self.steps if isinstance(step, fx.Node))

    def keep(
        self,
        batch: TracedBatch,
        device: torch.device,
        env: Mapping[fx.Node, Any] = MappingProxyType({}),
    ) -> torch.Tensor | None:
        """True for each row that counts; None if unknown. ``env`` has the values of ``gathers``."""
        if self.tokens is None:
            return None
        tokens: torch.Tensor = batch.values[self.tokens]
        key = (batch.index, device)
        if key not in self._kept:
            read = [mask.counted(batch, tokens) for mask in self.masks]
            keep = None
            for one in read:
                keep = one if keep is None or one is None else keep & one.to(keep.device)
                if keep is None:
                    break
            self._kept[key] = None if keep is None else keep.to(device).contiguous()
        keep = self._kept[key]
        if keep is None:
            return None
        for step in self.steps:
            if step == TURN:
                keep = keep.T.contiguous()
                continue
            flat = keep.flatten()
            if isinstance(step, int):
                keep = flat.repeat_interleave(step)
            elif isinstance(step, fx.Node):
                keep = flat[env[step].flatten().to(flat.device)]
        return keep

    def rows(self, batch: TracedBatch, keep: torch.Tensor) -> torch.Tensor | None:
        """The indices of the rows that count, of a view of :meth:`keep`; None if all count.

        This needs a device sync. There is one for each batch, for all calls that read its tokens;
        but where a node picks rows, each call needs its own.
        """
        # All are views of one tensor, so that shape, strides and offset identify the values.
        key = (batch.index, keep.device, keep.shape, keep.stride(), keep.storage_offset())
        if self.gathers or key not in self._kept:
            found = rows_that_count(keep)
            if self.gathers:
                return found
            self._kept[key] = found
        return self._kept[key]

    def misses_padding(self, batch: TracedBatch, rows: int) -> bool:
        """Whether there may be padding among ``rows`` rows, if :meth:`keep` returned None.

        If there is one row per sequence, such as a pooled one, there is no padding.
        """
        return any(rows > mask.sequences(batch) and mask.excludes(batch) for mask in self.masks)


def rows_that_count(keep: torch.Tensor) -> torch.Tensor | None:
    """The indices of the values that are True; None if all are."""
    found = keep.flatten().nonzero().squeeze(1)
    return None if len(found) == keep.numel() else found


def token_masks(trace: Trace, calls: Iterable[Call], inputs: MaskInputs) -> dict[Call, TokenMask]:
    """The mask of each call whose activation has one."""
    streams = inputs.streams(trace)
    if not any(stream.masks for stream in streams):
        return {}
    placeholders = trace.graph_module.graph.find_nodes(op="placeholder")
    shapes = [_shape(node) for node in placeholders]
    sources = _sources(trace)
    known: dict[Any, TokenMask] = {}  # calls with the same key share one
    masks = {}
    for call in calls:
        from_inputs = sources[call.input]
        stream = next((s for s in streams if s.has(from_inputs)), None)
        if stream is None or not stream.masks:
            continue
        own = sorted(stream.tokens & from_inputs)
        found = ((at, _steps_from(call, shapes[at][:2])) for at in own)
        place, steps = next(((at, s) for at, s in found if s is not None), (None, ()))
        key = (stream.masks, place, steps)
        masks[call] = known.setdefault(key, TokenMask(stream.masks, place, steps))
    return masks


def _sources(trace: Trace) -> dict[fx.Node, frozenset[int]]:
    """The positions of the inputs that each node's values depend on, other than by sizes."""
    places = iter(range(len(trace.input_names)))
    sources: dict[fx.Node, frozenset[int]] = {}
    for node in trace.graph_module.graph.nodes:
        if node.op == "placeholder":
            sources[node] = frozenset({next(places)})
        elif isinstance(node.meta.get("val"), torch.SymInt):
            sources[node] = frozenset()
        else:
            sources[node] = frozenset().union(*(sources[n] for n in node.all_input_nodes))
    return sources


def _steps_from(call: Call, shape: tuple[Any, ...]) -> Steps | None:
    """The steps from the tokens ``[batch, tokens]`` of an input to the call's rows; None: unknown.

    The symbols of the traced shapes tell; the sizes of one batch may agree by chance.
    """
    if _same(shape, shape[::-1]) and _is_turned_around(call.input):
        return None  # the sizes do not tell which of the two orders the rows have
    leading = call.rows.leading(_shape(call.input))
    order = _order(leading, shape)
    if order is not None:
        return order
    if len(leading) > len(shape):  # [batch, 1, tokens, in] has the rows of [batch, tokens, in]
        order = _order(_squeezed(leading), _squeezed(shape))
        if order is not None:
            return order
    return _steps_to_rows(call.input, shape, set()) if len(_squeezed(leading)) <= 1 else None


def _order(leading: tuple[Any, ...], shape: tuple[Any, ...]) -> Steps | None:
    """The steps if sizes are those of the tokens, or these exchanged; None if neither."""
    if _same(leading, shape):
        return ()
    return (TURN,) if len(shape) == 2 and _same(leading, shape[::-1]) else None


def _is_turned_around(node: fx.Node) -> bool:
    """Whether a value depends on one whose first two dimensions were exchanged."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending.extend(node.all_input_nodes)
        dims = len(_shape(node))
        if node.target is aten.transpose.int and {int(d) % dims for d in node.args[1:3]} == {0, 1}:  # type: ignore[arg-type]
            return True
        if node.target is aten.permute.default and int(node.args[1][0]) % dims != 0:  # type: ignore[arg-type,index]
            return True
    return False


def _steps_to_rows(node: fx.Node, shape: tuple[Any, ...], seen: set[fx.Node]) -> Steps | None:
    """The steps from tokens ``[batch, tokens]`` to a value ``[rows, ...]``; None: unknown."""
    if node in seen:
        return None
    seen.add(node)
    for source, step in _sources_of_rows(node):
        order = None
        if step is None:
            order = _order_of_flattened(node, source, shape)
        elif isinstance(step, fx.Node) and len(_shape(step)) > 1:  # picks from [batch, tokens, ...]
            order = _order(_shape(source)[: len(_shape(step))], shape)
        if order is not None:
            return order if step is None else (*order, step)
        if step is not None or _has_rows_of(node, source):
            found = _steps_to_rows(source, shape, seen)
            if found is not None:
                return found if step is None else (*found, step)
    return None


def _order_of_flattened(node: fx.Node, source: fx.Node, shape: tuple[Any, ...]) -> Steps | None:
    """The steps to rows ``[batch * tokens]`` from a source with both dimensions; None: unknown.

    The source may have heads too: ``[tokens, batch, heads, in]``, or, as in nn.MultiheadAttention,
    ``[tokens, batch * heads, in]``.
    """
    given = _shape(source)
    if len(shape) != 2 or not _same(_shape(node)[:1], (shape[0] * shape[1],)):
        return None
    if len(given) == 3 and _is_flattened(node, source):
        return _order(given[:2], shape)
    if len(given) == 4:
        return _order(given[:2], shape)
    if len(given) == 3 and not _same(shape, shape[::-1]):
        straight, turned = (_same(given[:1], (size,)) for size in shape)
        divides = [statically_known_true(given[1] % size == 0) for size in shape[::-1]]
        if straight != turned and divides[0 if straight else 1]:
            return () if straight else (TURN,)
    return None


def _sources_of_rows(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | int | None]]:
    """The values ``[rows, ...]`` that the node's rows may come from, each with the step to them.

    The step is None if the rows stay in order, a node if its value picks rows, and a number if each
    row is repeated that often.
    """
    target, args = node.target, node.args
    if target is operator.getitem and isinstance(args[0], fx.Node) and args[0].target in _PARTS:
        if isinstance(args[0].args[0], fx.Node):  # a part of each row
            yield args[0].args[0], None
        return
    if not args or not isinstance(args[0], fx.Node):
        return
    step: Any = None
    if target is aten.index.Tensor and isinstance(args[1], (list, tuple)):
        step = _picked_by(args[0], args[1])
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
    elif target in _ROW_WISE or _is_grouped_product(node):
        yield args[0], None


def _is_grouped_product(node: fx.Node) -> bool:
    """Whether the node is a product of rows that are sorted by expert."""
    product = product_of(node, node.all_input_nodes[1:])
    return product is not None and product.route is not None


def _picked_by(source: fx.Node, indices: Sequence[Any]) -> Any:
    """The index of ``x[index]``; or of ``x[:, index]``, if ``x`` is ``[1, rows, ...]``."""
    before = [index for index in indices[:-1] if index is not None]
    ones = _shape(source)[: len(indices) - 1]
    if before or not indices or not all(statically_known_true(size == 1) for size in ones):
        return None
    return indices[-1]


def _is_index(node: object) -> bool:
    """Whether its values pick rows: integers in one dimension, or booleans in any number."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    return value.dtype is torch.bool or (value.dim() == 1 and value.dtype is torch.int64)


def _has_rows_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether both have as many rows, in the first dimension or after dimensions of 1."""
    shapes = _shape(node), _shape(source)
    if _same(*(shape[:1] for shape in shapes)):
        return True
    if node.target not in _SHAPES:
        return False
    one, other = map(_without_ones_before, shapes)
    # The number of values is the same: with as many columns, there are as many rows.
    return _same(one[:1], other[:1]) or (len(one) == len(other) == 2 and _same(one[1:], other[1:]))


def _without_ones_before(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    while len(shape) > 2 and statically_known_true(shape[0] == 1):
        shape = shape[1:]
    return shape


def _squeezed(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape without ones, which do not change the order of rows."""
    return tuple(size for size in shape if not statically_known_true(size == 1))


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
