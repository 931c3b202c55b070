"""How the tokens lie in the input of a matmul, and which expert each of them goes to."""

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
    """How the tokens lie in a matmul's input operand.

    They are its rows ``[..., tokens, in]``, unless one of these attributes says otherwise.

    Attributes:
        columns: whether the tokens are the columns, ``[..., in, tokens]``.
        order: for einsum, the permutation after which the dimensions of the stack come first, then
            those of the tokens, then those that are summed over.
        stacked, summed: how many of the permuted dimensions are of the stack, and are summed over.
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
        """The sizes of a shape in the order: stack, tokens, dimensions that are summed over."""
        if self.order is not None:
            return tuple(shape[dim] for dim in self.order)
        return (*shape[:-2], shape[-1], shape[-2]) if self.columns and len(shape) > 1 else shape

    def leading(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of an operand's shape without the dimensions that are summed over."""
        return self.sizes(shape)[: -self.summed]


@dataclass(frozen=True)
class Route:
    """Which tokens go to which matrix of a stack; known only when the model runs.

    Attributes:
        node: its value is the end of each matrix's segment in rows that are sorted by matrix, or
            the index of each row's matrix.
        ends: whether it is the former.
        count: the number of matrices, if an index may be negative; 0 if none is.
    """

    node: fx.Node
    ends: bool
    count: int = 0

    def split(self, route: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each matrix that rows go to, with their indices; one device sync for all."""
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
    out: int  # how many dimensions the stack and ``out`` have
    rows: Rows  # of the input


def read_equation(equation: str, side: int, dims: tuple[int, int]) -> Equation | None:
    """The einsum of two operands as a matmul with the weight at ``side``; None if it is none.

    A dimension of both operands is summed over if it is not in the result; otherwise it is one of
    the stack. A dimension of one operand only must be in the result. In each operand, none may
    occur twice.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    if not arrow:  # then the result has the labels that occur once, in alphabetical order
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
    """The einsum equation of a tensordot of operands with ``dims`` dimensions.

    ``left`` and ``right`` are the dimensions that are summed over, in pairs.
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
