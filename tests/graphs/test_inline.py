"""Autocast regions, gradient modes and branches: flat graphs that compute what the model does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
from graph_helpers import Formula, assert_gram, call, hook_grams
from tiny_models import activations
from torch import Tensor, fx, nn
from torch._higher_order_ops import while_loop
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import UNREACHED, Found, find_linears
from magr_fx.passes.graphs.inline import AUTOCAST, autocast_of, inline_regions
from magr_fx.passes.graphs.trace import TracedBatch, calibration_mode
from magr_fx.passes.inputs.calibration import Batch, read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing, trace_batches

BF16 = torch.bfloat16
LINEAR = torch.ops.aten.linear.default
tracers = pytest.mark.parametrize("tracer", ["export", "make_fx"])


def x(*shape: int, seed: int = 0) -> Tensor:
    return activations(*shape, 8, seed=seed)


def made(function: Callable[..., Any], **parts: Any) -> Formula:
    torch.manual_seed(0)
    linears = {name: nn.Linear(8, 8) for name in ("a", "b", "c")}
    return Formula(function, **{**linears, **parts})


def traced_by(tracer: str, model: nn.Module, batches: list[Batch]) -> list[TracedBatch]:
    with calibration_mode(model):
        return trace_batches(model, batches, Tracing(tracer))


def flat(tracer: str, model: nn.Module, calib: list[Any]) -> list[TracedBatch]:
    with calibration_mode(model):
        return trace_or_read(model, read_calib(calib, model), Tracing(tracer))


def graph_modules(batch: TracedBatch) -> list[fx.GraphModule]:
    """The graph's and its sub-graphs'."""
    modules = batch.trace.graph_module.modules()
    return [module for module in modules if isinstance(module, fx.GraphModule)]


def described(module: fx.GraphModule) -> tuple[str, list[tuple[str, list[str]]]]:
    nodes = [(node.name, sorted(node.meta)) for node in module.graph.nodes]
    return module.print_readable(print_output=False), nodes


class _InItsAutocast(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        with autocast_of(n):
            return super().run_node(n)


def assert_computes_the_model(
    model: nn.Module, calib: list[Any], traced: list[TracedBatch]
) -> None:
    """Bit for bit, dtypes included."""
    for batch, item in zip(traced, calib, strict=True):
        expected = call(model, item)
        with calibration_mode(model):
            outputs = _InItsAutocast(batch.trace.graph_module).run(*batch.values)
        torch.testing.assert_close(list(outputs), expected, rtol=0, atol=0)


def plain_cond(decided: Tensor, first: Any, second: Any, operands: Any) -> Any:
    """torch.cond, but so that hooks see what runs inside."""
    return (first if decided else second)(*operands)


def assert_right_grams(model: nn.Module, calib: list[Any], traced: list[TracedBatch]) -> Found:
    found = find_linears(dict.fromkeys(batch.trace for batch in traced), model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cond", plain_cond)
        expected, tokens = hook_grams(model, calib)
    run = CalibrationRun(traced, found.sites)
    measured = set()
    with calibration_mode(model):
        for shared in chain.from_iterable(run.collect(progress=False)):
            for site in shared.sites:
                assert_gram(shared.gram, expected[site.name])
                assert shared.tokens == tokens[site.name]
                measured.add(site.name)
    assert measured == set(expected)
    return found


# ---- regions


def _autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        y = m.a(x)
    return m.b(y.float())


def _nested(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        y = m.a(x)
        with torch.autocast("cpu", enabled=False):
            y = m.b(y.float())
        return m.c(y)


def _float16_inside(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        y = m.a(x)
        with torch.autocast("cpu", torch.float16):
            y = m.b(y)
        return m.c(y), y


def _twice(m: Any, x: Tensor) -> Any:
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            x = m.a(x).float()
        x = m.b(x)
    return x


def _several_values(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        y, z = m.a(x), m.b(x).float()
    return m.c(y.float() + z), y


def _no_input_of_its_own(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        y = m.a.weight @ m.b.weight
    return m.c(x), y


def _grad(m: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        y = m.a(x)
    with torch.no_grad():
        return m.b(y)


def _grad_in_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        with torch.enable_grad():
            y = m.a(x)
        return m.b(y)


def _autocast_in_grad(m: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        y = m.a(x)
        with torch.autocast("cpu", BF16):
            return m.b(y), y


# name → (function, which linears run in bfloat16, the others in float32)
REGIONS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "autocast": (_autocast, {"a"}),
    "autocast that is switched off inside": (_nested, {"a", "c"}),
    "autocast, entered twice": (_twice, {"a"}),
    "autocast with several values": (_several_values, {"a", "b"}),
    "gradient modes": (_grad, set()),
    "a gradient mode in autocast": (_grad_in_autocast, {"a", "b"}),
    "autocast in a gradient mode": (_autocast_in_grad, {"b"}),
}
CALIB = [x(2, 5), x(3, 4, seed=1)]


@tracers
@pytest.mark.parametrize("name", sorted(REGIONS))
def test_a_region_is_flat_and_computes_the_same(name: str, tracer: str) -> None:
    function, halved = REGIONS[name]
    model = made(function)
    traced = flat(tracer, model, CALIB)
    assert_computes_the_model(model, CALIB, traced)
    found = assert_right_grams(model, CALIB, traced)
    for site in found.sites:
        for one in site.calls:
            regions = one.node.meta.get(AUTOCAST, {})
            assert regions.keys() <= {"cpu"}
            is_halved = "cpu" in regions and regions["cpu"][1:3] == (BF16, True)
            assert is_halved == (site.owner_name in halved), site.name


@tracers
def test_the_innermost_autocast_counts(tracer: str) -> None:
    model = made(_float16_inside)
    traced = flat(tracer, model, CALIB)
    assert_computes_the_model(model, CALIB, traced)
    nodes = [n for n in traced[0].trace.graph_module.graph.nodes if n.target is LINEAR]
    assert [node.meta[AUTOCAST]["cpu"][1] for node in nodes] == [BF16, torch.float16, BF16]


@tracers
@pytest.mark.slow_unless("make_fx")
def test_nothing_is_left_of_the_regions(tracer: str) -> None:
    for function, _ in REGIONS.values():
        for batch in flat(tracer, made(function), CALIB):
            module = batch.trace.graph_module
            assert graph_modules(batch) == [module]
            names = " ".join(str(node.target) for node in module.graph.nodes)
            assert not any(part in names for part in ("wrap_with", "autocast", "set_grad"))
            module.graph.lint()


@tracers
def test_other_nodes_have_no_autocast(tracer: str) -> None:
    (batch,) = flat(tracer, made(_autocast), CALIB[:1])
    linears = [node for node in batch.trace.graph_module.graph.nodes if node.target is LINEAR]
    assert [AUTOCAST in node.meta for node in linears] == [True, False]


@tracers
def test_module_paths_and_values_are_kept(tracer: str) -> None:
    (batch,) = flat(tracer, made(_nested), CALIB[:1])
    linears = [node for node in batch.trace.graph_module.graph.nodes if node.target is LINEAR]
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in linears]
    assert paths == ["a", "b", "c"]
    assert [node.meta["val"].dtype for node in linears] == [BF16, torch.float32, BF16]


@tracers
def test_weights_alone_in_a_region(tracer: str) -> None:
    model = made(_no_input_of_its_own)
    traced = flat(tracer, model, CALIB)
    assert_computes_the_model(model, CALIB, traced)
    found = find_linears(dict.fromkeys(batch.trace for batch in traced), model)
    assert [site.name for site in found.sites] == ["c.weight"]


@tracers
def test_parameters_are_the_models_own(tracer: str) -> None:
    model = made(_nested)
    (batch,) = flat(tracer, model, CALIB[:1])
    assert set(batch.trace.graph_module.parameters()) == set(model.parameters())


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@tracers
def test_autocast_of_another_device_inside(tracer: str) -> None:
    """As transformers' rotary embeddings switch off that of their device."""

    def function(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", BF16):
            with torch.autocast("cuda", enabled=False):
                y = m.a(x)
            return m.b(y)

    model = made(function)
    assert_computes_the_model(model, CALIB, flat(tracer, model, CALIB))


# ---- branches


class Branching(NamedTuple):
    function: Callable[..., Any]
    calib: list[Any]
    sites: list[str]  # those that the batches reach
    traces: int


def either(m: Any, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, m.a, lambda x: m.b(x.relu() - x), (x,))


def _after(m: Any, x: Tensor) -> Any:
    return m.c(either(m, x))


def _one_of_three(m: Any, x: Tensor) -> Any:
    def inner(x: Tensor) -> Any:
        return torch.cond(x.mean() > 0.1, m.a, lambda x: m.c(x * 2), (x,))

    return torch.cond(x.sum() > 0, inner, m.b, (x,))


def _in_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        return either(m, x) + m.c(x)


def _decided_in_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        y = m.c(x)
    return torch.cond(y.sum() > 0, m.a, m.b, (x,))


def _autocast_in_a_branch(m: Any, x: Tensor) -> Any:
    def halved(x: Tensor) -> Any:
        with torch.autocast("cpu", BF16):
            return m.a(x).float()

    return torch.cond(x.sum() > 0, halved, m.b, (x,))


def _one_after_the_other(m: Any, x: Tensor) -> Any:
    y = torch.cond(x.sum() > 0, m.a, m.b, (x,))
    return torch.cond(x.mean() > 0.1, m.c, lambda y: y * 2, (y,))


def _several(m: Any, x: Tensor) -> Any:
    y, z = torch.cond(x.sum() > 0, lambda x: (m.a(x), x * 2), lambda x: (m.b(x), x * 3), (x,))
    return m.c(y + z)


HIGH, LOW, NEGATIVE = x(2, 5).abs(), x(3, 4, seed=1).abs() * 0.01, -x(2, 6, seed=2).abs()
BRANCHES: dict[str, Branching] = {
    "cond": Branching(_after, [HIGH, NEGATIVE, HIGH * 2], ["a", "b", "c"], 2),
    "a branch that no batch takes": Branching(_after, [HIGH, LOW], ["a", "c"], 1),
    "nested cond": Branching(_one_of_three, [HIGH, NEGATIVE, LOW], ["a", "b", "c"], 3),
    "cond in autocast": Branching(_in_autocast, [HIGH, NEGATIVE], ["a", "b", "c"], 2),
    "decided in autocast": Branching(_decided_in_autocast, [HIGH, NEGATIVE], [], 0),
    "autocast in a branch": Branching(_autocast_in_a_branch, [NEGATIVE, HIGH], ["a", "b"], 2),
    "two conds": Branching(_one_after_the_other, [HIGH, NEGATIVE, LOW], ["a", "b", "c"], 3),
    "several values": Branching(_several, [HIGH, NEGATIVE], ["a", "b", "c"], 2),
}


@tracers
@pytest.mark.parametrize("name", sorted(BRANCHES))
@pytest.mark.slow_if(
    "a branch that no batch takes-make_fx", "autocast in a branch-export", "nested cond-export"
)
def test_each_batch_takes_its_branches(name: str, tracer: str) -> None:
    function, calib, sites, traces = BRANCHES[name]
    model = made(function)
    traced = flat(tracer, model, calib)
    assert_computes_the_model(model, calib, traced)
    found = assert_right_grams(model, calib, traced)
    if sites:
        assert {site.owner_name for site in found.sites} == set(sites)
    if traces and tracer == "export":  # make_fx may trace each shape anew
        assert len({batch.trace for batch in traced}) == traces
    unreached = {r.name for r in found.rejections if r.reason == UNREACHED}
    assert unreached == {f"{name}.weight" for name in "abc"} - {s.name for s in found.sites}


@tracers
def test_batches_of_the_same_branches_share_a_graph(tracer: str) -> None:
    model = made(_after)
    traced = flat(tracer, model, [HIGH, NEGATIVE[:, :5], HIGH * 3, NEGATIVE[:, :5] * 2])
    traces = [batch.trace for batch in traced]
    assert traces[0] is traces[2]
    assert traces[1] is traces[3]
    assert traces[0] is not traces[1]


@tracers
@pytest.mark.parametrize("function", [_nested, _one_of_three, _grad, _in_autocast])
def test_the_original_graph_is_not_changed(function: Callable[..., Any], tracer: str) -> None:
    model = made(function)
    traced = traced_by(tracer, model, read_calib(CALIB, model))
    modules = [module for batch in traced for module in graph_modules(batch)]
    before = [described(module) for module in modules]
    with calibration_mode(model):
        inlined = inline_regions(traced)
    for one, other in zip(traced, inlined, strict=True):
        assert other.trace.graph_module is not one.trace.graph_module
        assert (other.index, other.values) == (one.index, one.values)
        assert other.trace.input_names == one.trace.input_names
        assert other.trace.tracer == one.trace.tracer == tracer
    assert [described(module) for module in modules] == before


@tracers
def test_a_graph_without_regions_stays_the_same_object(tracer: str) -> None:
    model = made(lambda m, x: m.b(m.a(x).relu()))
    traced = traced_by(tracer, model, read_calib(CALIB, model))
    with calibration_mode(model):
        assert inline_regions(traced) == traced
        assert all(a is b for a, b in zip(inline_regions(traced), traced, strict=True))


@tracers
def test_a_flat_graph_stays_the_same_object(tracer: str) -> None:
    model = made(_one_of_three)
    traced = flat(tracer, model, [HIGH, NEGATIVE])
    with calibration_mode(model):
        assert all(a is b for a, b in zip(inline_regions(traced), traced, strict=True))


@tracers
def test_inputs_are_not_written_to(tracer: str) -> None:
    """Also not where the batch is run to see which branches it takes."""
    model = made(lambda m, x: either(m, x.mul_(2)))
    calib = [HIGH.clone(), NEGATIVE.clone()]
    flat(tracer, model, calib)
    assert torch.equal(calib[0], HIGH)
    assert torch.equal(calib[1], NEGATIVE)


@tracers
def test_buffers_are_what_they_were(tracer: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        m.count.add_(1)
        return either(m, x)

    model = made(function, count=nn.Buffer(torch.zeros(())))
    flat(tracer, model, [HIGH, NEGATIVE])
    assert int(model.count) == 0


# ---- activation checkpoints


def _checkpointed(m: Any, x: Tensor) -> Any:
    def inside(x: Tensor) -> Any:
        y = m.a(x).relu()
        return m.b(y) if m.parts == 1 else (m.b(y), y)

    # Only with a policy of what to save does torch.export, in its strict mode, keep them.
    policy = partial(create_selective_checkpoint_contexts, [LINEAR])
    result = checkpoint(inside, x, use_reentrant=False, context_fn=policy)
    y = result if m.parts == 1 else result[0] + result[1]
    return torch.cond(x.sum() > 0, m.c, m.d, (y,))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_checkpoint_in_a_graph_that_the_user_exported(parts: int) -> None:
    model, calib = made(_checkpointed, d=nn.Linear(8, 8), parts=parts).eval(), [HIGH, -HIGH]
    graph_module = torch.export.export(model, (HIGH,), strict=True).module()
    targets = [str(node.target) for node in graph_module.graph.nodes]
    assert "tag_activation_checkpoint" in targets
    traced = flat("export", graph_module, calib)
    assert [str(node.target) for node in graph_module.graph.nodes] == targets
    assert len({batch.trace for batch in traced}) == 2  # one for each branch
    assert_computes_the_model(graph_module, calib, traced)
    assert_right_grams(model, calib, traced)


# ---- loops


def _loop(m: Any, x: Tensor) -> Any:
    def body(i: Tensor, x: Tensor) -> Any:
        return i + 1, m.a(x)

    loop: Any = while_loop
    return loop(lambda i, x: i < 3, body, (torch.tensor(0), x))[1]


def test_a_loop_stays_as_it_is() -> None:
    assert_a_loop_stays("export", made(lambda m, x: m.b(_loop(m, x))))


@pytest.mark.parametrize("also_outside", [False, True])
def test_a_loop_stays_as_it_is_by_make_fx(also_outside: bool) -> None:
    assert_a_loop_stays("make_fx", made(lambda m, x: m.b(_loop(m, m.a(x) if also_outside else x))))


def assert_a_loop_stays(tracer: str, model: Any) -> None:
    traced = flat(tracer, model, CALIB)
    assert_computes_the_model(model, CALIB, traced)
    found = find_linears(dict.fromkeys(batch.trace for batch in traced), model)
    assert [site.name for site in found.sites] == ["b.weight"]
    (rejection,) = (one for one in found.rejections if one.name == "a.weight")
    assert "the sub-graph of while_loop" in rejection.reason
    assert rejection.matmul


@tracers
def test_a_loop_beside_a_region(tracer: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", BF16):
            y = F.linear(x, m.c.weight)
        return m.b(_loop(m, x)) + y

    model = made(function)
    assert_computes_the_model(model, CALIB, flat(tracer, model, CALIB))
