"""Traces of what was run: right for their batch, shared only where no value was looked at."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import Formula, assert_gram, call, hook_grams, weight
from tiny_models import activations, text_calib, tiny_llama
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx as make_fx_of_torch
from torch.nn import functional as F  # noqa: N812
from toys import WIDTH, changed, state, vectors
from transformers import LlamaConfig, LlamaForCausalLM

from magr_fx import MagRConfig, magr_transform
from magr_fx.errors import ConfigError, TraceError
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import TracedBatch, attribute, calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.make_fx import _make_fx, _with_attributes
from magr_fx.passes.tracing.trace_batches import Tracing, trace_batches

aten = torch.ops.aten


def x(*shape: int, seed: int = 0) -> Tensor:
    return activations(*shape, 8, seed=seed)


def made(function: Callable[..., Any], **parts: Any) -> Formula:
    torch.manual_seed(0)
    return Formula(function, a=nn.Linear(8, 8), b=nn.Linear(8, 8), **parts).eval()


def traced_of(model: nn.Module, calib: list[Any], tracer: str = "make_fx") -> list[TracedBatch]:
    with calibration_mode(model):
        return trace_batches(model, read_calib(calib, model), Tracing(tracer))


def assert_runs_rightly(model: nn.Module, calib: list[Any], traced: list[TracedBatch]) -> None:
    """Bit for bit."""
    for batch, item in zip(traced, calib, strict=True):
        expected = call(model, item)
        with torch.no_grad():
            outputs = batch.trace.graph_module(*batch.values)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def number(traced: list[TracedBatch]) -> int:
    return len({batch.trace for batch in traced})


POSITIVE, NEGATIVE = x(3, 4).abs(), -x(3, 4, seed=1).abs()


# ---- which batches share a trace


def by(condition: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda m, x: m.a(x) if condition(x) else m.b(x)


def place(x: Tensor) -> Any:
    """0 or 1, in a tensor."""
    return (x.sum() > 0).long()


# Ways to look at values: what is positive goes to a, what is negative to b.
CONDITIONS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item() > 0,
    "if": lambda x: x.sum() > 0,
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()) > 0,
    "int": lambda x: int(x.sum() * 100) > 0,
    "tolist": lambda x: x[0, 0].tolist()[0] > 0,
    "iteration": lambda x: any(one > 0 for one in x[0, 0]),
    "numpy": lambda x: x.numpy()[0, 0, 0] > 0,
    "np.asarray": lambda x: np.asarray(x)[0, 0, 0] > 0,
    "dlpack": lambda x: np.from_dlpack(x)[0, 0, 0] > 0,
    "format": lambda x: "-" not in f"{x[0, 0, 0]}",
    "equal": lambda x: torch.equal(x, x.abs()),
    "allclose": lambda x: torch.allclose(x, x.abs()),
    "is_nonzero": lambda x: torch.is_nonzero(x.relu()[0, 0, 0]),
    "in": lambda x: 0.0 not in x.relu(),
    "nonzero": lambda x: len(torch.nonzero(x > 0)) > 0,
    "where": lambda x: len(torch.where(x > 0)[0]) > 0,
    "a boolean mask": lambda x: len(x[x > 0]) > 0,
    "masked_select": lambda x: len(x.masked_select(x > 0)) > 0,
    "unique": lambda x: len(torch.unique(x.relu())) > 1,
    "one_hot": lambda x: F.one_hot((x > 0).long()).shape[-1] > 1,
    "bincount": lambda x: len(torch.bincount((x > 0).long().flatten())) > 1,
    "repeat_interleave": lambda x: len(x[0, 0].repeat_interleave((x[0, 0] > 0).long())) > 0,
    "range": lambda x: len(range(place(x))) > 0,
    "arange": lambda x: len(torch.arange(place(x))) > 0,
    "an index of a list": lambda x: [False, True][place(x)],
    "repr": lambda x: "-" not in repr(x[0, 0]),
}


@pytest.mark.parametrize("name", sorted(CONDITIONS))
def test_a_decision_is_each_batchs_own(name: str) -> None:
    model = made(by(CONDITIONS[name]))
    calib = [POSITIVE, NEGATIVE, POSITIVE * 2]
    traced = traced_of(model, calib)
    assert number(traced) == 3
    assert_runs_rightly(model, calib, traced)


# Values that become part of the graph without deciding anything.
CONSTANTS: dict[str, Callable[..., Any]] = {
    "a factor": lambda m, x: m.a(x) * x.sum().item(),
    "a row": lambda m, x: m.a(x[place(x)]),
    "a length": lambda m, x: m.a(x[: place(x) + 1]),
    "full": lambda m, x: m.a(x) * torch.full((8,), x[0, 0, 0]),
    "an added factor": lambda m, x: torch.add(m.a(x), x, alpha=x[0, 0, 0]),
    "from_numpy": lambda m, x: m.a(torch.from_numpy(x.numpy() * 2)),
    "a tensor of numbers": lambda m, x: m.a(x) * torch.tensor(x[0, 0].tolist()),
    "a tensor of tensors": lambda m, x: m.a(x) * torch.tensor([x[0, 0, 0]]),
    "as_tensor of tensors": lambda m, x: m.a(x) * torch.as_tensor([x[0, 0, 0], x[0, 0, 1]]).sum(),
}


@pytest.mark.parametrize(
    "name",
    sorted(CONSTANTS),
)
def test_a_value_in_the_graph_is_the_batchs_own(name: str) -> None:
    model = made(CONSTANTS[name])
    calib = [POSITIVE, NEGATIVE]
    traced = traced_of(model, calib)
    assert number(traced) == 2
    assert_runs_rightly(model, calib, traced)


BLIND: dict[str, Callable[..., Any]] = {
    "linears": lambda m, x: m.b(m.a(x).relu()),
    "a length": lambda m, x: m.a(x) if x.shape[1] > 2 and len(x) else m.b(x),
    "an index": lambda m, x: m.a(x[torch.tensor([0, 2])]),
    "chosen rows": lambda m, x: m.a(x.flatten(0, 1)[x.sum(-1).flatten().topk(2).indices]),
    "where": lambda m, x: m.a(torch.where(x > 0, x, 2 * x)),
    "a mask that is filled": lambda m, x: m.a(x.masked_fill(x > 0, 1)),
    "a mask that is assigned": lambda m, x: (x.__setitem__(x > 0, 1), m.a(x))[1],
    "a sum of zeros": lambda m, x: m.a(x) + torch.zeros(()),
    "clamped by a value": lambda m, x: m.a(x).clamp(min=x[0, 0, 0]),
    "one_hot of a known size": lambda m, x: m.a(F.one_hot((x[..., 0] > 0).long(), 8).float()),
    "sorted": lambda m, x: m.a(x.sort(-1).values),
}


@pytest.mark.parametrize("name", sorted(BLIND))
def test_batches_of_equal_shapes_share_a_trace(name: str) -> None:
    model = made(BLIND[name])
    calib = [POSITIVE, NEGATIVE, x(3, 5), POSITIVE * 2, x(3, 5, seed=1)]
    traced = traced_of(model, [item.clone() for item in calib])
    assert number(traced) == 2
    assert traced[0].trace is traced[1].trace is traced[3].trace
    assert traced[2].trace is traced[4].trace
    for batch, item in zip(traced, calib, strict=True):
        expected = call(model, item.clone())
        outputs = batch.trace.graph_module(*(value.clone() for value in batch.values))
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def test_one_batch_that_looked_is_not_shared_and_shares_no_other() -> None:
    """Whether the model looks at a value depends on the length."""
    model = made(lambda m, x: m.a(x) if x.shape[1] == 4 or x.sum() > 0 else m.b(x))
    calib = [x(3, 4), x(3, 5).abs(), x(3, 4, seed=1), -x(3, 5).abs(), x(3, 5, seed=2).abs()]
    traced = traced_of(model, calib)
    assert traced[0].trace is traced[2].trace
    assert number(traced) == 4
    assert_runs_rightly(model, calib, traced)


def test_other_dtypes_and_constants_have_a_trace_each() -> None:
    model = made(lambda m, x, n: m.a(x.float()) * n)
    calib = [(x(2, 5), 2), (x(2, 5), 3), (x(2, 5).double(), 2), (x(2, 5, seed=1), 2)]
    traced = traced_of(model, calib)
    assert number(traced) == 3
    assert traced[0].trace is traced[3].trace
    assert_runs_rightly(model, calib, traced)


def test_one_tensor_twice() -> None:
    model = made(lambda m, x, y: m.a(x) if x is y else m.b(x) + m.a(y))
    one, other = x(3, 4), x(3, 4, seed=1)
    calib = [(one, one), (one, other)]
    assert_runs_rightly(model, calib, traced_of(model, calib))


def test_self_attention_is_one_projection() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    one = x(3, 5)
    traced = traced_of(model, [(one, one, one)])
    found = find_linears([traced[0].trace], model)
    assert "in_proj_weight" in {site.name for site in found.sites}


# ---- the trace is the model's


def loop_over_experts(m: Any, x: Tensor) -> Any:
    """As an eager mixture of experts: only those that are hit run, on their own rows."""
    rows = x.flatten(0, 1)
    at = m.router(rows).argmax(-1)
    result = torch.zeros_like(rows)
    for expert in at.unique().tolist():
        (index,) = torch.where(at == expert)
        result.index_add_(0, index, m.experts[expert](rows[index]))
    return result


def experts_model() -> Formula:
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    return Formula(loop_over_experts, router=nn.Linear(8, 4), experts=experts).eval()


def until_small(m: Any, x: Tensor) -> Any:
    """A number of steps that depends on the values."""
    while x.abs().max() > 0.1:
        x = m.a(x) * 0.3
    return m.b(x)


@pytest.mark.parametrize(
    ("make", "calib"),
    [
        (experts_model, [x(2, 3), x(2, 3, seed=1), x(1, 2, seed=2)]),
        (lambda: made(until_small), [x(2, 3), x(2, 3) * 1e3, x(2, 3) * 0]),
        (lambda: tiny_llama(num_hidden_layers=1), text_calib()),
    ],
    ids=["experts", "steps", "llama"],
)
@pytest.mark.slow_if("llama")
def test_outputs_and_grams_are_the_models(make: Callable[[], nn.Module], calib: list[Any]) -> None:
    model = make()
    traced = traced_of(model, calib)
    assert all(batch.trace.tracer == "make_fx" for batch in traced)
    assert number(traced) == len(calib)
    assert_runs_rightly(model, calib, traced)
    expected, tokens = hook_grams(model, calib)
    found = find_linears([batch.trace for batch in traced], model)
    reached = {site.name for site in found.sites}
    assert reached == set(expected)
    with calibration_mode(model):
        for finished in CalibrationRun(traced, found.sites).collect(progress=False):
            for shared in finished:
                for site in shared.sites:
                    assert_gram(shared.gram, expected[site.name])
                    assert shared.tokens == tokens[site.name]


def test_parameters_and_buffers_are_the_models_own() -> None:
    model = made(
        lambda m, x: m.b(m.a(x) * m.scale) @ m.deep.w, scale=nn.Buffer(torch.ones(8)),
        deep=nn.ParameterDict({"w": weight(8, 8)}),
    )  # fmt: skip
    (batch,) = traced_of(model, [x(2, 3)])
    stored = [attribute(batch.trace, node) for node in batch.trace.graph_module.graph.nodes]
    assert {id(one) for one in stored if isinstance(one, nn.Parameter)} == {
        id(parameter) for parameter in model.parameters()
    }
    assert any(one is model.scale for one in stored)
    nodes = batch.trace.graph_module.graph.find_nodes(op="get_attr")
    assert {node.target for node in nodes} == {
        *(f"stored.{linear}.{part}" for linear in "ab" for part in ("weight", "bias")),
        "stored.scale",
        "stored.deep.w",
    }


def test_a_rewritten_weight_is_seen() -> None:
    model = made(lambda m, x: m.b(m.a(x)))
    traced = traced_of(model, [POSITIVE])
    with torch.no_grad():
        model.a.weight.mul_(2)
    assert_runs_rightly(model, [POSITIVE], traced)


def test_tied_parameters_are_one() -> None:
    model = made(lambda m, x: m.b(m.a(x)))
    model.b.weight = model.a.weight
    (batch,) = traced_of(model, [POSITIVE])
    (site,) = find_linears([batch.trace], model).sites
    assert site.parameter is model.a.weight
    assert len(site.calls) == 2


def test_module_paths() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 4), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Any:
            return x + self.down(self.up(x).relu())

    def function(m: Any, x: Tensor) -> Any:
        for layer in (*m.layers, m.layers[0]):
            x = layer(x)
        return m.a(x) * 2

    model = made(function, layers=nn.ModuleList([Layer(), Layer()]))
    (batch,) = traced_of(model, [x(2, 3)])
    paths = [
        [path for path, _ in (node.meta["nn_module_stack"] or {}).values()]
        for node in batch.trace.graph_module.graph.nodes
        if node.op == "call_function"
    ]
    layers = [
        [["", path, f"{path}.up"], ["", path], ["", path, f"{path}.down"], ["", path]]
        for path in ("layers.0", "layers.1", "layers.0")
    ]
    assert paths == [*layers[0], *layers[1], *layers[2], ["", "a"], [""]]
    kinds = [
        [kind for _, kind in node.meta["nn_module_stack"].values()]
        for node in batch.trace.graph_module.graph.nodes
        if node.target is aten.linear.default
    ]
    assert kinds[0] == [Formula, Layer, nn.Linear]


def test_input_names_and_placeholders() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, inputs: Tensor, mask: Tensor, scale: float = 1.0) -> Any:
            return self.a(inputs) * mask[..., None] * scale

    calib = [{"mask": torch.ones(2, 3), "inputs": x(2, 3), "scale": 2.0}]
    model = Keywords()
    (batch,) = traced_of(model, calib)
    assert batch.trace.input_names == ("inputs", "mask")
    placeholders = batch.trace.graph_module.graph.find_nodes(op="placeholder")
    assert [tuple(node.meta["val"].shape) for node in placeholders] == [(2, 3, 8), (2, 3)]
    assert_runs_rightly(model, calib, [batch])


def test_an_input_that_is_not_read() -> None:
    model = made(lambda m, x, y: m.a(x))
    calib = [(x(2, 3), x(2, 3)), (x(2, 3, seed=1), x(2, 3))]
    traced = traced_of(model, calib)
    assert number(traced) == 1
    assert_runs_rightly(model, calib, traced)


# ---- nothing is left behind


def fails(m: Any, x: Tensor) -> Any:
    m.count.add_(1)
    m.a(x)
    x.zero_()
    m.made = nn.Linear(8, 8)
    raise ValueError("no more")


def writes(m: Any, x: Tensor) -> Any:
    m.count.add_(1)
    m.seen = m.seen + x.sum()
    m.a.weight.mul_(2)
    m.norm.train()
    y = m.b(m.norm(m.a(x).flatten(0, 1)))
    m.norm.eval()
    x.zero_()
    return y * m.count


def writing(function: Callable[..., Any]) -> Formula:
    return made(
        function,
        count=nn.Buffer(torch.zeros(())),
        seen=nn.Buffer(torch.zeros(())),
        norm=nn.BatchNorm1d(8),
    )


def test_what_forward_writes_is_restored() -> None:
    model = writing(writes)
    before, mine = state(model), dict(model.named_buffers())
    given = [POSITIVE.clone(), NEGATIVE.clone()]
    traced = traced_of(model, given)
    assert changed(model, before) == []
    assert all(mine[name] is buffer for name, buffer in model.named_buffers())
    assert torch.equal(given[0], POSITIVE)
    assert torch.equal(given[1], NEGATIVE)
    assert number(traced) == 1


def test_the_graph_writes_as_the_model_does() -> None:
    model, other = writing(writes), writing(writes)
    (batch,) = traced_of(model, [POSITIVE])
    with torch.no_grad():
        outputs = batch.trace.graph_module(POSITIVE.clone())
        expected = other(POSITIVE.clone())
    torch.testing.assert_close(outputs, [expected], rtol=0, atol=0)
    assert torch.equal(model.count, other.count)
    assert torch.equal(model.a.weight, other.a.weight)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("function", [writes, fails])
def test_hooks_and_modules_are_what_they_were(function: Callable[..., Any]) -> None:
    model = writing(function)
    seen = io.StringIO()  # a list would be what it was
    model.a.register_forward_hook(lambda *_: print("a", file=seen))
    before, names, count = state(model), [n for n, _ in model.named_modules()], hooks(model)
    given = POSITIVE.clone()
    if function is fails:
        with pytest.raises(TraceError, match="batch 0: ValueError: no more"):
            traced_of(model, [given])
    else:
        traced_of(model, [given])
    assert seen.getvalue() == "a\n"
    assert hooks(model) == count == 1
    assert [name for name, _ in model.named_modules()] == names
    assert changed(model, before) == []
    assert torch.equal(given, POSITIVE)
    with calibration_mode(model):
        assert torch.fx.traceback.current_meta.get("nn_module_stack") is None


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_no_random_numbers_are_drawn(noise: float) -> None:
    model = made(lambda m, x: m.a(F.dropout(x, noise, training=noise > 0)))
    before = torch.get_rng_state()
    traced_of(model, [POSITIVE, NEGATIVE])
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_that_forward_makes_are_refused() -> None:
    def function(m: Any, x: Tensor) -> Any:
        m.late = nn.Linear(8, 8)
        return m.late(m.a(x))

    model = made(function)
    with pytest.raises(TraceError, match="run the model on one input first"):
        traced_of(model, [POSITIVE])
    assert not hasattr(model, "late")


# ---- which tracer


def test_auto_goes_over_to_make_fx() -> None:
    model = experts_model()
    calib = [x(2, 3), x(2, 3, seed=1)]
    traced = traced_of(model, calib, "auto")
    assert [batch.trace.tracer for batch in traced] == ["make_fx", "make_fx"]
    assert all("torch.export cannot trace Formula" in b.trace.refusal for b in traced)
    assert_runs_rightly(model, calib, traced)
    with pytest.raises(TraceError, match=r"torch\.export cannot trace Formula"):
        traced_of(model, calib, "export")


def test_auto_goes_over_for_all_batches() -> None:
    """Also for those that export could trace: grams are then of graphs of one kind."""
    model = made(lambda m, x: m.a(x) if x.shape[1] == 4 or x.sum() > 0 else m.b(x))
    calib = [x(3, 4), x(3, 5)]
    assert {batch.trace.tracer for batch in traced_of(model, calib, "auto")} == {"make_fx"}
    assert {batch.trace.tracer for batch in traced_of(model, calib[:1], "auto")} == {"export"}
    (batch,) = traced_of(model, calib[:1], "auto")
    assert batch.trace.refusal == ""


def test_a_model_that_does_not_run() -> None:
    model = made(lambda m, x: m.a(x[..., :3]))
    with pytest.raises(TraceError) as raised:
        traced_of(model, [x(2, 3)], "auto")
    message = str(raised.value)
    assert "Formula cannot be run and traced with calibration batch 0" in message
    assert "Before that, torch.export cannot trace" in message


def test_no_such_tracer() -> None:
    with pytest.raises(ConfigError, match=r"auto, export, make_fx, got 'dynamo'"):
        Tracing("dynamo")


# ---- what make_fx's private arguments do


def test_make_fx_itself() -> None:
    """Fails where torch changes what this relies on: the ops, the baked-in values, the order."""
    own = {"w": weight(4, 8), "unread": weight(2), "b": torch.ones(4)}

    def function(x: Tensor) -> list[Tensor]:
        y = F.linear(x, own["w"], own["b"])
        return [y * 2 if y.sum().item() > 0 else y * 3]

    given = x(3)
    with torch.no_grad():
        graph_module = _make_fx(function, list(own.values()), [given])
        expected = function(given)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    assert [node.meta["val"].shape for node in placeholders] == [(4, 8), (2,), (4,), (3, 8)]
    targets = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
    assert targets[0] is aten.linear.default
    assert targets[-1] is aten.mul.Tensor
    (linear,) = (n for n in graph_module.graph.nodes if n.target is aten.linear.default)
    assert linear.args == (placeholders[3], placeholders[0], placeholders[2])
    converted = _with_attributes(graph_module, own)
    assert [n.target for n in converted.graph.find_nodes(op="get_attr")][:2] == [
        "stored.w",
        "stored.b",
    ]
    assert [tuple(n.meta["val"].shape) for n in converted.graph.find_nodes(op="placeholder")] == [
        (3, 8)
    ]
    assert converted.stored.w is own["w"]  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(converted(given), expected, rtol=0, atol=0)
    assert isinstance(converted, fx.GraphModule)
    converted.graph.lint()


class PartlyCompiled(nn.Module):
    """A part is compiled, in one of several ways, and what follows depends on values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.relu: Any = torch.relu
        if how == "module":
            self.first = torch.compile(self.first)  # type: ignore[assignment]
        elif how == "in place":
            self.first.compile()
        elif how == "function":
            self.relu = torch.compile(torch.relu)
        elif how == "disabled":
            self.relu = torch.compiler.disable(torch.relu)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Any:
        hidden = self.relu(self.first(x))
        return hidden if bool(hidden.sum() < 0) else self.second(hidden)


@pytest.mark.parametrize("trace", ["auto", "make_fx"])
@pytest.mark.parametrize("how", ["module", "in place", "function", "disabled"])
@pytest.mark.slow_if("module-auto", "in place-auto", "function-auto")
def test_compiled_parts_are_run_as_they_were_written(how: str, trace: str) -> None:
    plain, model = PartlyCompiled("not"), PartlyCompiled(how)
    for one in (plain, model):
        magr_transform(one, vectors(), MagRConfig(alpha=1e-2), trace=trace)
        report: Any = one.magr_report
        assert (report.tracer, len(report.rewritten)) == ("make_fx", 2)
    for weight_, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight_, other, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="FX to symbolically trace a dynamo-optimized"):
        make_fx_of_torch(torch.compile(torch.relu))(torch.ones(2))  # as torch is set otherwise


@pytest.mark.parametrize("trace", ["auto", "make_fx"])
@pytest.mark.slow_unless("make_fx")
def test_flex_attention_is_traced(trace: str) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=50, attn_implementation="flex_attention",
    )  # fmt: skip
    torch.manual_seed(0)
    flex = LlamaForCausalLM(config).eval()
    eager = LlamaForCausalLM(config).eval()
    eager.load_state_dict(flex.state_dict())
    eager.set_attn_implementation("eager")
    calib = [torch.arange(32).view(2, 16)]
    magr_transform(flex, calib, MagRConfig(alpha=1e-2), trace=trace)
    magr_transform(eager, calib, MagRConfig(alpha=1e-2), trace="make_fx")
    pairs = zip(flex.parameters(), eager.parameters(), strict=True)
    assert all(float((a - b).detach().norm() / b.detach().norm()) < 1e-3 for a, b in pairs)
