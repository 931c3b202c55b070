"""Which sizes a graph leaves open: the number of sequences, and what differs between batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, Formula, analyse, assert_gram, collect, gram_of, trace, weight
from matmul_forms import FORMS, IN, OUT, Expected
from tiny_models import activations, tiny_llama, token_ids
from torch import Tensor, nn

from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.handover.to_pt2e import export_for_pt2e
from magr_fx.passes.inputs.calibration import read_calib


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6)


def x(*shape: int) -> Tensor:
    return activations(*shape, 8, seed=sum(shape))


def open_sizes(graph_module: Any) -> list[set[int]]:
    """The dimensions of each input whose sizes are symbols."""
    shapes = [node.meta["val"].shape for node in graph_module.graph.find_nodes(op="placeholder")]
    return [{d for d, n in enumerate(shape) if isinstance(n, torch.SymInt)} for shape in shapes]


def one(m: Any, *inputs: Tensor) -> Any:
    return [m.a(value) for value in inputs]


# calibration → the open dimensions of each trace's inputs
BATCHES: dict[str, tuple[list[Any], list[list[set[int]]]]] = {
    "one batch": ([x(4, 5)], [[{0}]]),
    "all alike": ([x(4, 5), x(4, 5)], [[{0}]]),
    "a last batch of fewer": ([x(4, 5), x(4, 5), x(3, 5)], [[{0}]]),
    "lengths": ([x(4, 5), x(4, 6)], [[{0, 1}]]),
    "lengths, late": ([x(4, 5), x(4, 5), x(4, 5), x(2, 7)], [[{0, 1}]]),
    "as many as long": ([x(5, 5)], [[{0}]]),
    "more dimensions": ([x(4, 3, 5), x(4, 3, 6)], [[{0, 2}]]),
    "one sequence": ([x(1, 5)], [[set()]]),
    "one sequence, then more": ([x(1, 5), x(4, 5)], [[set()], [{0}]]),
    "one input of two": ([(x(4, 5), x(4, 7)), (x(4, 5), x(4, 6))], [[{0}, {0, 1}]]),
    "forms apart": ([x(4, 5), (x(4, 6), x(4, 6)), (x(4, 6), x(4, 3))], [[{0}], [{0}, {0, 1}]]),
    "ranks apart": ([x(4, 5), x(4), x(6)], [[{0}], [{0}]]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("convolves", [False, True])
def test_open_is_what_differs(name: str, convolves: bool) -> None:
    calib, expected = BATCHES[name]
    parts = {"convolution": nn.Conv1d(2, 2, 1)} if convolves else {}
    model = Formula(one, a=linear(), **parts)
    _, traced = trace(model, calib)
    graphs = dict.fromkeys(batch.trace.graph_module for batch in traced)
    assert [open_sizes(graph_module) for graph_module in graphs] == expected
    for batch, item in zip(traced, calib, strict=True):
        outputs = batch.trace.graph_module(*batch.values)
        inputs = item if isinstance(item, tuple) else (item,)
        torch.testing.assert_close(list(outputs), model(*inputs))


def test_of_batches_from_a_generator_all_are_known() -> None:
    def batches() -> Iterator[Tensor]:
        yield from (x(4, 5), x(4, 5), x(3, 6))

    model = Formula(one, a=linear())
    _, traced = trace(model, batches())  # type: ignore[arg-type]
    assert len({batch.trace for batch in traced}) == 1
    assert open_sizes(traced[0].trace.graph_module) == [{0, 1}]


# lengths and how many tokens are padding, of each batch; None: no mask → the open dimensions
TEXTS: dict[str, tuple[list[tuple[int, int | None]], list[set[int]]]] = {
    "no mask": ([(7, None)], [{0}]),
    "lengths": ([(7, None), (9, None)], [{0, 1}]),
    "a mask of ones": ([(7, 0), (7, 0)], [{0}, {0}]),
    "padding": ([(7, 2)], [{0, 1}, {0, 1}]),
    "padding later": ([(7, 0), (7, 2)], [{0, 1}, {0, 1}]),
    "lengths and a mask of ones": ([(7, 0), (9, 0)], [{0, 1}, {0, 1}]),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.slow_unless("a mask of ones")
def test_tokens_are_open_where_a_mask_leaves_some_out(name: str) -> None:
    """By its symbol a graph tells the number of tokens from any other size that is the same."""
    batches, expected = TEXTS[name]
    calib = []
    for length, padding in batches:
        batch = {"input_ids": token_ids(3, length, seed=length)}
        if padding is not None:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, length - padding :] = 0
        calib.append(batch)
    _, traced = trace(tiny_llama(), calib)
    assert len({batch.trace for batch in traced}) == 1
    assert open_sizes(traced[0].trace.graph_module) == expected


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.slow_if("a layer beside one used twice")
def test_the_finder_needs_no_open_lengths(name: str) -> None:
    """Of every form of a matmul the same weights and activations, with one batch as with two."""
    form = FORMS[name]
    analysis = analyse(form.model(), form.inputs[:1])
    assert_sites(analysis, form.sites, form.inputs[0])


def assert_sites(analysis: Analysis, sites: dict[str, Expected], *inputs: Tensor) -> None:
    assert {site.name for site in analysis.found.sites} == set(sites)
    for site in analysis.found.sites:
        expected = sites[site.name].weight(analysis.model).detach()
        torch.testing.assert_close(site.weight, expected, rtol=0, atol=0)
    for name, shared in collect(analysis).items():
        rows = [sites[name].rows(value).detach() for value in inputs]
        assert_gram(shared.gram, gram_of(*rows))


# One matrix that is expanded over sizes of the input, in every way to write that.
EXPANDED: dict[str, tuple[tuple[int, ...], Any]] = {
    "to four": ((IN, OUT), lambda m, x: x @ m.w.expand(*x.shape[:2], IN, OUT)),
    "to three": ((1, IN, OUT), lambda m, x: x.flatten(0, 1).bmm(flat(m, x))),
    "flattened": (
        (1, 1, IN, OUT),
        lambda m, x: x.flatten(0, 1).bmm(m.w.expand(*x.shape[:2], IN, OUT).flatten(0, 1)),
    ),
    "reshaped": (
        (IN, OUT),
        lambda m, x: x.flatten(0, 1).bmm(m.w.expand(*x.shape[:2], IN, OUT).reshape(-1, IN, OUT)),
    ),
    "reshaped to the size": (
        (IN, OUT),
        lambda m, x: x.flatten(0, 1).bmm(
            m.w[None, None].expand(*x.shape[:2], -1, -1).reshape(x.shape[0] * x.shape[1], IN, OUT)
        ),
    ),
    "the stack first": (
        (IN, OUT),
        lambda m, x: x.transpose(0, 1).flatten(0, 1).bmm(
            m.w.expand(x.shape[1], x.shape[0], IN, OUT).reshape(-1, IN, OUT)
        ),
    ),
    "a number of its own": (
        (1, IN, OUT),
        lambda m, x: x.repeat(1, 2, 1, 1).flatten(0, 1).bmm(
            m.w.expand(x.shape[0], 2 * x.shape[1], IN, OUT).reshape(-1, IN, OUT)
        ),
    ),
}  # fmt: skip


def flat(m: Any, x: Tensor) -> Tensor:
    expanded: Tensor = m.w.expand(x.shape[0] * x.shape[1], IN, OUT)
    return expanded


OTHERS = {"one batch": [], "sequences": [(4, 3, 5)], "stacks": [(2, 6, 5)], "both": [(4, 2, 7)]}


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("name", EXPANDED)
def test_what_a_weight_is_expanded_over_is_no_stack(name: str, others: str) -> None:
    shape, function = EXPANDED[name]
    inputs = [activations(*sizes, IN, seed=1) for sizes in [(2, 3, 5), *OTHERS[others]]]
    analysis = analyse(Formula(function, w=weight(*shape)), inputs)
    whole = Expected(lambda m: m.w.view(IN, OUT).T, lambda x: x)
    again = Expected(whole.weight, lambda x: torch.cat([x, x]))
    assert_sites(analysis, {"w": again if name == "a number of its own" else whole}, *inputs)


# A stack that the rows of the batch take turns with: no index tells which of them meets which.
TURNS: dict[str, tuple[tuple[int, ...], Any]] = {
    "expanded before": (
        (1, 3, IN, OUT),
        lambda m, x: x.flatten(0, 1).bmm(m.w.expand(len(x), -1, -1, -1).reshape(-1, IN, OUT)),
    ),
    "expanded after": (
        (3, 1, IN, OUT),
        lambda m, x: x.transpose(0, 1).flatten(0, 1).bmm(
            m.w.expand(-1, len(x), -1, -1).reshape(-1, IN, OUT)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("others", ["one batch", "sequences"])
@pytest.mark.parametrize("name", TURNS)
def test_a_stack_that_the_batch_takes_turns_with_is_left_alone(name: str, others: str) -> None:
    shape, function = TURNS[name]
    model = Formula(lambda m, x: function(m, x).sum() + m.a(x), w=weight(*shape), a=linear())
    inputs = [activations(*sizes, IN, seed=1) for sizes in [(2, 3, 5), *OTHERS[others]]]
    analysis = analyse(model, inputs)
    assert [site.name for site in analysis.found.sites] == ["a.weight"]
    (rejection,) = [one for one in analysis.found.rejections if one.name == "w"]
    assert "no view of the stored parameter" in rejection.reason


PICTURE = (4, 3, 16, 16)
GRAPHS: list[tuple[list[tuple[int, ...]], set[int]]] = [
    ([PICTURE], {0}),
    ([PICTURE, (2, 3, 16, 16)], {0}),
    ([PICTURE, (4, 3, 16, 24)], {0, 3}),
    ([PICTURE, (4, 3, 24, 16), (4, 3, 16, 24)], {0, 2, 3}),
    ([(1, 3, 16, 16), (4, 3, 16, 16)], {0}),
    ([(4, 16, 16)], {0, 1, 2}),  # of a sequence all, since others will be as long as they are
]


@pytest.mark.parametrize(("shapes", "expected"), GRAPHS)
def test_open_sizes_of_a_graph_for_pt2e(shapes: list[tuple[int, ...]], expected: set[int]) -> None:
    model = Formula(lambda m, x: m.scale(x.relu()), scale=nn.Identity()).eval()
    batches = read_calib([activations(*shape, seed=1) for shape in shapes], model)
    with calibration_mode(model):
        graph_module, check, _ = export_for_pt2e(model, batches)
    assert open_sizes(graph_module) == [expected]
    assert all(check.fits((*batch.args,)) for batch in batches)
    other = [n + 1 if dim in expected else n for dim, n in enumerate(shapes[-1])]
    assert check.fits((torch.randn(other),))
