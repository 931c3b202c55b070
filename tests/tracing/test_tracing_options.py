"""trace= and calibrate_all_experts=: how the model is run to get at its statistics."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import MODELS, expert_modules, fused, logits
from targets import ASYMMETRIC, intx
from tiny_models import text_calib, tiny_llama, token_ids
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor
from toys import WIDTH, changed, mlp, report_of, state, vectors
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from magr_fx import (
    ConfigError,
    MagRConfig,
    MagRPass,
    TraceError,
    magr_quantize,
    magr_transform,
    solve_magr,
)
from magr_fx.passes.known_layers.all_experts import all_experts
from magr_fx.passes.known_layers.as_linears import as_linears
from magr_fx.passes.tracing import trace_batches

INT4 = intx(4, ASYMMETRIC, None)
PGD = MagRConfig.published()  # whose iterates depend smoothly on rounding
QUICK = MagRConfig(alpha=1e-3)
IDS = [token_ids(5, 10, seed=1)]
TOKENS = 50
IN_TABLE = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe")
in_table = pytest.mark.parametrize("name", IN_TABLE)


class Branches(nn.Module):
    """One of two linears, by the sign of the inputs' sum, and a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positive, self.negative = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.positive(x) if x.sum() > 0 else self.negative(x)
        result: Tensor = self.last(hidden.relu())
        return result


def both_signs() -> list[Tensor]:
    first, second, third = vectors(40, 24, 40)
    return [first.abs(), -second.abs(), third.abs() * 2]


# trace=


@pytest.mark.parametrize("trace", ["dynamo", "", "Export", None, 3])
def test_another_tracer_is_refused(trace: Any) -> None:
    for run in (
        lambda: magr_transform(mlp(), vectors(), trace=trace),
        lambda: magr_quantize(mlp(), vectors(), INT4, trace=trace),
        lambda: MagRPass(vectors(), trace=trace),
    ):
        with pytest.raises(ConfigError, match="trace must be one of auto, export, make_fx, got"):
            run()


def test_magr_quantize_refuses_another_tracer_before_it_reads_the_calibration() -> None:
    with pytest.raises(ConfigError, match="trace must be one of"):
        magr_quantize(mlp(), iter(()), INT4, trace="dynamo")


def test_magr_transform_refuses_another_tracer_before_it_reads_the_calibration() -> None:
    with pytest.raises(ConfigError, match="trace must be one of"):
        magr_transform(mlp(), iter(()), trace="dynamo")


def test_both_tracers_give_the_same_weights() -> None:
    calib, original = text_calib()[:2], tiny_llama(num_hidden_layers=1)
    models = {
        trace: magr_transform(copy.deepcopy(original), calib, PGD, trace=trace)
        for trace in ("export", "make_fx")
    }
    for name, parameter in models["make_fx"].named_parameters():
        wanted = models["export"].get_parameter(name)
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-6)
        if parameter.dim() > 1 and "embed" not in name:
            assert (wanted - original.get_parameter(name)).abs().max() > 1e-3
    for (trace, model), graphs in zip(models.items(), (1, 2), strict=True):
        report = report_of(model)
        assert (report.tracer, report.refusal, report.traces) == (trace, "", graphs)
        assert f"2 calibration batches, {graphs} traced graphs (by {trace})" in report.totals()
        assert "because" not in report.totals()
    sites = [[(s.name, s.tokens) for s in report_of(m).rewritten] for m in models.values()]
    assert sites[0] == sites[1]


def test_auto_is_export_where_that_takes_the_model() -> None:
    models = [magr_transform(mlp(), vectors(), trace=trace) for trace in ("auto", "export")]
    assert changed(models[0], state(models[1])) == []
    assert [report_of(model).tracer for model in models] == ["export", "export"]


def test_quantized_codes_are_the_same_by_both_tracers() -> None:
    options: dict[str, Any] = {"config": QUICK, "rounding": "gptq", "propagate": False}
    one = magr_quantize(mlp(), vectors(), INT4, trace="export", **options)
    two = magr_quantize(mlp(), vectors(), INT4, trace="make_fx", **options)
    for name in ("0.weight", "2.weight"):
        tensors: list[Any] = [model.get_parameter(name) for model in (one, two)]
        assert torch.equal(tensors[0].dequantize(), tensors[1].dequantize())
    assert (report_of(one).tracer, report_of(two).tracer) == ("export", "make_fx")


def test_batches_of_one_shape_share_a_graph_that_looked_at_no_value() -> None:
    report = report_of(magr_transform(mlp(), vectors(40, 24, 40), trace="make_fx"))
    assert (report.batches, report.traces) == (3, 2)
    report = report_of(magr_transform(Branches(), both_signs(), trace="make_fx"))
    assert (report.batches, report.traces) == (3, 3)


def test_control_flow_that_depends_on_values_is_followed() -> None:
    original = Branches()
    model = magr_transform(copy.deepcopy(original), both_signs(), PGD)
    report = report_of(model)
    assert report.tracer == "make_fx"
    assert report.refusal.startswith("torch.export cannot trace Branches with calibration batch 0")
    assert "data-dependent" in report.refusal
    assert "\n" not in report.refusal
    assert "3 traced graphs (by make_fx)" in report.totals()
    assert f"\nbecause {report.refusal}\n" in report.totals()
    tokens = {site.name: site.tokens for site in report.rewritten}
    assert tokens == {"positive.weight": 80, "negative.weight": 24, "last.weight": 104}
    first, second, third = both_signs()
    for name, x in (("positive", torch.cat([first, third])), ("negative", second)):
        wanted = solve_magr(
            original.get_parameter(f"{name}.weight").detach(), x.T @ x, solver="pgd"
        ).weight
        got = model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-5)


def test_asked_for_make_fx_there_is_no_refusal() -> None:
    report = report_of(magr_transform(Branches(), both_signs(), trace="make_fx"))
    assert (report.tracer, report.refusal) == ("make_fx", "")


def test_asked_for_export_control_flow_on_values_is_an_error() -> None:
    runs: list[Callable[[nn.Module], Any]] = [
        lambda model: magr_transform(model, both_signs(), trace="export"),
        lambda model: magr_quantize(model, both_signs(), INT4, trace="export"),
    ]
    for run in runs:
        model = Branches().train()
        before = state(model)
        with pytest.raises(TraceError, match='depends on tensor values needs trace="make_fx"'):
            run(model)
        assert changed(model, before) == []
        assert all(module.training for module in model.modules())
        assert not hasattr(model, "magr_report")


def test_a_model_that_does_not_run_says_so_for_both_tracers() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    for trace in ("export", "make_fx"):
        with pytest.raises(TraceError, match=r"Broken.* batch 0: ValueError: not today"):
            magr_transform(Broken(), vectors(), trace=trace)
    with pytest.raises(TraceError, match=r"not today.*Before that, torch\.export cannot trace"):
        magr_transform(Broken(), vectors())


_QUIET = """
import sys, torch
from test_tracing_options import Branches, both_signs, magr_transform
model, calib = Branches(), both_signs()
print("from here on", file=sys.stderr, flush=True)
magr_transform(model, calib)
assert model.magr_report.refusal
"""


@pytest.mark.slow
def test_nothing_is_printed_while_auto_falls_back() -> None:
    # In a process of its own: torch logs to what was stderr when it was imported.
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    run = subprocess.run(
        [sys.executable, "-c", _QUIET],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == ""
    assert run.stderr.partition("from here on\n")[2] == ""


@pytest.mark.slow
def test_nothing_is_printed_while_export_fails(capfd: pytest.CaptureFixture[str]) -> None:
    model = MODELS["dbrx"]()
    capfd.readouterr()  # what building it printed
    magr_transform(model, IDS, QUICK, progress=False)
    assert report_of(model).refusal
    with pytest.raises(TraceError):
        magr_transform(model, IDS, QUICK, trace="export", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_is_given_has_no_experts_to_send_tokens_to() -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    graph_module: Any = torch.export.export(mlp(), (vectors()[0],), dynamic_shapes=shapes).module()
    with pytest.raises(ConfigError, match="not possible for an exported graph"):
        MagRPass(vectors(), calibrate_all_experts=True)(graph_module)


def test_a_graph_that_is_given_has_no_tracer() -> None:
    x = vectors()[0]
    shapes = ({0: torch.export.Dim("batch")},)
    graph_module: Any = torch.export.export(mlp(), (x,), dynamic_shapes=shapes).module()
    MagRPass(vectors(), trace="make_fx")(graph_module)
    report = graph_module.meta["magr"]
    assert (report.tracer, report.refusal) == ("", "")
    assert "traced graphs\n" in report.totals() + "\n" or "traced graphs;" in report.totals()


# calibrate_all_experts=


def implementations() -> dict[str, Any]:
    return {name: ALL_EXPERTS_FUNCTIONS[name] for name in ALL_EXPERTS_FUNCTIONS}


def configs(model: nn.Module) -> list[str]:
    """What every config of the model is, in full."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [repr(vars(config)) for config in found.values()]


@in_table
@pytest.mark.slow_unless("gpt_oss")
def test_every_expert_sees_every_token(name: str) -> None:
    model, plain = MODELS[name](), MODELS[name]()
    table, before = implementations(), configs(model)
    magr_transform(model, IDS, PGD, trace="make_fx", calibrate_all_experts=True)
    assert implementations() == table
    assert configs(model) == before
    magr_transform(plain, IDS, PGD, trace="make_fx")
    for key in ("gate_up_proj", "down_proj"):
        named = f".{key}["
        tokens = [s.tokens for s in report_of(model).rewritten if named in s.name]
        routed = [s.tokens for s in report_of(plain).rewritten if named in s.name]
        assert tokens == [TOKENS] * 4
        assert sum(routed) == 2 * TOKENS
    # What comes after them is calibrated on the same activations.
    torch.testing.assert_close(
        model.get_parameter("lm_head.weight"),
        plain.get_parameter("lm_head.weight"),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(("name", "trace"), [("mixtral", "export"), ("gpt_oss", "make_fx")])
@pytest.mark.slow_unless("gpt_oss-make_fx")
def test_their_statistics_are_those_of_all_tokens(name: str, trace: str) -> None:
    original = MODELS[name]()
    model = copy.deepcopy(original)
    magr_transform(model, IDS, PGD, trace=trace, calibrate_all_experts=True)
    inputs: list[Tensor] = []
    (old,), (new,) = expert_modules(original), expert_modules(model)
    old.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    for ids in IDS:
        logits(original, ids)
    x = torch.cat(inputs)
    assert len(x) == TOKENS
    stacks: list[Any] = [m.get_parameter("gate_up_proj").detach() for m in (old, new)]
    if name == "gpt_oss":
        stacks = [stack.mT for stack in stacks]
    for before, after in zip(*stacks, strict=True):
        wanted = solve_magr(before, x.T @ x, solver="pgd").weight
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-4)
        assert (before - after).abs().max() > 1e-2


@in_table
def test_the_outputs_stay_while_every_expert_sees_every_token(name: str) -> None:
    model = MODELS[name]()
    wanted = logits(model, IDS[0])
    seen = []
    with all_experts(model):
        got = logits(model, IDS[0])
        seen = [m.config._experts_implementation for m in expert_modules(model)]  # type: ignore[union-attr]
    assert seen == ["magr_fx_all_experts"]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_an_implementation_that_was_chosen_is_put_back() -> None:
    model: Any = MODELS["mixtral"]()
    model.set_experts_implementation("eager")
    magr_transform(model, IDS, QUICK, trace="make_fx", calibrate_all_experts=True)
    assert model.config._experts_implementation == "eager"
    assert [s.tokens for s in report_of(model).rewritten if "experts" in s.name] == [TOKENS] * 8


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_after_an_error_transformers_is_as_before(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["mixtral"]()
    table, before, weights = implementations(), configs(model), state(model)
    seen = []

    def failing(*args: Any) -> Any:
        seen.append(sorted(set(implementations()) - set(table)))
        raise error

    monkeypatch.setattr(trace_batches, "run_and_trace", failing)
    with pytest.raises(type(error)):
        magr_transform(model, IDS, trace="make_fx", calibrate_all_experts=True)
    assert seen == [["magr_fx_all_experts"]]
    assert implementations() == table
    assert configs(model) == before
    assert changed(model, weights) == []


def test_after_a_refusal_of_export_transformers_is_as_before() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS["mixtral"]()

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.model(ids if ids.sum() > 0 else ids + 1, use_cache=False).logits
            return result

    model = Wrapped()
    table, before = implementations(), configs(model)
    with pytest.raises(TraceError, match="data-dependent"):
        magr_transform(model, IDS, trace="export", calibrate_all_experts=True)
    assert implementations() == table
    assert configs(model) == before
    magr_transform(model, IDS, QUICK, calibrate_all_experts=True)
    assert implementations() == table
    assert configs(model) == before
    assert report_of(model).tracer == "make_fx"
    experts = [site for site in report_of(model).rewritten if "experts" in site.name]
    assert [site.tokens for site in experts] == [TOKENS] * 8


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_model_without_such_experts_is_refused_unchanged(name: str) -> None:
    make: Callable[[], nn.Module] = MODELS.get(name, tiny_llama)
    model = make()
    before, table = state(model), implementations()
    with pytest.raises(ConfigError, match="has no experts whose forward can be replaced"):
        magr_transform(model, IDS, calibrate_all_experts=True)
    assert changed(model, before) == []
    assert implementations() == table


def test_one_token_calibrates_every_expert_and_all_are_quantized() -> None:
    model = MODELS["mixtral"]()
    magr_quantize(
        model,
        [token_ids(1, 1, seed=5)],
        INT4,
        QUICK,
        propagate=False,
        holdout=0.0,
        trace="make_fx",
        calibrate_all_experts=True,
        strict=True,
    )
    report = report_of(model)
    assert [site.name for site in report.skipped] == ["model.embed_tokens.weight"]
    experts = [site for site in report.rewritten if "experts" in site.name]
    assert [(site.tokens, site.quantized) for site in experts] == [(1, True)] * 8
    assert fused(model) == []
    made = [p for p in model.parameters() if isinstance(p, TorchAOBaseTensor)]
    assert len(made) == 14


def expert_tokens(model: nn.Module, **options: Any) -> list[int]:
    magr_transform(model, IDS, QUICK, **options)
    sites = [site for site in report_of(model).sites if ".experts." in site.name]
    return sorted(site.tokens for site in sites if len(site.shape) == 2)


@pytest.mark.parametrize(
    "trace",
    [
        "auto",
        "make_fx",
    ],
)
@pytest.mark.slow_unless("make_fx")
def test_experts_as_linears_see_the_tokens_that_are_routed_to_them(trace: str) -> None:
    tokens = expert_tokens(MODELS["mixtral"](), trace=trace)
    assert sum(tokens) == 4 * TOKENS  # two of four experts, each with two weights
    assert expert_tokens(as_linears(MODELS["mixtral"]()), trace=trace) == tokens


def test_experts_as_linears_are_not_silently_left_with_their_own_tokens() -> None:
    with pytest.raises(ConfigError, match="no experts whose forward"):
        expert_tokens(as_linears(MODELS["mixtral"]()), trace="make_fx", calibrate_all_experts=True)
