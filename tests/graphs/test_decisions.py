"""Which ops of a graph draw random numbers: not those that would, were the model in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_helpers import Formula
from tiny_models import activations
from torch import Tensor, fx, nn
from torch.nn import functional

from magr_fx.passes.graphs.decisions import is_random

aten = torch.ops.aten
X = activations(4, 6)
QKV = tuple(activations(1, 2, 5, 8, seed=seed) for seed in range(3))
_GRU = [(12, 6), (12, 4), (12, 4), (12, 4)]  # two layers without biases


def gru(dropout: float, train: bool) -> tuple[Any, ...]:
    weights = [activations(*shape, seed=seed) for seed, shape in enumerate(_GRU)]
    return (
        activations(5, 3, 6),
        activations(2, 3, 4),
        weights,
        False,
        2,
        dropout,
        train,
        *[False] * 2,
    )


# op, arguments, keywords, whether its value is another one each time
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = [
    (aten.dropout.default, (X, 0.5, True), {}, True),
    (aten.dropout.default, (X, 0.5, False), {}, False),
    (aten.dropout.default, (X,), {"train": False, "p": 0.5}, False),
    (aten.dropout.default, (X, 0.0, True), {}, False),
    (aten.dropout.default, (X, 1.0, True), {}, False),
    (aten.dropout_.default, (X, 0.5, False), {}, False),
    (aten.alpha_dropout.default, (X, 0.5, True), {}, True),
    (aten.alpha_dropout.default, (X, 0.5, False), {}, False),
    (aten.feature_dropout.default, (X[None], 0.5, True), {}, True),
    (aten.feature_dropout.default, (X[None], 0, True), {}, False),
    (aten.feature_alpha_dropout.default, (X[None], 0.5, False), {}, False),
    (aten.native_dropout.default, (X, 0.5, None), {}, True),
    (aten.native_dropout.default, (X, 0.5, False), {}, False),
    (aten.native_dropout.default, (X, 0.0, True), {}, False),
    (aten.rrelu.default, (X,), {}, False),  # training is off by default
    (aten.rrelu.default, (X, 0.1, 0.3, True), {}, True),
    (aten.rrelu_with_noise.default, (X, X, 0.1, 0.3, False), {}, False),
    (aten.bernoulli.default, (X.sigmoid(),), {}, True),
    (aten.multinomial.default, (X.exp(), 3), {}, True),
    (aten.geometric.default, (X, 0.5), {}, True),
    (aten.scaled_dot_product_attention.default, QKV, {}, False),
    (aten.scaled_dot_product_attention.default, (*QKV, None, 0.0, True), {}, False),
    (aten.scaled_dot_product_attention.default, QKV, {"dropout_p": 0.5}, True),
    (aten.scaled_dot_product_attention.default, (*QKV, None, 0.5), {}, True),
    (aten._scaled_dot_product_flash_attention_for_cpu.default, QKV, {}, False),
    (aten._scaled_dot_product_attention_math.default, QKV, {}, False),
    (aten._scaled_dot_product_attention_math.default, QKV, {"dropout_p": 0.5}, True),
    (aten.gru.input, gru(0.5, True), {}, True),
    (aten.gru.input, gru(0.5, False), {}, False),
    (aten.gru.input, gru(0.0, True), {}, False),
    (aten.linear.default, (X, X), {}, False),
]


def node_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """A node of a graph that calls the op with these, its tensors being placeholders."""
    graph = fx.Graph()

    def placeholder(value: Any) -> Any:
        if isinstance(value, list):
            return [placeholder(inner) for inner in value]
        return graph.placeholder("x") if isinstance(value, Tensor) else value

    return graph.call_function(target, tuple(map(placeholder, args)), kwargs)


def _id(value: Any) -> str | None:
    return str(value) if isinstance(value, torch._ops.OpOverload) else None


@pytest.mark.parametrize(("target", "args", "kwargs", "random"), CALLS, ids=_id)
def test_an_op_is_random_if_its_value_is_another_one_each_time(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], random: bool
) -> None:
    values = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(4):
            torch.manual_seed(seed)
            copies = [x.clone() if isinstance(x, Tensor) else x for x in args]
            result = target(*copies, **kwargs)
            values.append(result[0] if isinstance(result, tuple) else result)
    assert all(torch.equal(value, values[0]) for value in values) is not random
    assert is_random(node_of(target, args, kwargs)) is random


def _tagged() -> Iterator[Any]:
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = name.partition("::")
        name, _, overload = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        op = getattr(packet, overload or "default", None)
        if op is not None and torch.Tag.nondeterministic_seeded in op.tags:
            yield op


def test_every_op_that_can_be_told_to_draw_nothing() -> None:
    """Of all that torch marks as random, by the names of their arguments, also on other devices."""
    switched = dropping = 0
    for op in _tagged():
        names = {argument.name for argument in op._schema.arguments}
        seeds = "_cudnn_init_dropout_state" in op.name() or "_fill_mem_eff" in op.name()
        if seeds and not op.name().endswith(("state", "mask_")):
            continue  # their out= variants, which no graph has
        for name in names & {"train", "training"}:
            assert is_random(node_of(op, (), {name: False})) is seeds, op
            switched += 1
        for name in names & {"dropout_p", "dropout"}:
            assert is_random(node_of(op, (), {name: 0.5})), op
            assert is_random(node_of(op, (), {name: 0.0})) is seeds, op
            dropping += 1
    assert switched > 20
    assert dropping > 20


def test_a_probability_that_the_graph_computes_may_be_any() -> None:
    graph = fx.Graph()
    x, p = graph.placeholder("x"), graph.placeholder("p")
    assert is_random(graph.call_function(aten.dropout.default, (x, p, True)))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["cond", "autocast", "loop", "loop in cond"])
def test_a_region_draws_what_is_drawn_in_it(kind: str, p: float) -> None:
    """For the quantized run to draw the same, a whole loop has to say that it draws."""

    def inner(x: Tensor) -> Tensor:
        return functional.dropout(x, p, training=True) + 1

    def loop(x: Tensor) -> Any:
        loop_of: Any = torch.while_loop
        return loop_of(lambda x: x.sum() < 0, lambda x: (inner(x),), (x,))[0]

    def function(m: Any, x: Tensor) -> Any:
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return inner(m.part(x))
        if kind == "loop":
            return loop(x)
        return torch.cond(x.sum() > 0, inner if kind == "cond" else loop, torch.sin, (x,))

    model = Formula(function, part=nn.Linear(6, 6)).eval()
    with torch.no_grad():
        graph_module = torch.export.export(model, (X,), strict=False).module(check_guards=False)
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    assert any(map(is_random, nodes)) is (p == 0.5)
