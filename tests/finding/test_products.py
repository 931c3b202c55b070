"""Which nodes multiply a weight with an input, and how both lie in their operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import activations
from torch import Tensor, fx

from magr_fx.passes.finding.operands import Route, Rows
from magr_fx.passes.finding.products import MATMULS, Layout, Product, is_product, product_of

aten = torch.ops.aten
ADDBMM = aten.addbmm.default
W, X, B = "w", "x", "b"  # what an argument stands for in the tables
T, I, O, E = 5, 8, 4, 3  # noqa: E741


def node_of(target: Any, args: tuple[Any, ...], **tensors: Tensor) -> dict[str, fx.Node]:
    """One call in a graph: its inputs by name, and the call as ``call``."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, value in tensors.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = value

    def filled(argument: Any) -> Any:
        if isinstance(argument, list):
            return [filled(one) for one in argument]
        return nodes.get(argument, argument) if isinstance(argument, str) else argument

    nodes["call"] = graph.call_function(target, tuple(filled(a) for a in args))
    return nodes


def product(nodes: dict[str, fx.Node], *weights: str) -> Product | None:
    return product_of(nodes["call"], {nodes[name] for name in weights or (W,)})


# target, arguments, the weight's shape, the input's, and the bias's
FORMS: dict[str, tuple[Any, tuple[Any, ...], dict[str, tuple[int, ...]]]] = {
    "linear": (aten.linear.default, (X, W), {W: (O, I), X: (2, T, I)}),
    "linear with a bias": (aten.linear.default, (X, W, B), {W: (O, I), X: (T, I), B: (O,)}),
    "linear, weight first": (aten.linear.default, (W, X), {W: (O, I), X: (T, I)}),
    "inner": (aten.inner.default, (X, W), {W: (O, I), X: (2, T, I)}),
    "inner, weight first": (aten.inner.default, (W, X), {W: (O, I), X: (2, T, I)}),
    "mv": (aten.mv.default, (W, X), {W: (O, I), X: (I,)}),
    "addmv": (aten.addmv.default, (B, W, X), {W: (O, I), X: (I,), B: (O,)}),
    "tensordot": (aten.tensordot.default, (X, W, [2, 1], [1, 2]), {W: (O, I, T), X: (2, T, I)}),
    "mm": (aten.mm.default, (X, W), {W: (I, O), X: (T, I)}),
    "mm, weight first": (aten.mm.default, (W, X), {W: (O, I), X: (I, T)}),
    "matmul": (aten.matmul.default, (X, W), {W: (I, O), X: (2, T, I)}),
    "matmul, weight first": (aten.matmul.default, (W, X), {W: (O, I), X: (2, I, T)}),
    "matmul of a vector": (aten.matmul.default, (W, X), {W: (O, I), X: (I,)}),
    "bmm": (aten.bmm.default, (X, W), {W: (E, I, O), X: (E, T, I)}),
    "bmm, weight first": (aten.bmm.default, (W, X), {W: (E, O, I), X: (E, I, T)}),
    "addmm": (aten.addmm.default, (B, X, W), {W: (I, O), X: (T, I), B: (O,)}),
    "addmm, weight first": (aten.addmm.default, (B, W, X), {W: (O, I), X: (I, T), B: (1,)}),
    "baddbmm": (aten.baddbmm.default, (B, X, W), {W: (E, I, O), X: (E, T, I), B: (E, 1, O)}),
    "einsum": (aten.einsum.default, ("bti,oi->bto", [X, W]), {W: (O, I), X: (2, T, I)}),
    "einsum, weight first": (aten.einsum.default, ("io,ti->ot", [W, X]), {W: (I, O), X: (T, I)}),
    "einsum of many": (aten.einsum.default, ("tei,eio->eto", [X, W]), {W: (E, I, O), X: (T, E, I)}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMS))
def test_the_product_is_rows_times_a_matrix(name: str) -> None:
    """Up to the order of the result's dimensions, and without a bias."""
    target, args, shapes = FORMS[name]
    tensors = {
        key: activations(*shape, seed=at).double() for at, (key, shape) in enumerate(shapes.items())
    }
    tensors |= {B: tensors[B] * 0} if B in tensors else {}
    nodes = node_of(target, args, **tensors)
    found = product(nodes)
    assert found is not None
    assert (found.weight, found.input, found.route) == (nodes[W], nodes[X], None)
    assert found.direct == (name in ("linear", "linear with a bias"))
    assert is_product(nodes["call"])
    matrix = found.layout.of(tensors[W])
    assert matrix is not None
    assert matrix.untyped_storage().data_ptr() == tensors[W].untyped_storage().data_ptr()
    assert matrix.shape[-2:] == (O, I * T if name == "tensordot" else I)
    filled = [
        [tensors.get(k, k) for k in a] if isinstance(a, list) else tensors.get(a, a) for a in args
    ]
    result: Tensor = target(*filled)
    expected = found.rows.of(tensors[X]) @ matrix.mT
    assert result.numel() == expected.numel()
    torch.testing.assert_close(expected.flatten().sort()[0], result.flatten().sort()[0])


def test_every_matmul_is_in_the_table() -> None:
    others = {aten.einsum.default, aten.tensordot.default}
    # addbmm, whose result is a sum over the stack, has a test of its own.
    assert {target for target, _, _ in FORMS.values()} == {*MATMULS, *others} - {ADDBMM}


def test_addbmm_is_bmm_in_a_sum() -> None:
    shapes = {W: (E, I, O), X: (E, T, I), B: (T, O)}
    tensors = {key: activations(*shape).double() for key, shape in shapes.items()}
    found = product(node_of(ADDBMM, (B, X, W), **tensors))
    assert found is not None
    matrix = found.layout.of(tensors[W])
    assert matrix is not None
    expected = (found.rows.of(tensors[X]) @ matrix.mT).sum(0) + tensors[B]
    torch.testing.assert_close(expected, torch.addbmm(tensors[B], tensors[X], tensors[W]))


def test_inner_of_a_stack_is_none() -> None:
    """Every row meets every matrix: none of them has rows of its own."""
    nodes = node_of(aten.inner.default, (X, W), w=torch.ones(E, O, I), x=torch.ones(T, I))
    assert product(nodes) is None
    assert is_product(nodes["call"])


@pytest.mark.parametrize(
    "target",
    [
        aten.bilinear.default,
        aten.chain_matmul.default,
        aten.gru.input,
        aten.gru_cell.default,
        aten.linalg_multi_dot.default,
        aten.lstm.input,
        aten.lstm.data,
        aten.lstm_cell.default,
        aten.rnn_relu.input,
        aten.rnn_relu_cell.default,
        aten.rnn_tanh.data,
        aten.rnn_tanh_cell.default,
    ],
    ids=str,
)
def test_products_inside_of_an_op(target: Any) -> None:
    """They are known as products, but nothing can be taken in there."""
    nodes = node_of(target, (X, W), w=torch.ones(O, I), x=torch.ones(T, I))
    assert is_product(nodes["call"])
    assert product(nodes) is None


@pytest.mark.parametrize("name", sorted(FORMS))
def test_no_product_of_two_weights_or_of_none(name: str) -> None:
    target, args, shapes = FORMS[name]
    nodes = node_of(target, args, **{key: torch.ones(shape) for key, shape in shapes.items()})
    assert product(nodes, W, X) is None
    assert product_of(nodes["call"], set()) is None


def test_the_weight_may_be_the_other_operand() -> None:
    nodes = node_of(aten.matmul.default, (X, W), x=torch.ones(O, I), w=torch.ones(I, T))
    found = product(nodes, X)
    assert found is not None
    assert (found.weight, found.input) == (nodes[X], nodes[W])
    assert (found.layout, found.rows) == (Layout(), Rows(columns=True))


def test_a_weight_that_is_the_bias_as_well() -> None:
    square = torch.ones(I, I)
    assert product(node_of(aten.addmm.default, (W, X, W), w=square, x=square)) is None
    assert product(node_of(aten.linear.default, (X, W, W), w=square, x=square)) is None
    assert product(node_of(aten.addmm.default, (X, X, W), w=square, x=square)) is not None


@pytest.mark.parametrize(
    "args",
    [
        ("oi,ti,ti->to", [W, X, X]),
        ("oi->io", [W]),
        ("ti,oi->t", [X, W]),
        ("ti,oi->to", [X, 3]),
        ("ti,oi->to", [W, W]),
    ],
    ids=str,
)
def test_einsums_that_are_none(args: tuple[Any, ...]) -> None:
    nodes = node_of(aten.einsum.default, args, w=torch.ones(O, I), x=torch.ones(T, I))
    assert product(nodes) is None
    assert is_product(nodes["call"])


def test_other_ops() -> None:
    nodes = node_of(aten.mul.Tensor, (X, W), x=torch.ones(T, I), w=torch.ones(I))
    assert not is_product(nodes["call"])
    assert product(nodes) is None
    assert not is_product(nodes[X])


# ---- layouts


# the order of a [2, 3, 4]'s dimensions, how many are out's, and what comes of it
LAYOUTS: list[tuple[tuple[int, ...], int, tuple[int, ...] | None]] = [
    ((0, 1, 2), 1, (2, 12)),
    ((0, 1, 2), 2, (6, 4)),
    ((2, 0, 1), 1, (4, 6)),
    ((1, 0, 2), 1, None),  # in is two dimensions that do not lie one after the other
    ((0, 2, 1), 1, None),
    ((1, 0, 2), 2, (3, 2, 4)),  # out is: a matrix for each of the three
    ((0, 2, 1), 2, (2, 4, 3)),
]


@pytest.mark.parametrize(("order", "out", "shape"), LAYOUTS)
def test_a_layout_shares_the_memory(
    order: tuple[int, ...], out: int, shape: tuple[int, ...] | None
) -> None:
    stored = activations(2, 3, 4)
    matrix = Layout(order=order, out=out).of(stored)
    assert (None if matrix is None else tuple(matrix.shape)) == shape
    if matrix is not None:
        assert torch.equal(matrix.flatten(), stored.permute(order).flatten())
        assert matrix.data_ptr() == stored.data_ptr()


def test_the_layout_of_a_stack() -> None:
    stored = activations(2, 3, 4, 5)
    stacked = Layout(order=(1, 2, 3, 0), stacked=1).of(stored)
    assert stacked is None  # 3 and 0 do not lie one after the other
    stacked = Layout(order=(1, 0, 2, 3), stacked=1).of(stored)
    assert stacked is not None
    assert torch.equal(stacked, stored.permute(1, 0, 2, 3).reshape(3, 2, 20))
    assert Layout(order=(1, 0, 2, 3), stacked=1, out=2).of(stored) is None


def test_a_vector_is_not_turned() -> None:
    vector, matrix = activations(4), activations(3, 4)
    assert Layout(turned=True).of(vector) is vector
    turned = Layout(turned=True).of(matrix)
    assert turned is not None
    assert torch.equal(turned, matrix.T)


# ---- rows that are sorted by expert

ENDS = torch.tensor([2, 2, T], dtype=torch.int32)


def grouped(x: tuple[int, ...] = (T, I), w: tuple[int, ...] = (E, I, O)) -> dict[str, fx.Node]:
    target = aten._grouped_mm.default
    return node_of(target, (X, W, "e"), x=torch.ones(x), w=torch.ones(w), e=ENDS)


def test_grouped() -> None:
    nodes = grouped()
    assert is_product(nodes["call"])
    assert product(nodes) == Product(
        nodes[W], nodes[X], Layout(turned=True), Rows(), Route(nodes["e"], ends=True)
    )


def test_grouped_by_keyword() -> None:
    nodes = grouped()
    call = nodes["call"]
    call.args, call.kwargs = call.args[:2], {"offs": call.args[2]}
    found = product(nodes)
    assert found is not None
    assert found.route == Route(nodes["e"], ends=True)


def test_grouped_in_other_ways() -> None:
    """Columns of one matrix, or as many rows for each: no experts."""
    assert product(grouped(x=(T, I), w=(I, O))) is None
    assert product(grouped(x=(E, T, I), w=(E, I, O))) is None
    assert product(grouped(x=(E, T, I), w=(I, O))) is None
    assert product(grouped(), X) is None
    assert product(grouped(), X, W) is None
    nodes = grouped()
    nodes["call"].args = nodes["call"].args[:2]
    assert product(nodes) is None


def test_what_torch_calls() -> None:
    """grouped_mm's op is the one that is known by name, and its segments are what they seem."""
    x, w = activations(T, I), activations(E, O, I).mT
    found = product(grouped())
    assert found is not None
    assert found.route is not None
    result = torch.nn.functional.grouped_mm(x, w, offs=ENDS)
    matrices = found.layout.of(w)
    assert matrices is not None
    expected = torch.zeros(T, O)
    for expert, index in found.route.split(ENDS):
        expected[index] = found.rows.of(x)[index] @ matrices[expert].T
    torch.testing.assert_close(result, expected)
    assert aten._grouped_mm.default._schema.name == "aten::_grouped_mm"
