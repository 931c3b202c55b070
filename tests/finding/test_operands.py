"""What a weight meets: einsums against NumPy, rows and routes against plain loops."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from magr_fx.passes.finding.operands import Equation, Route, Rows, read_equation, tensordot_equation
from magr_fx.passes.finding.products import Layout

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=200)


class Case(NamedTuple):
    """An einsum, which operand the weight is, and what each group of labels is, in order."""

    equation: str
    side: int
    weight: tuple[int, ...]
    other: tuple[int, ...]
    result: str  # the result's labels, with those that an ellipsis stands for spelled out
    stack: str = ""
    tokens: str = ""
    out: str = ""


CASES: list[Case] = [
    Case("bi,oi->bo", 1, (3, 4), (2, 4), "bo", tokens="b", out="o"),
    Case("oi,bi->bo", 0, (3, 4), (2, 4), "bo", tokens="b", out="o"),
    Case("bi,io->bo", 1, (4, 3), (2, 4), "bo", tokens="b", out="o"),
    Case("bi,io->ob", 1, (4, 3), (2, 4), "ob", tokens="b", out="o"),
    Case("bi, io -> bo", 1, (4, 3), (2, 4), "bo", tokens="b", out="o"),
    Case("BI,IO->BO", 1, (4, 3), (2, 4), "BO", tokens="B", out="O"),
    Case("i,io->o", 1, (4, 3), (4,), "o", out="o"),
    Case("oi,i->o", 0, (3, 4), (4,), "o", out="o"),
    Case("bsd,dhk->bshk", 1, (4, 2, 3), (5, 2, 4), "bshk", tokens="bs", out="hk"),
    Case("bshk,hkd->bsd", 1, (2, 3, 4), (5, 2, 2, 3), "bsd", tokens="bs", out="d"),
    Case("hkd,bshk->dsb", 0, (2, 3, 4), (5, 2, 2, 3), "dsb", tokens="bs", out="d"),
    Case("bskh,hkd->bsd", 1, (2, 3, 4), (5, 2, 3, 2), "bsd", tokens="bs", out="d"),
    Case("sbd,hdk->hbsk", 1, (2, 4, 3), (5, 2, 4), "hbsk", tokens="sb", out="hk"),
    Case("eti,eoi->eto", 1, (3, 4, 5), (3, 2, 5), "eto", "e", "t", "o"),
    Case("eti,eio->teo", 1, (3, 5, 4), (3, 2, 5), "teo", "e", "t", "o"),
    Case("tei,eio->teo", 1, (3, 5, 4), (2, 3, 5), "teo", "e", "t", "o"),
    Case("ioe,tei->oet", 0, (5, 4, 3), (2, 3, 5), "oet", "e", "t", "o"),
    Case("efoi,bfei->bfeo", 0, (2, 3, 4, 5), (2, 3, 2, 5), "bfeo", "ef", "b", "o"),
    Case("...i,io->...o", 1, (4, 3), (2, 5, 4), "01o", tokens="01", out="o"),
    Case("...i,io->...o", 1, (4, 3), (4,), "o", out="o"),
    Case("oi,...i->...o", 0, (3, 4), (2, 5, 4), "01o", tokens="01", out="o"),
    Case("i...,oi->o...", 1, (3, 4), (4, 2, 5), "o01", tokens="01", out="o"),
    Case("b...i,oi->...ob", 1, (3, 4), (2, 5, 2, 4), "01ob", tokens="b01", out="o"),
    Case("...ei,eoi->...eo", 1, (3, 4, 5), (2, 2, 3, 5), "01eo", "e", "01", "o"),
    Case("...hk,hkd->...d", 1, (2, 3, 4), (5, 2, 2, 3), "01d", tokens="01", out="d"),
    Case("...oi,...i->...o", 0, (3, 4), (2, 5, 4), "01o", tokens="01", out="o"),
    # without an arrow the result has what occurs once, in the order of the alphabet
    Case("bi,io", 1, (4, 3), (2, 4), "bo", tokens="b", out="o"),
    Case("zi,ia", 1, (4, 3), (2, 4), "az", tokens="z", out="a"),
    Case("oi,...i", 0, (3, 4), (2, 5, 4), "01o", tokens="01", out="o"),
    Case("...hk,hkd", 1, (2, 3, 4), (5, 2, 2, 3), "01d", tokens="01", out="d"),
]


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def read(equation: str, side: int, weight: Tensor, other: Tensor) -> Equation | None:
    dims = (weight.dim(), other.dim()) if side == 0 else (other.dim(), weight.dim())
    return read_equation(equation, side, dims)


def layout_of(found: Equation) -> Layout:
    return Layout(order=found.weight, stacked=found.stacked, out=found.out)


def in_order(result: Tensor, labels: str, *groups: str) -> Tensor:
    """The result as ``[*stack, tokens, out]``."""
    stack, tokens, out = groups
    ordered = result.permute([labels.index(label) for label in stack + tokens + out])
    sizes = [result.shape[labels.index(label)] for label in stack]
    rows = math.prod(result.shape[labels.index(label)] for label in tokens)
    return ordered.reshape(*sizes, rows, -1)


def assert_is_the_einsum(case: Case, weight: Tensor, other: Tensor) -> None:
    found = read(case.equation, case.side, weight, other)
    assert found is not None
    operands = (weight, other) if case.side == 0 else (other, weight)
    einsum = torch.from_numpy(np.einsum(case.equation, *(t.numpy() for t in operands)))
    expected = in_order(einsum, case.result, case.stack, case.tokens, case.out)
    rows, matrix = found.rows.of(other), layout_of(found).of(weight)
    ordered = weight.permute(found.weight)
    sizes = (*expected.shape[: len(case.stack)], expected.shape[-1], rows.shape[-1])
    copied = ordered.reshape(sizes)
    if matrix is None:  # then it is stored in no such way
        assert copied.data_ptr() != weight.data_ptr()
    else:
        assert matrix.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert torch.equal(matrix.reshape(sizes), copied)
        if matrix.shape != sizes:  # rows that do not lie one after the other: several matrices
            assert not case.stack
            assert matrix.shape == ordered.shape[: len(case.out)] + sizes[-1:]
            assert copied.data_ptr() != weight.data_ptr()
    assert torch.equal(rows @ copied.mT, expected)
    assert found.stacked == len(case.stack)
    assert found.out == len(case.out)
    shape = tuple(other.shape)
    assert math.prod(found.rows.leading(shape)) == rows[..., 0].numel()
    assert sorted(found.rows.sizes(shape)) == sorted(shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.equation} {case.side}")
def test_an_einsum_is_rows_times_a_matrix(case: Case) -> None:
    assert_is_the_einsum(case, values(case.weight, 1), values(case.other, 2))


def test_the_sizes_of_each_group_are_told_apart() -> None:
    """In the table, that is: groups of one size could be mixed up."""
    for case in CASES:
        rows = read(case.equation, case.side, values(case.weight, 1), values(case.other, 2))
        assert rows is not None
        assert len(rows.rows.order or ()) == len(case.other)
        assert len(rows.weight) == len(case.weight)


@st.composite
def einsums(draw: st.DrawFn) -> tuple[Case, Tensor, Tensor]:
    """Any two terms whose shared labels are a stack's or summed over, in any order, on any side."""
    labels = draw(st.permutations("abcdefgXYZ"))
    counts = [draw(st.integers(*limits)) for limits in ((0, 2), (0, 3), (1, 2), (1, 2))]
    parts = []
    for count in counts:
        parts.append(labels[:count])
        labels = labels[count:]
    stack, tokens, out, summed = parts
    sizes = {label: draw(st.integers(1, 3)) for part in parts for label in part}
    weight = "".join(draw(st.permutations([*stack, *out, *summed])))
    other = "".join(draw(st.permutations([*stack, *tokens, *summed])))
    result = "".join(draw(st.permutations([*stack, *tokens, *out])))
    side = draw(st.integers(0, 1))
    terms = [weight, other] if side == 0 else [other, weight]
    equation = ",".join(terms)
    has_arrow = draw(st.booleans())
    if stack or has_arrow:
        equation += f"->{result}"
    else:
        result = "".join(sorted(result))
    case = Case(
        equation,
        side,
        tuple(sizes[label] for label in weight),
        tuple(sizes[label] for label in other),
        result,
        "".join(label for label in weight if label in stack),
        "".join(label for label in other if label in tokens),
        "".join(label for label in weight if label in out),
    )
    order = draw(st.permutations(range(len(weight))))  # in memory
    stored = values(tuple(case.weight[dim] for dim in order), 1)
    return case, stored.permute(np.argsort(order).tolist()), values(case.other, 2)


@repeatable
@given(einsums())
def test_any_einsum_of_two(drawn: tuple[Case, Tensor, Tensor]) -> None:
    assert_is_the_einsum(*drawn)


REFUSED: dict[str, tuple[str, int, tuple[int, int]]] = {
    "one operand": ("ij->ji", 0, (2, 0)),
    "three operands": ("ij,jk,kl->il", 0, (2, 2)),
    "a diagonal of the weight": ("ii,bi->bi", 0, (2, 2)),
    "a diagonal of the input": ("oi,bbi->bo", 0, (2, 3)),
    "a sum over the input's own": ("oi,bi->o", 0, (2, 2)),
    "a sum over the weight's own": ("oi,bi->b", 0, (2, 2)),
    "a sum over the stack's, and one more of the input": ("eoi,ebi->eo", 0, (3, 3)),
    "an outer product": ("oi,bk->obik", 0, (2, 2)),
    "elements": ("oi,oi->oi", 0, (2, 2)),
    "scaled rows": ("oi,i->oi", 0, (2, 1)),
    "a vector for a weight": ("i,bi->b", 0, (1, 2)),
    "vectors of a stack": ("ei,ebi->eb", 0, (2, 3)),
    "one number": ("i,i->", 0, (1, 1)),
    "nothing left, implied": ("oi,oi", 0, (2, 2)),
    "an ellipsis that is the weight's": ("...oi,bi->...bo", 0, (3, 2)),
    "an ellipsis that both have": ("...oi,...bi->...bo", 0, (3, 3)),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_no_matmul(name: str) -> None:
    equation, side, dims = REFUSED[name]
    assert read_equation(equation, side, dims) is None
    left, arrow, result = equation.partition("->")
    if name not in ("one operand", "three operands"):  # with the operands in the other order
        turned = ",".join(reversed(left.split(","))) + arrow + result
        assert read_equation(turned, 1 - side, (dims[1], dims[0])) is None


@pytest.mark.parametrize("equation", ["...i,oi->o", "b...i,oi->bo"])
def test_a_sum_over_an_ellipsis(equation: str) -> None:
    assert read_equation(equation, 1, (3, 2)) is None


# ---- plain rows


@pytest.mark.parametrize(
    ("shapes", "summed", "expected"),
    [
        (((2, 3, 4), (4, 5)), ((2,), (0,)), "abc,ce->abe"),
        (((2, 3, 4), (5, 4)), ((-1,), (-1,)), "abc,dc->abd"),
        (((2, 3, 4), (4, 5, 3)), ((1, 2), (2, 0)), "abc,ceb->ae"),
        (((3, 4), (3, 4)), ((0, 1), (0, 1)), "ab,ab->"),
        (((3,), (4,)), ((), ()), "a,b->ab"),
    ],
    ids=str,
)
def test_a_tensordot_is_an_einsum(shapes: Any, summed: Any, expected: str) -> None:
    one, other = (values(shape, seed) for seed, shape in enumerate(shapes))
    equation = tensordot_equation((one.dim(), other.dim()), *summed)
    assert equation == expected
    result = torch.tensordot(one, other, dims=summed)
    torch.testing.assert_close(torch.einsum(equation, one, other), result)


def test_rows_are_rows_or_columns() -> None:
    x = values((2, 3, 4), 1)
    assert Rows().of(x) is x
    assert torch.equal(Rows(columns=True).of(x), x.transpose(1, 2))
    vector = values((4,), 1)
    assert Rows().of(vector) is vector
    assert torch.equal(Rows(columns=True).of(vector), vector[None])


def test_leading_sizes() -> None:
    assert Rows().leading((2, 3, 4)) == (2, 3)
    assert Rows(columns=True).leading((2, 3, 4)) == (2, 4)
    assert Rows(columns=True).leading((4,)) == ()
    einsum = Rows(order=(1, 0, 3, 2), stacked=1, summed=2)
    assert einsum.leading((2, 3, 4, 5)) == (3, 2)
    assert einsum.of(values((2, 3, 4, 5), 1)).shape == (3, 2, 20)


# ---- routes


def route(*, ends: bool) -> Route:
    return Route(fx.Graph().placeholder("route"), ends=ends)


ENDS = [[0, 0, 0], [3], [2, 5, 9], [0, 2, 2, 7], [4, 4, 4], []]


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_segments(ends: list[int]) -> None:
    expected = {
        at: list(range(start, end))
        for at, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > start
    }
    found = dict(route(ends=True).split(torch.tensor(ends, dtype=torch.int32)))
    assert {at: index.tolist() for at, index in found.items()} == expected


@repeatable
@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), max_size=6))
def test_indices(places: list[list[int]]) -> None:
    flat = [place for pair in places for place in pair]
    expected = {p: [at for at, q in enumerate(flat) if q == p] for p in flat}
    index = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    found = dict(route(ends=False).split(index))
    assert {p: at.tolist() for p, at in found.items()} == expected


def test_one_index() -> None:
    ((place, index),) = route(ends=False).split(torch.tensor(2))
    assert (place, index.tolist()) == (2, [0])
