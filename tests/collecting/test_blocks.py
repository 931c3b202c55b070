"""Cutting a graph into a transformer's layers, and running several traces layer by layer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, Formula, analyse, architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from matmul_forms import FORMS, form_analysis
from tiny_models import ARCHITECTURES, activations, tiny_llama, token_ids
from torch import Tensor, fx, nn

from magr_fx.passes.collecting.blocks import Block, cut_into_blocks, in_step
from magr_fx.passes.finding.weight_uses import Call
from magr_fx.passes.graphs.trace import is_mutation

Label = tuple[str, Hashable]


def calls_of(analysis: Analysis) -> list[Call]:
    return [call for site in analysis.found.sites for call in site.calls]


def cut(analysis: Analysis) -> list[Block]:
    """The blocks of the only trace."""
    (trace,) = analysis.traces
    return cut_into_blocks(trace, calls_of(analysis))


def labels(analysis: Analysis) -> list[Label]:
    return [block.label for block in cut(analysis)]


def sites_by_block(analysis: Analysis) -> dict[Label, list[str]]:
    """The sites whose calls each block visits."""
    return {
        block.label: [
            site.name
            for site in analysis.found.sites
            if any(call.node in block.nodes for call in site.calls)
        ]
        for block in cut(analysis)
    }


# ---- where a graph is cut


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("qwen2", ["model.layers.0", "model.layers.1"]),
        ("gpt_neox", ["gpt_neox.layers.0", "gpt_neox.layers.1"]),
        ("bert", ["encoder.layer.0", "encoder.layer.1"]),
        ("vit", ["layers.0", "layers.1"]),
        ("t5", [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)]),
    ],
)
@pytest.mark.slow_unless("bert-layers3", "vit-layers4")
def test_a_block_is_a_layer(name: str, layers: list[str]) -> None:
    analysis = architecture(name)
    assert labels(analysis) == [("", 1), *((layer, 1) for layer in layers)]
    for (label, _), sites in sites_by_block(analysis).items():
        if label:
            owned = [site for site in sites if site.startswith(f"{label}.")]
            between = [site for site in sites if not any(layer in site for layer in layers)]
            assert owned
            assert sites == [*owned, *between]
        else:
            assert sites == []


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.slow_unless("bert", "vit")
def test_every_call_is_visited_once_and_in_order(name: str) -> None:
    analysis = architecture(name)
    blocks = cut(analysis)
    order = {n: at for at, n in enumerate(analysis.traces[0].graph_module.graph.nodes)}
    nodes = [node for block in blocks for node in block.nodes if node.op != "get_attr"]
    assert [order[node] for node in nodes] == sorted({order[node] for node in nodes})
    assert {call.node for call in calls_of(analysis)} <= set(nodes)


def test_a_model_and_its_head_are_cut_inside_the_model() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    analysis = analyse(nn.Sequential(layers, nn.Linear(8, 2)), [activations(2, 5, 8)])
    assert sites_by_block(analysis) == {
        ("0.0", 1): ["0.0.0.weight"],
        ("0.1", 1): ["0.1.0.weight"],
        ("0.2", 1): ["0.2.0.weight", "1.weight"],
    }


def test_a_flat_sequence_is_cut_at_every_linear() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    assert labels(analyse(model, [activations(2, 5, 8)])) == [(str(i), 1) for i in range(4)]


@pytest.mark.parametrize("model", [nn.Linear(8, 3), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))])
def test_one_linear_is_one_block(model: nn.Module) -> None:
    assert labels(analyse(model, [activations(2, 5, 8)])) == [("", 1)]


def test_one_layer_is_one_block() -> None:
    analysis = analyse(tiny_llama(num_hidden_layers=1), [token_ids(2, 5)])
    assert labels(analysis) == [("", 1)]
    assert len(sites_by_block(analysis)["", 1]) == len(analysis.found.sites) == 8


def test_a_layer_that_is_come_back_to_is_another_block() -> None:
    def forward(m: Formula, x: Tensor) -> Any:
        for _ in range(2):
            for layer in m.layers:
                x = layer(x).relu()
        return x

    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    analysis = analyse(Formula(forward, layers=layers), [activations(2, 5, 8)])
    one, two = "layers.0.weight", "layers.1.weight"
    assert sites_by_block(analysis) == {
        ("layers.0", 1): [one],
        ("layers.1", 1): [two],
        ("layers.0", 2): [one],
        ("layers.1", 2): [two],
    }
    assert [len(site.calls) for site in analysis.found.sites] == [2, 2]


def test_one_layer_in_a_loop_is_one_block() -> None:
    """As ALBERT's is: it can only be solved when its last call is in."""

    def forward(m: Formula, x: Tensor) -> Any:
        for _ in range(3):
            x = m.layers[0](x).relu()
        return x

    model = Formula(forward, layers=nn.ModuleList([nn.Linear(8, 8)]))
    analysis = analyse(model, [activations(2, 5, 8)])
    assert labels(analysis) == [("", 1)]
    assert len(analysis.found.sites[0].calls) == 3


# ---- what is run


def test_tied_logits_are_not_run() -> None:
    analysis = architecture("qwen2")
    graph = analysis.traces[0].graph_module.graph
    tied = analysis.model.get_parameter("model.embed_tokens.weight")
    logits = [
        node
        for node in graph.nodes
        if node.target is torch.ops.aten.linear.default and node.meta["val"].shape[-1] == len(tied)
    ]
    assert len(logits) == 1
    for block in cut(analysis):
        assert not set(logits) & set(block.nodes)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_only_what_a_call_depends_on_is_run(name: str) -> None:
    """A later layer's last matmuls are visited for their inputs, not computed."""
    analysis = architecture(name)
    needed: set[fx.Node] = set()
    pending = [call.input for call in calls_of(analysis)]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for block in cut(analysis):
        computed = {node for node in block.nodes if node in block.run and node.op != "get_attr"}
        assert computed <= needed
    last = max(calls_of(analysis), key=lambda call: list(call.node.graph.nodes).index(call.node))
    assert last.node in cut(analysis)[-1].nodes
    assert last.node not in cut(analysis)[-1].run


def test_an_op_in_place_is_run_although_nobody_reads_its_result() -> None:
    def forward(m: Formula, x: Tensor) -> Any:
        y = x * 1
        y[0].mul_(2)
        z = m.a(y)
        y[1].mul_(3)
        return z

    analysis = analyse(Formula(forward, a=nn.Linear(8, 3)), [activations(2, 5, 8)])
    (block,) = cut(analysis)
    mutations = [n for n in analysis.traces[0].graph_module.graph.nodes if is_mutation(n)]
    assert [node in block.run for node in mutations] == [True, False]


@pytest.mark.parametrize("name", [*sorted(ARCHITECTURES), "two layers twice", "skips"])
def test_a_value_lives_until_its_last_reader(name: str) -> None:
    analysis = _graph(name)
    blocks = cut(analysis)
    graph = analysis.traces[0].graph_module.graph
    alive = set(graph.find_nodes(op="placeholder"))
    unread = {n for n in alive if not any(n in m.all_input_nodes for b in blocks for m in b.nodes)}
    for at, block in enumerate(blocks):
        for node in block.nodes:
            assert set(node.all_input_nodes) <= alive, (
                "read before it was computed, or after its end"
            )
            if node in block.run:
                alive.add(node)
            alive.difference_update(block.dead_after.get(node, ()))
        alive = {node for node in alive if node.op != "get_attr"}
        later = {v for b in blocks[at + 1 :] for node in b.nodes for v in node.all_input_nodes}
        past = {node for b in blocks[: at + 1] for node in b.nodes if node.op != "get_attr"}
        past.update(graph.find_nodes(op="placeholder"))
        assert alive - unread == later & past
    assert alive == unread


def _graph(name: str) -> Analysis:
    if name in ARCHITECTURES:
        return architecture(name)

    def twice(m: Formula, x: Tensor) -> Any:
        for _ in range(2):
            for layer in m.layers:
                x = x + layer(x).relu()
        return x

    def skips(m: Formula, x: Tensor) -> Any:
        first = m.layers[0](x)
        second = m.layers[1](first.relu())
        return m.layers[0](first + second) + x

    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    function = twice if name == "two layers twice" else skips
    return analyse(Formula(function, layers=layers), [activations(2, 5, 8)])


def test_without_a_call_there_is_no_block() -> None:
    assert cut_into_blocks(architecture("llama").traces[0], []) == []


# ---- several traces


def block(name: str, trace: int) -> Block:
    """A block that is told apart by its trace alone."""
    return Block(trace, (name, 1), (), frozenset(), {})  # type: ignore[arg-type]


def steps(*orders: str) -> list[list[tuple[str, int]]]:
    """What ``in_step`` makes of traces whose layers are single letters."""
    queues = [[block(name, at) for name in order] for at, order in enumerate(orders)]
    return [[(b.label[0], b.trace) for b in step] for step in in_step(queues)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("orders", "layers"),
    [
        (("abc",), "abc"),
        (("abc", "abc"), "abc"),
        (("abc", "bc"), "abc"),
        (("bc", "abc"), "abc"),
        (("ac", "abc"), "abc"),
        (("abd", "acd"), "abcd"),
        (("ab", "cd"), "abcd"),
        (("", "ab"), "ab"),
        ((), ""),
        # Contradictions: they take turns, and each keeps its own order.
        (("ab", "ba"), "aba"),
        (("abc", "cba"), "abcba"),
    ],
)
def test_traces_come_to_a_layer_in_one_step(orders: tuple[str, ...], layers: str) -> None:
    assert "".join(step[0][0] for step in steps(*orders)) == layers


repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=200)


@repeatable
@given(
    st.lists(
        st.permutations("abcde").flatmap(lambda p: st.integers(0, 5).map(lambda n: p[:n])),
        max_size=4,
    )
)
def test_every_trace_keeps_its_order_and_loses_nothing(orders: list[list[str]]) -> None:
    taken = steps(*("".join(order) for order in orders))
    for step in taken:
        assert len({name for name, _ in step}) == 1
        assert len({trace for _, trace in step}) == len(step) > 0
    for at, order in enumerate(orders):
        assert [name for step in taken for name, trace in step if trace == at] == order


@repeatable
@given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=4))
def test_orders_that_agree_lead_to_every_layer_once(layers: list[set[str]]) -> None:
    taken = steps(*("".join(sorted(chosen)) for chosen in layers))
    names = [step[0][0] for step in taken]
    assert sorted(names) == sorted(set().union(*layers))


def test_two_traces_of_one_model() -> None:
    """Text with and without the middle layer: each weight's layer is one step."""

    def forward(m: Formula, x: Tensor, middle: bool) -> Any:
        x = m.layers[0](x)
        x = m.layers[1](x) if middle else x
        return m.layers[2](x)

    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    x = activations(2, 5, 8)
    analysis = analyse(Formula(forward, layers=layers), [(x, False), (x, True)])
    blocks = [
        cut_into_blocks(trace, [call for call in calls_of(analysis) if call.trace is trace])
        for trace in analysis.traces
    ]
    taken = [
        [(b.label[0], analysis.traces.index(b.trace)) for b in step] for step in in_step(blocks)
    ]
    assert taken == [
        [("layers.0", 0), ("layers.0", 1)],
        [("layers.1", 1)],
        [("layers.2", 0), ("layers.2", 1)],
    ]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_form_is_cut(name: str) -> None:
    """Whatever a weight's matmul looks like, its input is computed before it is visited."""
    analysis = form_analysis(name)
    visited = [node for block in cut(analysis) for node in block.nodes]
    for call in calls_of(analysis):
        assert call.node in visited
        assert call.input.op == "placeholder" or visited.index(call.input) < visited.index(
            call.node
        )
