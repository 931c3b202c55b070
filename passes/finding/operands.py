"""What a weight meets: how the tokens lie in the other operand, and which expert each goes to."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx


@dataclass(frozen=True)
class Rows:
    """How the tokens lie in a matmul's other operand.

    They are its rows ``[..., tokens, in]``, or its columns ``[..., in, tokens]``, or, where
    ``order`` is given, the rows of its dimensions in that order: those of a stack, those of the
    tokens, those that are summed over.

    Attributes:
        columns: whether the tokens are columns.
        order: the permutation, for einsum.
        stacked, summed: how many of the permuted dimensions are the stack's, and are summed over.
    """

    columns: bool = False
    order: tuple[int, ...] | None = None
    stacked: int = 0
    summed: int = 1

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The operand as ``[..., tokens, in]``."""
        if self.order is not None:
            sizes = self.sizes(tuple(value.shape))
            stack, tokens = sizes[: self.stacked], sizes[self.stacked : -self.summed]
            return value.permute(self.order).reshape(
                *stack, math.prod(tokens), math.prod(sizes[-self.summed :])
            )
        if not self.columns:
            return value
        return (value[:, None] if value.dim() == 1 else value).mT

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape in the order of the rows: what is not the tokens' comes first and last."""
        if self.order is not None:
            return tuple(shape[dim] for dim in self.order)
        return (*shape[:-2], shape[-1], shape[-2]) if self.columns and len(shape) > 1 else shape

    def leading(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of an operand's shape, the sizes of everything but what is summed over."""
        return self.sizes(shape)[: -self.summed]


@dataclass(frozen=True)
class Route:
    """Which tokens go to which of a stack's matrices, known only when the model runs.

    Attributes:
        node: its value tells: where the segment of each matrix ends, in rows that are sorted by
            matrix (``ends``), or the index of each row's matrix.
        ends: which of the two.
        count: how many matrices an index picks from, if it may count from the end.
    """

    node: fx.Node
    ends: bool
    count: int = 0

    def split(self, route: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each matrix that any row goes to, with the indices of those rows; one sync for all."""
        if self.ends:
            ends = route.tolist()
            rows = torch.arange(max(ends, default=0), device=route.device)
        else:
            places = route.reshape(-1)
            places = places % self.count if self.count else places
            rows = torch.argsort(places, stable=True)
            ends = torch.bincount(places).cumsum(0).tolist()
        start = 0
        for matrix, end in enumerate(ends):
            if end > start:
                yield matrix, rows[start:end]
                start = end


class Equation(NamedTuple):
    """An einsum of a weight and an input, as a matmul."""

    weight: tuple[int, ...]  # the weight's dimensions in the order [stack, out, in]
    stacked: int
    out: int  # how many dimensions each is made of
    rows: Rows  # of the input


def read_equation(equation: str, side: int, dims: tuple[int, int]) -> Equation | None:
    """How the einsum of two operands is a matmul with the one at ``side``; None where it is none.

    A dimension that both have is summed over where the result does not have it, and else one of
    the stack's. A dimension that only one has must be in the result, and none may occur twice.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    if not arrow:  # then the result has what occurs once, in the order of the alphabet
        once = sorted(c for c in left if c.isalpha() and left.count(c) == 1)
        result = "".join(["..." if "..." in left else "", *once])
    labels = [_spelled_out(term, n) for term, n in zip(terms, dims, strict=True)]
    spelled = _spelled_out(result, None)
    if any(len(set(term)) != len(term) for term in labels):
        return None
    own, other = labels[side], labels[1 - side]
    if "..." in left:  # the dimensions that it stands for are the input's tokens
        if any(label.isdigit() for label in own) or "..." not in result:
            return None
        spelled = [d for d in other if d.isdigit()] + [c for c in spelled if c != "..."]
    shared = [label for label in own if label in other]
    stack = [label for label in shared if label in spelled]
    summed = [label for label in shared if label not in spelled]
    out = [label for label in own if label not in other]
    tokens = [label for label in other if label not in own]
    if not summed or not out or not set(out + tokens) <= set(spelled):
        return None
    order = tuple(other.index(label) for label in (*stack, *tokens, *summed))
    return Equation(
        tuple(own.index(label) for label in (*stack, *out, *summed)),
        len(stack),
        len(out),
        Rows(order=order, stacked=len(stack), summed=len(summed)),
    )


def tensordot_equation(dims: tuple[int, int], left: Sequence[int], right: Sequence[int]) -> str:
    """The einsum that a tensordot of operands with ``dims`` dimensions is.

    ``left`` and ``right`` are those that are summed over, in pairs.
    """
    letters = iter(string.ascii_letters)
    one, other = ([next(letters) for _ in range(n)] for n in dims)
    for a, b in zip(left, right, strict=True):
        other[b] = one[a]
    summed = {one[at] for at in left}
    result = [label for label in (*one, *other) if label not in summed]
    return f"{''.join(one)},{''.join(other)}->{''.join(result)}"


def _spelled_out(term: str, dims: int | None) -> list[str]:
    """The labels of a term; an ellipsis becomes one digit for each dimension it stands for."""
    before, ellipsis, after = term.partition("...")
    hidden = ["..."] if dims is None else [str(n) for n in range(dims - len(before) - len(after))]
    return [*before, *(hidden if ellipsis else []), *after]
