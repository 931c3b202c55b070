"""MagRPass: exported and symbolically traced graphs, alone and among other passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import text_calib, tiny_llama
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torchao.quantization import IntxWeightOnlyConfig, PerGroup
from toys import INT, WIDTH, Overflows, Shapes, changed, mlp, state, vectors

from magr_fx import (
    CalibrationError,
    ConfigError,
    MagRConfig,
    MagRPass,
    MagRReport,
    ModelError,
    magr_quantize,
    magr_transform,
    solve_magr,
)
from magr_fx.passes.rewriting import solve_sites


def exported(model: nn.Module, *, check_guards: bool = True) -> fx.GraphModule:
    """The model's graph with a free batch dimension; its parameters are the model's own."""
    program = export(model, (vectors()[0],), dynamic_shapes=({0: Dim.DYNAMIC},))
    return program.module(check_guards=check_guards)


def shape_of(graph_module: fx.GraphModule) -> tuple[str, list[tuple[str, str, str]]]:
    """The graph, as code and as nodes."""
    nodes = [(n.op, n.name, str(n.target)) for n in graph_module.graph.nodes]
    return graph_module.code, nodes


def report_in(graph_module: fx.GraphModule) -> MagRReport:
    report = graph_module.meta["magr"]
    assert isinstance(report, MagRReport)
    return report


def apply(graph_module: fx.GraphModule, calib: Any, *args: Any, **options: Any) -> PassResult:
    result = MagRPass(calib, *args, **options)(graph_module)
    assert result is not None
    return result


def refused(
    graph_module: fx.GraphModule, calib: Any, kind: type[Exception], message: str, **options: Any
) -> None:
    before = state(graph_module)
    with pytest.raises(kind, match=message):
        apply(graph_module, calib, **options)
    assert changed(graph_module, before) == []
    assert "magr" not in graph_module.meta


@pytest.mark.parametrize("check_guards", [True, False])
@pytest.mark.parametrize("build", [mlp, Shapes])
def test_exported_graph_gets_the_weights_that_the_eager_model_gets(
    build: Any, check_guards: bool
) -> None:
    model, eager, calib = build(), build(), vectors(40, 24, 3)
    original, graph_module = state(model), exported(model, check_guards=check_guards)
    graph, parameters = shape_of(graph_module), dict(graph_module.named_parameters())
    result = PassManager([MagRPass(calib)])(graph_module)
    assert result.modified
    assert result.graph_module is graph_module
    assert shape_of(graph_module) == graph
    assert all(graph_module.get_parameter(name) is p for name, p in parameters.items())

    magr_transform(eager, calib)
    assert changed(model, state(eager)) == []  # the model that the graph was made from
    assert changed(model, original) != []
    report = report_in(graph_module)
    assert report.batches == 3
    assert {s.name for s in report.rewritten} == {s.name for s in eager.magr_report.rewritten}
    with torch.no_grad():
        assert torch.equal(graph_module(calib[2]), eager(calib[2]))


def test_magr_transform_reads_an_exported_graph_as_the_pass_does() -> None:
    model, eager = mlp(), mlp()
    graph_module = exported(model)
    graph = shape_of(graph_module)
    assert magr_transform(graph_module, vectors()) is graph_module
    assert shape_of(graph_module) == graph
    magr_transform(eager, vectors())
    assert changed(model, state(eager)) == []


def test_magr_quantize_refuses_an_exported_graph() -> None:
    graph_module = exported(mlp())
    before = state(graph_module)
    message = "none of the 2 weights .* the model does not run with it quantized"
    with pytest.raises(ConfigError, match=message):
        magr_quantize(graph_module, vectors(), IntxWeightOnlyConfig())
    assert changed(graph_module, before) == []


@pytest.mark.slow
def test_exported_llama_by_keyword() -> None:
    model, eager = tiny_llama(), tiny_llama()
    ids = text_calib()
    auto = {0: Dim.AUTO, 1: Dim.AUTO}
    program = export(
        model,
        (),
        {"input_ids": ids[0], "use_cache": False},
        dynamic_shapes={"input_ids": auto, "use_cache": None},
        strict=False,
    )
    graph_module = program.module()
    calib = [{"input_ids": batch, "use_cache": False} for batch in ids]
    assert apply(graph_module, calib).modified
    assert len(report_in(graph_module).rewritten) == 15
    magr_transform(eager, ids)
    assert changed(model, state(eager)) == []


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + 1


@pytest.mark.parametrize(
    "build",
    [
        mlp,  # call_module
        Shapes,  # call_function, call_method and getattr
        Product,  # operator.matmul and nothing else
    ],
)
def test_symbolically_traced_graph_gets_them_too(build: Any) -> None:
    model, eager = build(), build()
    graph_module = fx.symbolic_trace(model)
    graph = shape_of(graph_module)
    result = apply(graph_module, vectors())
    assert (result.graph_module, result.modified) == (graph_module, True)
    assert shape_of(graph_module) == graph
    magr_transform(eager, vectors())
    assert changed(model, state(eager)) == []


class Doubled(PassBase):
    """Replaces the model's relu by twice its input."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, aten = graph_module.graph, torch.ops.aten
        (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
        with graph.inserting_after(relu):
            twice = graph.call_function(aten.mul.Tensor, (relu.args[0], 2))
        relu.replace_all_uses_with(twice)
        graph.erase_node(relu)
        graph_module.recompile()
        return PassResult(graph_module, modified=True)


def test_runs_on_what_the_passes_before_it_made() -> None:
    model = mlp()
    PassManager([Doubled(), MagRPass(vectors())])(exported(model))
    eager = mlp()

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    unpatched = magr_transform(mlp(), vectors())
    eager[1] = Twice()
    magr_transform(eager, vectors())
    assert changed(model, state(eager)) == []
    assert changed(model, state(unpatched)) == ["2.weight"]


def test_leaves_a_graph_that_the_passes_after_it_can_work_on() -> None:
    graph_module = exported(mlp())
    result = PassManager([MagRPass(vectors()), Doubled()])(graph_module)
    assert result.modified
    assert len(report_in(result.graph_module).rewritten) == 2
    assert result.graph_module(vectors()[0]).shape == (40, 16)


def test_modified_is_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise CalibrationError("no")

    monkeypatch.setattr(solve_sites, "solve_magr", fail)
    graph_module = exported(mlp())
    assert apply(graph_module, vectors()).modified is False
    assert len(report_in(graph_module).failed) == 2


def test_options_reach_the_solver() -> None:
    target = IntxWeightOnlyConfig(granularity=PerGroup(16))
    config = MagRConfig(damping=0.2)
    model, eager = mlp(), mlp()
    graph_module = exported(model)
    apply(graph_module, vectors(), config, target=target)
    wanted = MagRConfig(alpha="auto", damping=0.2, group_size=16)
    assert report_in(graph_module).config == wanted
    magr_transform(eager, vectors(), config, target=target)
    assert changed(model, state(eager)) == []


def test_filter_goes_by_name() -> None:
    asked = []

    def only_the_last(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return name == "2"

    model = mlp()
    before = state(model)
    graph_module = exported(model)
    apply(graph_module, vectors(), filter_fn=only_the_last)
    assert asked == ["0", "2"]
    assert changed(model, before) == ["2.weight"]
    assert [s.name for s in report_in(graph_module).skipped] == ["0.weight"]


def test_an_interrupted_pass_reports_what_it_rewrote(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    calls = []

    def second_call_fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve_magr(*args, **options)

    monkeypatch.setattr(solve_sites, "solve_magr", second_call_fails)
    before, graph_module = state(model), exported(model)
    with pytest.raises(KeyboardInterrupt):
        apply(graph_module, vectors())
    assert [s.name for s in report_in(graph_module).sites] == ["0.weight"]
    assert changed(model, before) == ["0.weight"]


# Inputs


class Mixed(nn.Module):
    """Nested inputs, keywords, and constants that the graph freezes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(
        self, x: Tensor, pair: dict[str, Tensor], scale: int = 2, *, shift: Any = None, mode: str
    ) -> Tensor:
        hidden = self.first(x) * scale + pair["plus"] - 2 * pair["minus"]
        output: Tensor = self.last(hidden if shift is None or mode == "plain" else hidden + shift)
        return output


def mixed_inputs(rows: int) -> dict[str, Any]:
    x, plus, minus, shift = torch.randn(4, rows, WIDTH)
    return {
        "x": x,
        "pair": {"plus": plus, "minus": minus},
        "scale": 3,
        "shift": shift,
        "mode": "add",
    }


def exported_mixed(model: nn.Module, *, check_guards: bool) -> fx.GraphModule:
    given, auto = mixed_inputs(6), {0: Dim.AUTO}
    program = export(
        model,
        (given["x"], given["pair"], given["scale"]),
        {"shift": given["shift"], "mode": given["mode"]},
        dynamic_shapes={
            "x": auto,
            "pair": {"plus": auto, "minus": auto},
            "scale": None,
            "shift": auto,
            "mode": None,
        },
    )
    return program.module(check_guards=check_guards)


guards = pytest.mark.parametrize("check_guards", [True, False])


@guards
def test_keywords_and_mappings_in_any_order(check_guards: bool) -> None:
    model, eager = Mixed(), Mixed()
    graph_module = exported_mixed(model, check_guards=check_guards)
    given = mixed_inputs(9)
    turned = {
        "mode": given["mode"],
        "shift": given["shift"],
        "pair": {"minus": given["pair"]["minus"], "plus": given["pair"]["plus"]},
        "scale": given["scale"],
        "x": given["x"],
    }
    positional = tuple(given.values())  # keyword-only arguments cannot be given like this
    apply(graph_module, [turned, given])
    magr_transform(eager, [given, given])
    assert changed(model, state(eager)) == []
    with pytest.raises(CalibrationError, match=r"does not fit Mixed\.forward"):
        magr_transform(eager, [positional])


@guards
@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 4},
        {"scale": 3.0},
        {"mode": "plain"},
        {"shift": None},
        {"x": torch.zeros(6, WIDTH + 1)},
        {"x": torch.zeros(6, WIDTH, dtype=torch.float64)},
        {"x": torch.zeros(6, 1, WIDTH)},
        {"pair": {"plus": torch.zeros(6, WIDTH)}},
        {"pair": {"plus": torch.zeros(6, WIDTH), "other": torch.zeros(6, WIDTH)}},
        {"pair": [torch.zeros(6, WIDTH), torch.zeros(6, WIDTH)]},
        {"pair": torch.zeros(6, WIDTH)},
        {"x": [torch.zeros(6, WIDTH)]},
    ],
    ids=lambda wrong: ",".join(f"{k}={type(v).__name__}" for k, v in wrong.items()),
)
def test_a_batch_that_does_not_fit_the_graph(wrong: dict[str, Any], check_guards: bool) -> None:
    graph_module = exported_mixed(Mixed(), check_guards=check_guards)
    calib = [mixed_inputs(9), {**mixed_inputs(6), **wrong}]
    refused(graph_module, calib, CalibrationError, "batch 1 does not fit the graph, which was")


@guards
def test_another_batch_size_than_a_static_graph_has(check_guards: bool) -> None:
    graph_module = export(mlp(), (vectors(40)[0],)).module(check_guards=check_guards)
    refused(graph_module, vectors(40, 24), CalibrationError, "batch 1 does not fit the graph")
    assert apply(graph_module, vectors(40)).modified


def test_a_missing_argument() -> None:
    graph_module = exported_mixed(Mixed(), check_guards=True)
    given = mixed_inputs(6)
    del given["mode"]
    refused(graph_module, [given], CalibrationError, "batch 0 does not fit.*missing.*'mode'")


@pytest.mark.parametrize("nested", [False, True])
def test_a_graph_from_make_fx(nested: bool) -> None:
    model, eager = mlp(), mlp()
    (x,) = vectors(40)
    if nested:
        graph_module = make_fx(lambda pair: model(pair["x"] + pair["y"]))({"x": x, "y": x * 0})
        calib: list[Any] = [({"y": torch.zeros_like(x), "x": x},)]
    else:
        graph_module = make_fx(model)(x)
        calib = [x]
    before = state(graph_module)
    apply(graph_module, calib)
    magr_transform(eager, [x])
    rewritten = [graph_module.get_parameter(n) for n in changed(graph_module, before)]
    wanted = [eager.get_parameter("0.weight"), eager.get_parameter("2.weight")]
    assert len(rewritten) == 2
    assert all(torch.equal(*pair) for pair in zip(rewritten, wanted, strict=True))


# Refusals


def test_bad_options_are_refused_when_the_pass_is_made() -> None:
    with pytest.raises(ConfigError, match="config must be a MagRConfig"):
        MagRPass(vectors(), IntxWeightOnlyConfig())
    with pytest.raises(ConfigError, match="target must be a torchao config"):
        MagRPass(vectors(), target="int4")


def test_bad_models_and_calibrations_are_refused_before_anything_changes() -> None:
    refused(exported(mlp()), [], CalibrationError, "calib is empty")
    refused(fx.symbolic_trace(nn.ReLU()), vectors(), ModelError, "no weight matmul")
    refused(exported(mlp()), vectors(), ConfigError, "matches none", filter_fn=lambda m, n: False)
    groups = MagRConfig(group_size=32)
    refused(exported(mlp()), vectors(), ConfigError, "2.weight .*48 inputs", config=groups)
    spoiled = exported(mlp())
    with torch.no_grad():
        spoiled.get_parameter("2.weight")[0, 0] = torch.nan
    refused(spoiled, vectors(), ModelError, r"2\.weight holds NaN")
    loud = vectors(40, 24)
    loud[1][3] *= 1e6
    message = r"input of last\.weight holds NaN or Inf in calibration batch 1"
    refused(exported(Overflows("last")), loud, CalibrationError, message)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return torch.cond(x.sum() > 0, self.one, self.other, (x,))


def without(graph_module: fx.GraphModule, name: str, *, none: bool = False) -> fx.GraphModule:
    """The graph after what it reads by this name is deleted, or set to None."""
    path, _, key = name.rpartition(".")
    owner = graph_module.get_submodule(path)
    if none:
        setattr(owner, key, None)
    else:
        delattr(owner, key)
    return graph_module


LOST = {
    "weight": lambda: without(exported(mlp()), "2.weight"),
    "bias": lambda: without(exported(mlp()), "0.bias"),
    "set to None": lambda: without(exported(mlp()), "2.weight", none=True),
    "module": lambda: without(exported(mlp()), "2"),
    "branch": lambda: without(exported(Branching().requires_grad_(False)), "true_graph_0"),
    "call_module": lambda: without(fx.symbolic_trace(mlp()), "2"),
    "get_attr": lambda: without(fx.symbolic_trace(Shapes()), "strided"),
}


QUICK = MagRConfig(alpha=1e-2)
VERBS: dict[str, Callable[[fx.GraphModule], Any]] = {
    "pass": lambda graph_module: apply(graph_module, vectors(), QUICK),
    "transform": lambda graph_module: magr_transform(graph_module, vectors(), QUICK),
    "quantize": lambda graph_module: magr_quantize(
        graph_module, vectors(), IntxWeightOnlyConfig(weight_dtype=INT[4])
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("what", LOST)
def test_what_a_graph_reads_and_is_gone_is_named(what: str, verb: str) -> None:
    graph_module = LOST[what]()
    before = state(graph_module)
    name = {
        "bias": "0.bias",
        "module": r"2\.weight",
        "branch": "true_graph_0",
        "get_attr": "strided",
    }
    expected = rf"reads {name.get(what, '2')}.*deleted or renamed .* make the graph again"
    with pytest.raises(ModelError, match=expected):
        VERBS[verb](graph_module)
    assert changed(graph_module, before) == []


def test_no_warning_from_a_second_run() -> None:
    graph_module = exported(mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = apply(graph_module, vectors())
        second = apply(graph_module, vectors())
    assert first.modified
    assert second.modified
