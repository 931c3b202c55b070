"""Streams: values in a graph whose last axis may be rotated, with the weights around them.

A stream is a set of values v of which all can become v·Q, with an orthogonal Q, without any change
of the graph's outputs. Weights that write into it become QᵀW, weights that read from it W·Q. The
residual stream of a pre-norm transformer is one (R1 of SpinQuant, arXiv 2405.16406), the values of
the heads between v and o are another (R2).

How it is found: every value, and every axis of every parameter, starts as a set of its own. An op
that commutes with a rotation of the last axis joins the sets of its inputs and its output. Any
other op fixes them: Q would have to be the identity. What is not fixed in the end can be rotated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn


class Axis(NamedTuple):
    """An axis of a parameter; compared by the identity of the parameter."""

    parameter: nn.Parameter
    at: int

    def __hash__(self) -> int:
        return hash((id(self.parameter), self.at))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axis) and (id(self.parameter), self.at) == (
            id(other.parameter),
            other.at,
        )


TIED = (
    "a weight reads it behind a norm and writes it as well; where that is an embedding, untie=True "
    "gives the head a weight of its own"
)


@dataclass(frozen=True, eq=False)
class Fold:
    """A norm's own weights, which the linear behind the norm takes over.

    The norm multiplies with ``weight``, or with 1 + weight (``plus_one``, Gemma's), and adds
    ``shift``. These then become 1 and 0, which is the same on a rotated stream.
    """

    weight: nn.Parameter | None
    plus_one: bool = False
    shift: nn.Parameter | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fold) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[int, bool, int]:
        return id(self.weight), self.plus_one, id(self.shift)


@dataclass(eq=False)
class Stream:
    """A set of values and axes that are rotated together.

    Attributes:
        fixed: why it cannot be rotated; empty if it can.
        block: the rotation is the same for each block of so many numbers, such as a head.
        axes: the axes of parameters that are rotated.
        readers: the weights that read the stream, on that axis.
        written: the axes that something else than a read needs as well, such as an embedding.
        folds: what each reader takes over from the norm before it.
        keeps_mean: whether Q must leave the vector of ones as it is, for a norm that subtracts
            the mean.
    """

    fixed: str = ""
    block: int = 0
    axes: set[Axis] = field(default_factory=set)
    readers: set[Axis] = field(default_factory=set)
    written: set[Axis] = field(default_factory=set)
    folds: dict[Axis, Fold] = field(default_factory=dict)
    keeps_mean: bool = False

    def add_fold(self, axis: Axis, fold: Fold) -> None:
        """Note what a reader takes over; it must be the same wherever the weight is used."""
        if self.folds.setdefault(axis, fold) != fold:
            self.fixed = self.fixed or "a weight reads it behind different norms"


class Streams:
    """The sets, joined as the ops say."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node | Axis, fx.Node | Axis] = {}
        self._stream: dict[fx.Node | Axis, Stream] = {}
        # The bias that is added where a weight reads on this axis.
        self.biases: dict[Axis, nn.Parameter | None] = {}
        # The values that are multiplied with a norm's weight: by that parameter.
        self.normed: dict[nn.Parameter, list[fx.Node | Axis]] = {}

    def of(self, member: fx.Node | Axis, size: int | None = None) -> Stream:
        """The stream of a value or an axis; ``size`` is that of its axis where it is new."""
        if member not in self._parent:
            self._parent[member] = member
            stream = self._stream[member] = Stream()
            if isinstance(member, Axis):
                stream.axes.add(member)
                stream.block = member.parameter.shape[member.at]
            elif size is not None:
                stream.block = size
        return self._stream[self._root(member)]

    def join(self, one: fx.Node | Axis, other: fx.Node | Axis) -> None:
        """Rotate both together; the block is what divides both sizes."""
        first, second = self.of(one), self.of(other)
        if first is second:
            return
        self._parent[self._root(other)] = self._root(one)
        first.fixed = first.fixed or second.fixed
        first.block = math.gcd(first.block, second.block)
        first.axes |= second.axes
        first.readers |= second.readers
        first.written |= second.written
        first.keeps_mean |= second.keeps_mean
        for axis, fold in second.folds.items():
            first.add_fold(axis, fold)

    def fix(self, member: fx.Node | Axis, reason: str) -> None:
        """Do not rotate the stream of this value or axis."""
        stream = self.of(member)
        stream.fixed = stream.fixed or reason

    def read(self, value: fx.Node, axis: Axis, fold: Fold) -> None:
        """A weight reads a value on this axis, through a norm's weights that it can take over."""
        self.join(value, axis)
        stream = self.of(value)
        stream.readers.add(axis)
        stream.add_fold(axis, fold)

    def write(self, value: fx.Node, axis: Axis) -> None:
        """What an axis of a parameter holds is, or becomes, numbers of this value."""
        self.join(value, axis)
        self.of(value).written.add(axis)

    def fix_all(self, reason: str) -> None:
        """Do not rotate anything."""
        for stream in self._stream.values():
            stream.fixed = stream.fixed or reason

    def settle(self) -> None:
        """Fix what cannot be rotated because of what it shares with others."""
        uses = Counter(id(bias) for bias in self.biases.values() if bias is not None)
        for weight, members in self.normed.items():
            if Axis(weight, 0) in self._parent:  # it would have to become 1, or 0
                for member in (*members, Axis(weight, 0)):
                    self.fix(member, "a norm's weight is used elsewhere as well")
        for stream in self.all():
            shifted = [self.biases[a] for a, fold in stream.folds.items() if fold.shift is not None]
            if any(uses[id(bias)] > 1 for bias in shifted):
                stream.fixed = stream.fixed or "a bias is used by several weights"
            tied = [a for a in stream.readers & stream.written if stream.folds[a] != Fold(None)]
            if tied:
                stream.fixed = stream.fixed or TIED
            if stream.block < 2:
                stream.fixed = stream.fixed or "it is cut into single numbers"
        changed = True
        while changed:  # a norm's weight becomes 1 for all that it is multiplied with, or for none
            changed = False
            for members in self.normed.values():
                streams = [self.of(member) for member in members]
                fixed = next((stream.fixed for stream in streams if stream.fixed), "")
                for stream in streams:
                    if fixed and not stream.fixed:
                        stream.fixed, changed = f"it shares a norm's weight: {fixed}", True

    def all(self) -> Iterator[Stream]:
        """Every stream that a weight reads."""
        for member, parent in list(self._parent.items()):
            if member is parent and self._stream[member].readers:
                yield self._stream[member]

    def _root(self, member: fx.Node | Axis) -> fx.Node | Axis:
        while (parent := self._parent[member]) is not member:
            self._parent[member] = self._parent[parent]
            member = parent
        return member
