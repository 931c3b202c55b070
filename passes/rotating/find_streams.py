"""Traced graphs → the streams that can be rotated."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from magr_fx.passes.graphs.torch_private import schema_of
from magr_fx.passes.graphs.trace import GUARDS, Trace, attribute, is_mutation
from magr_fx.passes.graphs.weight_views import COPIES, RESIZES
from magr_fx.passes.rotating.overlapping import overlapping
from magr_fx.passes.rotating.streams import Axis, Fold, Stream, Streams

_ATEN = torch.ops.aten
_NOTHING = Fold(None)
_FINE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
# These give the numbers of their first argument, in another dtype, layout or shape that keeps the
# order of the numbers. A reshape may cut the last axis in blocks, or join blocks.
_CASTS = COPIES | {_ATEN.alias.default, _ATEN.detach.default, _ATEN.type_as.default}
_RESHAPES = (RESIZES - {_ATEN.expand.default}) | {_ATEN.flatten.using_ints, _ATEN.unflatten.int}
# Linear in their first argument, and the same for each number of the last axis unless `dim` is it.
_BY_DIM = {
    *(_ATEN.slice.Tensor, _ATEN.select.int, _ATEN.narrow.default, _ATEN.index_select.default),
    *(_ATEN.split.Tensor, _ATEN.split.sizes, _ATEN.split_with_sizes.default),
    *(_ATEN.chunk.default, _ATEN.unbind.int, _ATEN.cumsum.default, _ATEN.flip.default),
    *(_ATEN.sum.dim_IntList, _ATEN.mean.dim),
}
_OVER_TOKENS = {_ATEN.cumsum.default, _ATEN.sum.dim_IntList, _ATEN.mean.dim}
_ADDITIONS = {_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.add_.Tensor}
_PRODUCTS = {_ATEN.mul.Tensor, _ATEN.mul_.Tensor}
_QUOTIENTS = {_ATEN.div.Tensor}
_ZEROS = {
    *(_ATEN.zeros_like.default, _ATEN.new_zeros.default, _ATEN.zeros.default),
}
_MATMULS = {_ATEN.matmul.default, _ATEN.bmm.default}


def find_streams(
    traces: Iterable[Trace], model: nn.Module
) -> tuple[list[tuple[Stream, str]], dict[Axis, nn.Parameter | None]]:
    """Every stream that a weight reads, with its name: the first weight that reads it.

    All traces count: a stream that one of them fixes is fixed. So does what none of them uses: an
    expert that no token reaches, or a head for another task, may read any stream.

    Returns:
        The streams with their names, in the order of the model; and the bias that goes with each
        weight that reads one.
    """
    streams = Streams()
    owned = {id(parameter): name for name, parameter in model.named_parameters()}
    used: set[int] = set()
    for trace in traces:
        _Reader(trace, streams, owned, used).read()
    for one in overlapping(model):
        for at in range(one.dim()):
            streams.fix(Axis(one, at), "a weight shares its memory with another tensor")
    unused = [n for n, p in model.named_parameters() if id(p) not in used and p.numel() > 1]
    if unused:
        streams.fix_all(f"the calibration does not use {unused[0]}, which may read it")
    streams.settle()
    order = {key: at for at, key in enumerate(owned)}
    found = []
    for stream in streams.all():
        first = min(order[id(axis.parameter)] for axis in stream.readers)
        found.append((first, stream))
    names = list(owned.values())
    ordered = [(stream, names[at]) for at, stream in sorted(found, key=operator.itemgetter(0))]
    return ordered, streams.biases


@dataclass
class _Scaled:
    """A value times a norm's weight: only linears may read it."""

    source: fx.Node
    fold: Fold


@dataclass
class _Reader:
    """Goes through one graph, and joins or fixes the streams of its values."""

    trace: Trace
    streams: Streams
    owned: dict[int, str]
    used: set[int]
    scaled: dict[fx.Node, _Scaled] = field(default_factory=dict)
    squares: dict[fx.Node, fx.Node] = field(default_factory=dict)
    norm_weights: dict[fx.Node, Fold] = field(default_factory=dict)

    def read(self) -> None:
        for node in self.trace.graph_module.graph.nodes:
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._fix_all(node, "it is an output of the model")
            elif node.op == "placeholder":
                if _size(node):
                    self.streams.of(node, _size(node))
                    self.streams.fix(node, "it is an input of the model")
            elif node.target != GUARDS:
                self._fix_all(node, f"{node.target} reads it")

    def _attribute(self, node: fx.Node) -> None:
        value = attribute(self.trace, node)
        if node.users:
            self.used.add(id(value))
        if self._parameter(node) is None or value is None or value.dim() == 0:
            if _size(node):
                self.streams.of(node, _size(node))
                self.streams.fix(node, "a buffer or a constant takes part in it")
            return
        if isinstance(value, nn.Parameter) and value.dim() == 1:
            self.norm_weights[node] = Fold(value)

    def _parameter(self, node: Any) -> nn.Parameter | None:
        """The model's own parameter that an argument is, if it is nothing else."""
        while isinstance(node, fx.Node) and node.target in _CASTS and not _is_coarse(node):
            node = node.args[0]
        value = attribute(self.trace, node)
        if isinstance(value, nn.Parameter) and id(value) in self.owned:
            return value if value.is_floating_point() else None
        return None

    def _value(self, node: fx.Node) -> fx.Node | Axis:
        """The member that an argument is: a value, or the last axis of a parameter."""
        self._fix_if_shifted(node)
        parameter = self._parameter(node)
        if parameter is not None and parameter.dim() > 0:
            axis = Axis(parameter, parameter.dim() - 1)
            self.streams.of(axis).written.add(axis)
            for at in range(parameter.dim() - 1):
                self.streams.fix(Axis(parameter, at), "a value has it as another axis")
            return axis
        self.streams.of(node, _size(node) or 1)
        return node

    def _fix_all(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            self._fix(source, reason)

    def _fix(self, node: fx.Node, reason: str) -> None:
        self._fix_if_shifted(node)
        scaled, square = self.scaled.get(node), self.squares.get(node)
        if scaled is not None:
            self.streams.fix(self._value(scaled.source), f"{reason}, behind a norm")
        if square is not None:
            self.streams.fix(self._value(square), reason)
        parameter = self._parameter(node)
        if parameter is not None:
            for at in range(parameter.dim()):
                self.streams.fix(Axis(parameter, at), reason)
            return
        self.streams.of(node, _size(node) or 1)
        self.streams.fix(node, reason)

    def _fix_if_shifted(self, node: fx.Node) -> None:
        """Fix the weight w of a norm's 1 + w, where anything but the norm's product reads it."""
        shifted = self.norm_weights.get(node)
        if shifted is not None and shifted.plus_one and shifted.weight is not None:
            reason = "1 + a norm's weight is read as a value"
            self.streams.fix(Axis(shifted.weight, 0), reason)
            self.streams.of(node, _size(node) or 1)
            self.streams.fix(node, reason)

    def _unknown(self, node: fx.Node) -> None:
        reason = f"{node.target} reads it"
        self._fix_all(node, reason)
        self._fix(node, f"{node.target} makes it")

    def _call(self, node: fx.Node) -> None:
        schema = schema_of(node.target)
        if schema is not None and not schema.returns and not schema.is_mutable:
            return  # an assertion
        if isinstance(node.meta.get("val"), _NUMBERS):
            return
        target: Any = node.target
        for ops, rule in self._rules():
            if target in ops:
                if not rule(node):
                    self._unknown(node)
                return
        if target is operator.getitem:
            if not self._same(node, node.args[0], moves=True):
                self._unknown(node)
            return
        self._unknown(node)

    def _rules(self) -> list[tuple[AbstractSet[Any], Any]]:
        return [
            ({_ATEN.linear.default}, self._linear),
            ({_ATEN.addmm.default}, self._addmm),
            ({_ATEN.mm.default}, self._mm),
            ({_ATEN.embedding.default}, self._embedding),
            (_CASTS, self._cast),
            ({_ATEN.dropout.default}, self._cast),
            (_RESHAPES, self._reshape),
            ({_ATEN.transpose.int, _ATEN.permute.default, _ATEN.unsqueeze.default}, self._axes),
            ({_ATEN.expand.default, _ATEN.expand_as.default, _ATEN.squeeze.dim}, self._axes),
            ({_ATEN.repeat.default, _ATEN.repeat_interleave.self_int}, self._axes),
            (_BY_DIM, self._by_dim),
            (_ADDITIONS, self._add),
            (_PRODUCTS, self._product),
            (_QUOTIENTS, self._quotient),
            ({_ATEN.neg.default}, self._negative),
            ({_ATEN.pow.Tensor_Scalar, _ATEN.square.default}, self._square),
            ({_ATEN.cat.default, _ATEN.stack.default}, self._cat),
            ({_ATEN.index.Tensor}, self._index),
            (_MATMULS, self._matmul),
            ({_ATEN.scaled_dot_product_attention.default}, self._attention),
            ({_ATEN.rms_norm.default, _ATEN.layer_norm.default}, self._norm),
            (_ZEROS, self._zeros),
        ]

    # Rules: whether the op is understood. Each joins and fixes as it has to.

    def _zeros(self, node: fx.Node) -> bool:
        """Zeros stay zeros."""
        self.streams.of(node, _size(node) or 1)
        return True

    def _same(self, node: fx.Node, source: Any, *, moves: bool = False) -> bool:
        """The value has the last axis of ``source``; with ``moves`` its numbers as they are.

        A norm's shift is added behind the norm. It can be moved into the next weights only if
        nothing but the places of the numbers changes on the way.
        """
        if not isinstance(source, fx.Node) or _is_coarse(node):
            return False
        if source in self.scaled:
            shifted = self.scaled[source].fold.shift is not None
            if _size(node) != _size(source) or (shifted and not moves):
                return False
            self.scaled[node] = self.scaled[source]
            self.streams.of(node, _size(node) or 1)
            return True
        if source in self.squares:
            return False
        one, other = self._value(source), self._value(node)
        self.streams.join(one, other)
        return True

    def _cast(self, node: fx.Node) -> bool:
        if node.target is _ATEN.dropout.default and node.args[2]:
            return False
        source = node.args[0]
        if isinstance(source, fx.Node) and source in self.squares:
            self.squares[node] = self.squares[source]
            return True
        if node.target in _CASTS and not _is_coarse(node):
            if isinstance(source, fx.Node) and source in self.norm_weights:
                self.norm_weights[node] = self.norm_weights[source]
                return True
            if self._parameter(source) is not None:
                return True  # the same parameter: what reads the node looks through the cast
        return self._same(node, source, moves=True)

    def _negative(self, node: fx.Node) -> bool:
        return self._same(node, node.args[0])

    def _reshape(self, node: fx.Node) -> bool:
        source = node.args[0]
        if not (isinstance(source, fx.Node) and _size(source) and _size(node)):
            return False
        return self._same(node, source, moves=True)

    def _axes(self, node: fx.Node) -> bool:
        """Ops on other axes: the last one has to stay the last, at its length."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or not _size(source) or _size(source) != _size(node):
            return False
        last = _ndim(source) - 1
        return self._moved(node, last + 1).isdisjoint({last}) and self._same(
            node, source, moves=True
        )

    def _moved(self, node: fx.Node, ndim: int) -> set[int]:
        """The axes of the first argument that the op moves, repeats or removes."""
        given: Any = [*node.args[1:], *node.kwargs.values()]
        if node.target is _ATEN.permute.default:
            return {at for at, axis in enumerate(given[0]) if axis % ndim != at}
        if node.target is _ATEN.unsqueeze.default:  # a new last axis moves the old one
            return {ndim - 1} if given[0] in (-1, ndim) else set()
        if node.target is _ATEN.repeat_interleave.self_int:
            dim: Any = node.kwargs.get("dim", given[1] if len(given) > 1 else None)
            return {ndim - 1 if dim is None else dim % ndim}
        if node.target in (_ATEN.transpose.int, _ATEN.squeeze.dim):
            return {axis % ndim for axis in given if isinstance(axis, int)}
        return set()  # expand and repeat: of the last axis they would change the length

    def _by_dim(self, node: fx.Node) -> bool:
        source = node.args[0]
        ndim = _ndim(source)
        if not isinstance(source, fx.Node) or not ndim:
            return False
        if node.target in (_ATEN.sum.dim_IntList, _ATEN.mean.dim):
            square = self.squares.get(source)
            dims: Any = node.args[1] or range(ndim)
            last = [dim % ndim for dim in dims]
            if square is not None:  # the sum of all squares does not change
                self.streams.of(node, 1)
                self.streams.fix(node, "it is a sum of squares")
                return last == [ndim - 1]
            return ndim - 1 not in last and self._same(node, source)
        at = 2 if "split" in str(node.target) or node.target is _ATEN.chunk.default else 1
        dim: Any = node.kwargs.get("dim", node.args[at] if len(node.args) > at else 0)
        dims = dim if isinstance(dim, (list, tuple)) else [dim]
        if not all(isinstance(one, int) for one in dims):
            return False
        moves = node.target not in _OVER_TOKENS
        return ndim - 1 not in [one % ndim for one in dims] and self._same(
            node, source, moves=moves
        )

    def _add(self, node: fx.Node) -> bool:
        one, other = node.args[:2]
        if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
            return self._one_plus(node)
        if _size(one) != _size(other) or not _size(one):
            return False
        return self._same(node, one) and self._same(node, other) and node not in self.scaled

    def _one_plus(self, node: fx.Node) -> bool:
        """1 + w, of a norm's weight."""
        source = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if source not in self.norm_weights or 1 not in node.args or node.kwargs:
            return False
        weight = self.norm_weights[source]
        if weight.plus_one or node.target is _ATEN.sub.Tensor:
            return False
        self.norm_weights[node] = replace(weight, plus_one=True)
        return True

    def _product(self, node: fx.Node) -> bool:
        one, other = node.args[:2]
        if one is other and isinstance(one, fx.Node):
            return self._square(node)
        for value, factor in ((one, other), (other, one)):
            if not isinstance(value, fx.Node) or value in self.norm_weights:
                continue
            if not isinstance(factor, fx.Node):
                return self._same(node, value)
            if factor in self.norm_weights and value not in self.scaled:
                if is_mutation(node):  # what reads the value later would read it scaled
                    return False
                return self._scale(node, value, self.norm_weights[factor])
            if self._is_scalar(factor) and (_size(value) or 0) > 1:
                self._fix(factor, "it is a factor")
                return self._same(node, value)
        return False

    def _quotient(self, node: fx.Node) -> bool:
        value, factor = node.args[:2]
        if isinstance(factor, fx.Node):
            if not self._is_scalar(factor) or _size(value) in (None, 1):
                return False
            self._fix(factor, "it is a divisor")
        return self._same(node, value)

    def _is_scalar(self, node: fx.Node) -> bool:
        """Whether the value is one number for all of another value's last axis."""
        return _size(node) == 1 or (_ndim(node) == 0 and _is_tensor(node))

    def _scale(self, node: fx.Node, value: fx.Node, fold: Fold) -> bool:
        if fold.weight is None or _size(value) != len(fold.weight):
            return False
        return self._normed(node, value, fold)

    def _normed(self, node: fx.Node, value: fx.Node, fold: Fold) -> bool:
        """Note that a value is another one times a norm's weight."""
        if value in self.squares:
            return False
        member = self._value(value)
        for parameter in (fold.weight, fold.shift):
            if parameter is not None:
                self.streams.normed.setdefault(parameter, []).append(member)
        self.scaled[node] = _Scaled(value, fold)
        self.streams.of(node, _size(node) or 1)
        return True

    def _square(self, node: fx.Node) -> bool:
        source = node.args[0]
        two = node.target is not _ATEN.pow.Tensor_Scalar or node.args[1] == 2
        if not isinstance(source, fx.Node) or not two:
            return False
        if source in self.scaled or source in self.squares:
            return False
        self._value(source)
        self.squares[node] = source
        return True

    def _cat(self, node: fx.Node) -> bool:
        parts: Any = node.args[0]
        if not parts or not _size(parts[0]):
            return False
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        ndim = _ndim(parts[0]) + (node.target is _ATEN.stack.default)
        if dim % ndim == ndim - 1 or any(part in self.scaled for part in parts):
            return False
        return all(self._same(node, part) for part in parts)

    def _index(self, node: fx.Node) -> bool:
        source, indices = node.args[0], node.args[1]
        if not isinstance(source, fx.Node) or not isinstance(indices, (list, tuple)):
            return False
        taken = sum(_ndim(one) if _is_mask(one) else 1 for one in indices)
        return taken < _ndim(source) and self._same(node, source, moves=True)

    def _matmul(self, node: fx.Node) -> bool:
        """A·B: each row of the product is a sum of rows of B."""
        left, right = node.args[:2]
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or _ndim(right) < 2:
            return False
        if self._parameter(right) is not None or right in self.scaled:
            return False
        self._fix(left, f"{node.target} sums over it")
        return self._same(node, right)

    def _attention(self, node: fx.Node) -> bool:
        query, key, value = node.args[:3]
        for source in node.all_input_nodes:
            if source is not value:
                self._fix(source, f"{node.target} reads it")
        if value in (query, key) or not isinstance(value, fx.Node) or value in self.scaled:
            return False
        return self._same(node, value)

    def _norm(self, node: fx.Node) -> bool:
        source, shape = node.args[0], node.args[1]
        sized = isinstance(shape, (list, tuple)) and len(shape) == 1
        if not isinstance(source, fx.Node) or not sized or source in self.scaled:
            return False
        given = [*node.args[2:], None, None, None]
        centred = node.target is _ATEN.layer_norm.default
        weight, shift = self._parameter(given[0]), self._parameter(given[1]) if centred else None
        if (given[0] is not None and weight is None) or (
            centred and given[1] is not None and shift is None
        ):
            return False
        if centred:
            self.streams.of(self._value(source)).keeps_mean = True
        return self._normed(node, source, Fold(weight, shift=shift))

    def _embedding(self, node: fx.Node) -> bool:
        table = self._parameter(node.args[0])
        if table is None:
            return False
        self.streams.of(node, _size(node) or 1)
        self.streams.fix(Axis(table, 0), "an embedding looks its rows up")
        self.streams.write(node, Axis(table, 1))
        return True

    def _linear(self, node: fx.Node) -> bool:
        if len(node.args) < 2:
            return False
        value, weight = node.args[0], self._parameter(node.args[1])
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return self._multiply(node, value, weight, bias, reads=1)

    def _addmm(self, node: fx.Node) -> bool:
        if node.kwargs:
            return False
        bias, value, weight = node.args[:3]
        return self._multiply(node, value, self._parameter(weight), bias, reads=0)

    def _mm(self, node: fx.Node) -> bool:
        return self._multiply(node, node.args[0], self._parameter(node.args[1]), None, reads=0)

    def _multiply(
        self, node: fx.Node, value: Any, weight: nn.Parameter | None, bias: Any, *, reads: int
    ) -> bool:
        if weight is None or weight.dim() != 2 or not isinstance(value, fx.Node):
            return False
        if value in self.squares:
            return False
        shift = None if bias is None else self._parameter(bias)
        if bias is not None and (shift is None or shift.dim() != 1):
            return False
        scaled = self.scaled.get(value)
        fold = _NOTHING if scaled is None else scaled.fold
        source = value if scaled is None else scaled.source
        member, axis = self._value(source), Axis(weight, reads)
        if isinstance(member, Axis):  # a parameter is multiplied: no value of the data
            return False
        if fold.weight is not None and len(fold.weight) != weight.shape[reads]:
            return False  # it was cut into blocks behind the norm
        self.streams.read(member, axis, fold)
        if fold.shift is not None and shift is None:
            self.streams.fix(member, "a norm's shift has no bias to go to")
        self.streams.of(node, _size(node) or 1)
        self.streams.write(node, Axis(weight, 1 - reads))
        if shift is not None:
            self.streams.write(node, Axis(shift, 0))
        if self.streams.biases.setdefault(axis, shift) is not shift:
            self.streams.fix(member, "a weight is used with different biases")
        return True


def _size(node: Any) -> int | None:
    """The length of a value's last axis, where it is a number."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, (list, tuple)) and value:  # parts along another axis
        value = value[0]
    if isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[-1], int):
        return value.shape[-1]
    return None


def _is_coarse(node: fx.Node) -> bool:
    """Whether the value is a tensor of a dtype in which a rotated value would be another one."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype not in _FINE


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_mask(node: Any) -> bool:
    """Whether an index is a boolean tensor, which stands for as many axes as it has."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def _ndim(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0
