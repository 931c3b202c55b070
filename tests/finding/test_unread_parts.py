"""The parts of a parameter that nothing reads, and the matrices that an index picks from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_helpers import Formula, analyse, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import activations
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from magr_fx.passes.finding.find_linears import UNREACHED
from magr_fx.passes.graphs.weight_views import WeightView, picked_matrices, unread_parts

aten = torch.ops.aten
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def views(*matrices: Tensor) -> list[WeightView]:
    return [WeightView.of(matrix) for matrix in matrices]


# ---- what nothing reads


def test_all_is_read() -> None:
    stack, matrix = weight(3, 4, 5), weight(6, 5)
    assert unread_parts(stack, views(*stack)) == []
    assert unread_parts(stack, views(*stack.mT)) == []
    assert unread_parts(matrix, views(matrix)) == []
    assert unread_parts(matrix, views(matrix[:2], matrix[2:])) == []


def test_a_part_of_each_is_read() -> None:
    """Something of every row, and of every matrix: the parts lie along the first dimension."""
    stack, matrix = weight(3, 4, 5), weight(6, 5)
    assert unread_parts(stack, views(*stack[:, :2])) == []
    assert unread_parts(matrix, views(matrix[:, 1:])) == []


@pytest.mark.parametrize("offset", [0, 7])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_are_not_read(offset: int, transposed: bool) -> None:
    stored = torch.zeros(offset + 60)[offset:]
    stack = stored.view(3, 5, 4).mT if transposed else stored.view(3, 4, 5)
    assert unread_parts(stack, views(stack[1])) == [("[0]", (4, 5)), ("[2]", (4, 5))]
    assert unread_parts(stack, views(stack[0].T, stack[2].T)) == [("[1]", (4, 5))]
    assert unread_parts(stack, views(stack[2][1:])) == [("[0]", (4, 5)), ("[1]", (4, 5))]


def test_stacks_of_stacks() -> None:
    stack = weight(2, 3, 4, 5)
    assert unread_parts(stack, views(*stack[1])) == [("[0]", (3, 4, 5))]


def test_matrices_one_below_the_other() -> None:
    matrix = weight(12, 5)
    assert unread_parts(matrix, views(matrix[4:8])) == [("[0:4]", (4, 5)), ("[8:12]", (4, 5))]
    assert unread_parts(matrix, views(matrix[:4], matrix[8:])) == [("[4:8]", (4, 5))]
    assert unread_parts(matrix[:10], views(matrix[:4])) == [("[4:8]", (4, 5)), ("[8:10]", (2, 5))]
    columns = weight(5, 12).T
    assert unread_parts(columns, views(columns[:6])) == [("[6:12]", (6, 5))]


@repeatable
@given(st.lists(st.booleans(), min_size=1, max_size=6).filter(any))
def test_any_choice_of_experts(read: list[bool]) -> None:
    stack = torch.zeros(len(read), 2, 3)
    used = [matrix for matrix, is_read in zip(stack, read, strict=True) if is_read]
    unread = [f"[{at}]" for at, is_read in enumerate(read) if not is_read]
    assert [name for name, _ in unread_parts(stack, views(*used))] == unread
    flat = stack.flatten(0, 1)
    rows = [f"[{2 * at}:{2 * at + 2}]" for at, is_read in enumerate(read) if not is_read]
    assert [name for name, _ in unread_parts(flat, views(*used))] == rows


def test_matrices_of_several_heights() -> None:
    """As of a fused q (eight rows), k and v (two each), of which k is not read."""
    matrix = weight(12, 5)
    assert unread_parts(matrix, views(matrix[:8], matrix[10:])) == [("[8:10]", (2, 5))]


def test_a_part_that_is_not_read_is_reported() -> None:
    model = Formula(
        lambda m, x: x @ m.stack[0] + x @ m.stack[2] + F.linear(x, m.fused[4:8]),
        stack=weight(3, 8, 4),
        fused=weight(12, 8),
    )
    analysis = analyse(model, [activations(2, 5, 8)])
    assert analysis.shapes == {"stack[0]": (4, 8), "stack[2]": (4, 8), "fused[4:8]": (4, 8)}
    assert analysis.reasons == dict.fromkeys(["stack[1]", "fused[0:4]", "fused[8:12]"], UNREACHED)
    shapes = {rejection.name: rejection.shape for rejection in analysis.found.rejections}
    assert shapes == {"stack[1]": (8, 4), "fused[0:4]": (4, 8), "fused[8:12]": (4, 8)}


# ---- what an index picks from


def nodes(*steps: tuple[Any, ...], traced: Tensor | None = None) -> tuple[fx.Node, ...]:
    """A chain of aten ops with what follows their first argument; ``traced`` is its result."""
    graph = fx.Graph()
    node = graph.get_attr("weight")
    chain = []
    for target, *args in steps:
        node = graph.call_function(target, (node, *args))
        chain.append(node)
    if traced is not None:
        node.meta["val"] = traced
    return tuple(chain)


def assert_are(found: list[tuple[tuple[int, ...], Tensor | None]], expected: list[Tensor]) -> None:
    assert [place for place, _ in found] == [(at,) for at in range(len(expected))]
    for (_, operand), matrix in zip(found, expected, strict=True):
        assert operand is not None
        assert operand.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
        assert WeightView.of(operand.reshape(operand.shape[-2:])) == WeightView.of(matrix)


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_each_matrix_of_a_stack(dims: int) -> None:
    stack = weight(3, 4, 5)
    found = picked_matrices(stack, (), (), dims)
    assert_are(found, list(stack))
    assert all(operand is not None and operand.dim() == dims + 2 for _, operand in found)


def test_views_before_and_after() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 5))
    stack = nodes((aten.select.int, 0, 1), (aten.transpose.int, 1, 2))
    after = nodes((aten.transpose.int, 1, 2), (aten.slice.Tensor, 1, 0, 2))
    found = picked_matrices(parameter, stack, after, 1)
    assert_are(found, [matrix[:2] for matrix in parameter[1]])


def test_casts_after() -> None:
    stack = weight(3, 4, 5)
    after = nodes((aten.to.dtype, torch.float64), (aten.clone.default,))
    assert_are(picked_matrices(stack, (), after, 1), list(stack))


def test_the_size_of_the_index_does_not_matter() -> None:
    stack = weight(3, 4, 5)
    after = nodes((aten.transpose.int, 1, 2), traced=torch.zeros(7, 5, 4))
    assert_are(picked_matrices(stack, (), after, 1), [matrix.T for matrix in stack])


def test_what_is_no_matrix_of_the_stack() -> None:
    stack = weight(3, 4, 5)
    computed = nodes((aten.relu.default,))
    assert picked_matrices(stack, computed, (), 1) == [((), None)]
    mixed = nodes((aten.reshape.default, [-1, 20]), traced=torch.zeros(7, 20))
    assert picked_matrices(stack, (), mixed, 1) == [((at,), None) for at in range(3)]
