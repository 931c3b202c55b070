"""magr_quantize on Conv1D and fused experts: linears in their place, with torchao's tensors."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from expert_models import JETMOE, MODELS, fused, logits
from graph_helpers import Formula
from targets import ASYMMETRIC, intx
from tiny_models import activations, text_calib, tiny_mixtral, token_ids
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor
from toys import changed, report_of, state
from transformers.pytorch_utils import Conv1D

from magr_fx import (
    CalibrationError,
    ConfigError,
    MagRConfig,
    ModelError,
    magr_quantize,
    magr_transform,
)
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.handover.torchao_rounding import quantized_copy
from magr_fx.passes.known_layers.as_linears import as_linears
from magr_fx.passes.rewriting import solve_sites
from magr_fx.passes.rewriting.quantized_weights import quantized_weights

CALIB = [token_ids(4, 19, seed=1)]
ONE_TOKEN = [token_ids(1, 1, seed=5)]
IDS = token_ids(3, 9, seed=3)
INT8 = Int8WeightOnlyConfig(set_inductor_config=False)
INT4, INT2 = intx(4, ASYMMETRIC, None), intx(2, ASYMMETRIC, None)
INTX8 = intx(8, ASYMMETRIC, None)  # which takes no stack, as Int8WeightOnlyConfig does
INT4_GROUPS, INT2_GROUPS = intx(4, ASYMMETRIC, 16), intx(2, ASYMMETRIC, 16)
TARGETS = {
    "gpt2": INT2_GROUPS,
    "mixtral": INT4_GROUPS,
    "gpt_oss": INT4,
    "llama4": INT2,
    "dbrx": INT4_GROUPS,
}
# name → the weights that it has, a prefix of those which were fused, and how many these are.
WEIGHTS = {
    "gpt2": (5, "transformer.h.0", 4),
    "falcon": (5, "transformer.h.0", 4),
    "mixtral": (14, "model.layers.0.mlp.experts", 8),
    "qwen3_moe": (14, "model.layers.0.mlp.experts", 8),
    "gpt_oss": (14, "model.layers.0.mlp.experts", 8),
    "deepseek_v3": (17, "model.layers.0.mlp.experts", 8),
    "granitemoe": (14, "model.layers.0.block_sparse_moe.experts", 8),
    "llama4": (17, "model.layers.0.feed_forward.experts", 8),
    "dbrx": (16, "transformer.blocks.0.ffn.experts", 12),
}
by_target = pytest.mark.parametrize("name", list(TARGETS))


def tensors(model: nn.Module) -> dict[str, Any]:
    """The parameters that are torchao's tensors."""
    named = model.named_parameters()
    return {name: p for name, p in named if isinstance(p, TorchAOBaseTensor)}


def tracer(name: str) -> str:
    return "export" if name in ("gpt2", "mixtral") else "make_fx"  # which is the quicker one


def quantize(model: nn.Module, target: Any, calib: Any = CALIB, **options: Any) -> nn.Module:
    """magr_quantize, as quickly as it can be had."""
    quick = {"config": MagRConfig(alpha=1e-3), "trace": "make_fx", "propagate": False}
    return magr_quantize(model, calib, target, **{**quick, **options})


@functools.cache
def nearest(name: str) -> nn.Module:
    options: Any = {"propagate": False, "trace": tracer(name)}
    whole = MagRConfig(zero_point="whole")  # as torchao makes them
    return magr_quantize(MODELS[name](), CALIB, TARGETS[name], whole, **options)


@functools.cache
def rewritten(name: str) -> nn.Module:
    """What is quantized, with linears for what torchao passes by."""
    target = TARGETS[name]
    options: Any = {"target": target, "propagate": False, "trace": tracer(name)}
    return as_linears(magr_transform(MODELS[name](), CALIB, **options))


def torchao_alone(name: str, target: Any) -> nn.Module:
    model = as_linears(MODELS[name]())
    quantize_(model, target)
    return model


def assert_all_is_quantized(name: str, model: nn.Module) -> None:
    count, prefix, inside = WEIGHTS[name]
    report, made = report_of(model), tensors(model)
    assert fused(model) == []
    assert len(report.rewritten) == len(made) == count
    assert all(site.quantized for site in report.rewritten)
    assert not any(site.quantized for site in report.skipped)
    assert report.failed == []
    assert f"{count} quantized by torchao" in report.totals()
    parts = [key for key in made if key.startswith(prefix) and "attn.q_proj" not in key]
    assert len([key for key in parts if "router" not in key and "gate.w" not in key]) >= inside
    for module in model.modules():
        if isinstance(module, nn.Linear) and "NonDynamically" not in type(module).__name__:
            assert isinstance(module.weight, TorchAOBaseTensor)


# What is made of the weights.


@by_target
@pytest.mark.slow_unless("gpt_oss")
def test_every_weight_is_a_torchao_tensor_of_the_rewritten_one(name: str) -> None:
    model, before = nearest(name), rewritten(name)
    assert_all_is_quantized(name, model)
    for key, tensor in tensors(model).items():
        weight = before.get_parameter(key)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.detach().clone())
        quantize_(linear, TARGETS[name])
        wanted: Any = linear.weight
        assert type(tensor) is type(wanted)
        assert torch.equal(tensor.dequantize(), wanted.dequantize()), key


@by_target
@pytest.mark.slow_unless("gpt_oss")
def test_other_weights_than_torchao_alone_would_take(name: str) -> None:
    alone = tensors(torchao_alone(name, TARGETS[name]))
    ours = tensors(nearest(name))
    assert alone.keys() <= ours.keys()
    same = [key for key in alone if torch.equal(alone[key].dequantize(), ours[key].dequantize())]
    assert len(same) < len(alone) / 2


@by_target
def test_the_model_computes_with_what_the_tensors_are_worth(name: str) -> None:
    model, plain = nearest(name), as_linears(MODELS[name]())
    with torch.no_grad():
        for key, tensor in tensors(model).items():
            plain.get_parameter(key).copy_(tensor.dequantize())
    torch.testing.assert_close(logits(model, IDS), logits(plain, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "most"), [("mixtral", 0.25), ("gpt_oss", 0.3)])
def test_what_four_and_eight_bits_compute_is_near_the_original(name: str, most: float) -> None:
    wanted, got = logits(MODELS[name](), CALIB[0]), logits(nearest(name), CALIB[0])
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(errors.median()) < most  # a few tokens are routed to other experts


@pytest.mark.parametrize("name", sorted(set(WEIGHTS) - set(TARGETS)))
@pytest.mark.slow_unless("falcon")
def test_all_of_them_by_gptq_with_propagation(name: str) -> None:
    model = quantize(MODELS[name](), INT4, rounding="gptq", propagate=True)
    assert_all_is_quantized(name, model)
    assert_errors_are_those_of_the_tensors(name, model)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "llama4", "dbrx"])
@pytest.mark.slow_unless("gpt2")
def test_gptq_at_two_bits_computes_nearer_to_the_original_than_torchao_alone(name: str) -> None:
    original = MODELS[name]()
    model = quantize(
        copy.deepcopy(original),
        INT2_GROUPS,
        config=None,
        rounding="gptq",
        propagate=True,
        holdout=0,
    )
    assert_all_is_quantized(name, model)
    alone = torchao_alone(name, INT2_GROUPS)
    losses = [
        sum(float((logits(one, ids) - logits(original, ids)).square().sum()) for ids in CALIB)
        for one in (model, alone)
    ]
    assert losses[0] < 0.9 * losses[1]


def assert_errors_are_those_of_the_tensors(name: str, model: nn.Module) -> None:
    """Of the first experts alone: nothing before them but what is reported was quantized."""
    for site in report_of(model).rewritten:
        assert site.quantization is not None
        assert 0 < site.quantization.error <= site.quantization.error_alone * (1 + 1e-5)


def test_without_propagation_the_reported_error_is_that_of_the_tensor() -> None:
    original = MODELS["mixtral"]()
    model = quantize(copy.deepcopy(original), INT4, rounding="gptq", propagate=False, holdout=0)
    linears = as_linears(original)
    inputs: dict[str, list[Tensor]] = {}
    names = [
        f"model.layers.0.mlp.experts.{k}.{at}" for k in ("up_proj", "down_proj") for at in range(4)
    ]

    def see(name: str) -> Any:
        return lambda module, args: inputs.setdefault(name, []).append(args[0].double())

    for name in names:
        linears.get_submodule(name).register_forward_pre_hook(see(name))
    for ids in CALIB:
        logits(linears, ids)
    sites = {site.name: site for site in report_of(model).rewritten}
    for name in names:
        stack, _, at = name.replace("up_proj", "gate_up_proj").rpartition(".")
        site = sites[f"{stack}[{at}]"]
        x = torch.cat(inputs[name])
        if site.reason:
            continue  # filled up: few tokens
        old = linears.get_parameter(f"{name}.weight").detach().double()
        made: Any = tensors(model)[f"{name}.weight"].detach()
        error = (x @ (made.dequantize().double() - old).T).norm() / (x @ old.T).norm()
        assert site.quantization is not None
        assert site.quantization.error == pytest.approx(float(error), rel=1e-3)
        assert site.tokens == len(x)


# Experts without tokens.


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize(("name", "skipped"), [("mixtral", 4), ("dbrx", 6)])
@pytest.mark.slow_unless("mixtral-4-nearest")
def test_experts_without_a_token_are_left_to_torchao(
    name: str, skipped: int, rounding: str
) -> None:
    model = quantize(MODELS[name](), INT4, ONE_TOKEN, rounding=rounding, holdout=0)
    left = [site for site in report_of(model).skipped if site.quantized]
    assert len(left) == skipped
    assert all("no calibration" in site.reason for site in left)
    assert fused(model) == []
    assert all(site.quantized for site in report_of(model).rewritten)
    alone, made = tensors(torchao_alone(name, INT4)), tensors(model)
    same = [key for key in alone if torch.equal(alone[key].dequantize(), made[key].dequantize())]
    assert len(made) == WEIGHTS[name][0]
    assert len(same) >= skipped
    fed = len(report_of(model).rewritten)
    assert fed + skipped == len(made)


# What is left as it is.


@pytest.mark.parametrize("name", ["mixtral", "llama4", "dbrx"])
@pytest.mark.slow_unless("mixtral")
def test_experts_that_filter_fn_leaves_out_stay_fused_and_unquantized(name: str) -> None:
    model = MODELS[name]()
    before, stacks = state(model), fused(model)
    held = [model.get_parameter(key) for key in stacks]
    quantize(model, INT4, filter_fn=lambda module, name: "experts" not in name)
    assert fused(model) == stacks
    for key, parameter in zip(stacks, held, strict=True):
        assert model.get_parameter(key) is parameter
        assert torch.equal(parameter, before[key])
    left = [site for site in report_of(model).skipped if "experts" in site.name]
    assert len(left) == WEIGHTS[name][2]
    assert {(site.reason, site.quantized) for site in left} == {("left out by filter_fn", False)}
    assert (
        len(tensors(model))
        == len(report_of(model).rewritten)
        == (WEIGHTS[name][0] - WEIGHTS[name][2])
    )


def test_stacks_that_nothing_unfuses_are_reported_as_skipped() -> None:
    """JetMoE's: each expert is a slice, which is rewritten, but torchao quantizes no slices."""
    model = JETMOE()
    before, stacks = state(model), [n for n, p in model.named_parameters() if p.ndim == 3]
    assert len(stacks) == 4
    quantize(model, INT4)
    left = [site for site in report_of(model).skipped if site.name.partition("[")[0] in stacks]
    assert len(left) == 4 * 4
    assert all("is a slice of a parameter" in site.reason and not site.quantized for site in left)
    assert all(torch.equal(model.get_parameter(key), before[key]) for key in stacks)
    assert len(tensors(model)) == len(report_of(model).rewritten) == 4


def test_one_conv1d_of_gpt2_can_be_taken_alone() -> None:
    model = quantize(MODELS["gpt2"](), INT4, filter_fn=lambda m, name: "c_fc" in name)
    assert list(tensors(model)) == ["transformer.h.0.mlp.c_fc.weight"]
    assert len(fused(model)) == 3


def test_experts_that_groups_do_not_divide_stay_fused_and_unquantized() -> None:
    model = MODELS["qwen3_moe"]()  # 24 inner activations
    before, stacks = state(model), fused(model)
    quantize(model, INT4_GROUPS)
    assert fused(model) == stacks
    assert all(torch.equal(model.get_parameter(key), before[key]) for key in stacks)
    left = [site for site in report_of(model).skipped if "experts" in site.name]
    assert len(left) == 8
    assert not any(site.quantized for site in left)
    assert len(tensors(model)) == 6


def assert_unchanged(model: nn.Module, before: dict[str, Tensor], modules: list[Any]) -> None:
    assert list(model.named_modules()) == modules
    assert changed(model, before) == []
    assert tensors(model) == {}


def test_a_linear_that_groups_do_not_divide_is_refused_with_the_model_unchanged() -> None:
    model = MODELS["deepseek_v3"]()
    before, modules = state(model), list(model.named_modules())
    with pytest.raises(ConfigError, match="has 24 inputs, which groups of 16 do not divide"):
        quantize(model, INT4_GROUPS)
    assert_unchanged(model, before, modules)


def test_activations_that_are_not_finite_are_refused_with_the_model_unchanged() -> None:
    model = MODELS["mixtral"]()
    with torch.no_grad():
        model.get_submodule("model.norm").get_parameter("weight").fill_(3e38)
    before, modules = state(model), list(model.named_modules())
    with pytest.raises(CalibrationError, match=r"NaN or Inf|not finite"):
        quantize(model, INT4)
    assert_unchanged(model, before, modules)


def test_an_interrupted_gptq_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(shared: Any, *args: Any) -> Any:
        if "down_proj" in shared.sites[0].name:
            raise KeyboardInterrupt
        return quantized_weights(shared, *args)

    model = MODELS["gpt_oss"]()
    before, modules = state(model), list(model.named_modules())
    monkeypatch.setattr(solve_sites, "quantized_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, INT4, rounding="gptq")
    assert_unchanged(model, before, modules)


@pytest.mark.parametrize("propagate", [False, True])
def test_an_expert_whose_solve_fails_is_left_to_torchao(
    propagate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(shared: Any, *args: Any) -> Any:
        if shared.sites[0].name.endswith("gate_up_proj[1]"):
            raise CalibrationError("provoked")
        return quantized_weights(shared, *args)

    monkeypatch.setattr(solve_sites, "quantized_weights", failing)
    model = quantize(MODELS["gpt_oss"](), INT4, rounding="gptq", propagate=propagate)
    (failed,) = report_of(model).failed
    assert (failed.name, failed.quantized) == ("model.layers.0.mlp.experts.gate_up_proj[1]", True)
    assert "provoked" in failed.reason
    key = "model.layers.0.mlp.experts.up_proj.1.weight"
    alone, made = (tensors(m)[key] for m in (torchao_alone("gpt_oss", INT4), model))
    assert torch.equal(made.dequantize(), alone.dequantize())
    assert len(tensors(model)) == 14


class Reads(nn.Module):
    """Multiplies with the Conv1D's weight by itself, which will lie the other way round."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = Conv1D(24, 32), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x @ self.conv.weight)
        return result


def test_a_model_that_reads_the_weight_by_itself_still_runs_afterwards() -> None:
    x = activations(40, 32)
    model = quantize(Reads(), INT4, [x])
    assert model(x).shape == (40, 8)


def test_a_conv1d_that_its_parent_holds_twice_is_quantized_in_both_places() -> None:
    torch.manual_seed(0)
    conv = Conv1D(32, 32)
    model = quantize(nn.Sequential(conv, nn.ReLU(), conv), INT4, [activations(40, 32)])
    assert len(report_of(model).rewritten) == 1
    assert [type(model.get_submodule(place)) for place in ("0", "2")] == [nn.Linear, nn.Linear]


def test_two_conv1d_with_one_weight_both_get_it_quantized() -> None:
    torch.manual_seed(0)
    first, second = Conv1D(32, 32), Conv1D(32, 32)
    second.weight = first.weight
    model = quantize(nn.Sequential(first, nn.ReLU(), second), INT4, [activations(40, 32)])
    assert [(site.name, site.calls) for site in report_of(model).rewritten] == [("0.weight", 2)]
    made = tensors(model)
    assert list(made) == ["0.weight", "2.weight"]
    assert torch.equal(made["0.weight"].dequantize(), made["2.weight"].dequantize())


def test_a_conv1d_whose_weight_is_read_elsewhere_stays_one() -> None:
    torch.manual_seed(0)
    parts = {"conv": Conv1D(32, 32), "linear": nn.Linear(32, 8)}
    model = Formula(lambda m, x: (m.linear(m.conv(x)), m.conv.weight * 1), **parts)
    before = model.conv.weight.detach().clone()
    quantize(model, INT4, [activations(40, 32)])
    assert torch.equal(model.conv.weight, before)
    assert list(tensors(model)) == ["linear.weight"]


@pytest.mark.slow
def test_a_compiled_model_is_quantized_inside() -> None:
    torch.compiler.reset()
    model = MODELS["gpt2"]()
    compiled: Any = torch.compile(model, backend="eager")
    before = logits(compiled, IDS)
    quantize(compiled, INT4)
    assert fused(model) == []
    assert torch.equal(logits(compiled, IDS), logits(model, IDS))
    assert not torch.equal(logits(compiled, IDS), before)


def test_a_model_that_is_one_conv1d_cannot_be_quantized_in_place() -> None:
    conv = MODELS["gpt2"]().get_submodule("transformer.h.0.mlp.c_fc")
    with pytest.raises(ConfigError, match="would quantize none of the 1 weights"):
        quantize(conv, INT4, [torch.randn(40, 32)])
    assert tensors(conv) == {}


def test_a_second_time_is_refused_as_for_linears() -> None:
    model = MODELS["gpt2"]()
    quantize(model, INT4, filter_fn=lambda m, n: "c_fc" in n)
    with pytest.raises(ModelError, match=r"c_fc\.weight is already quantized"):
        quantize(model, INT4)


# What is kept.


def test_modes_and_the_weights_of_others_are_kept() -> None:
    model = MODELS["mixtral"]()
    model.train()
    model.get_submodule("model.layers.0.mlp.experts").eval()
    kept = ("model.norm.weight", "model.embed_tokens.weight")
    others = {name: model.get_parameter(name) for name in kept}
    quantize(model, INT4)
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(mode for name, mode in modes.items() if "experts" in name)
    assert all(mode for name, mode in modes.items() if "experts" not in name)
    assert all(model.get_parameter(name) is parameter for name, parameter in others.items())


@by_target
def test_saved_it_loads_into_a_new_model_after_as_linears(name: str) -> None:
    model, file = nearest(name), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    new = as_linears(MODELS[name]())
    assert not torch.equal(logits(new, IDS), logits(model, IDS))
    new.load_state_dict(saved, assign=True)
    assert tensors(new).keys() == tensors(model).keys()
    assert torch.equal(logits(new, IDS), logits(model, IDS))


def test_the_quantized_model_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    model = nearest("mixtral")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)


# Stacks that stay what they are.


@pytest.mark.slow
def test_int8_experts_stay_fused_where_their_tensor_runs() -> None:
    model = tiny_mixtral()
    model.set_experts_implementation("eager")
    by_hand = copy.deepcopy(model)
    target = Int8WeightOnlyConfig()
    magr_quantize(model, text_calib(), target, propagate=False)
    report = report_of(model)
    assert len(report.rewritten) == 27
    assert all(site.quantized for site in report.rewritten)
    experts = model.model.layers[0].mlp.experts
    assert {name for name, _ in experts.named_parameters()} == {"gate_up_proj", "down_proj"}
    # Each matrix is what torchao makes of the rewritten one.
    magr_transform(by_hand, text_calib(), target=target, propagate=False)
    for key in ("gate_up_proj", "down_proj"):
        stack = getattr(experts, key)
        assert is_quantized(stack)
        for matrix, rewritten in zip(
            stack.dequantize(), getattr(by_hand.model.layers[0].mlp.experts, key), strict=True
        ):
            expected = quantized_copy(rewritten, target).dequantize()
            torch.testing.assert_close(matrix, expected, rtol=0, atol=0)
    with torch.no_grad():
        assert bool(model(text_calib()[0]).logits.isfinite().all())


@pytest.mark.slow
def test_what_stayed_fused_loads_into_a_new_model_as_it_is() -> None:
    model, fresh, file = tiny_mixtral(), tiny_mixtral(), io.BytesIO()
    for one in (model, fresh):
        one.set_experts_implementation("eager")
    magr_quantize(model, text_calib(), INT8, propagate=False)
    torch.save(model.state_dict(), file)
    file.seek(0)
    ids = text_calib()[0]
    assert not torch.equal(logits(fresh, ids), logits(model, ids))
    fresh.load_state_dict(torch.load(file, weights_only=False), assign=True)
    assert is_quantized(fresh.model.layers[0].mlp.experts.gate_up_proj)
    assert torch.equal(logits(fresh, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("experts", "options"),
    [("grouped_mm", {}), ("batched_mm", {}), ("eager", {"rounding": "gptq"})],
)
@pytest.mark.slow
def test_elsewhere_they_become_linears(experts: str, options: dict[str, Any]) -> None:
    model = tiny_mixtral()
    model.set_experts_implementation(experts)
    magr_quantize(model, text_calib(), Int8WeightOnlyConfig(), **options)
    assert all(site.quantized for site in report_of(model).rewritten)
    assert isinstance(model.model.layers[0].mlp.experts.up_proj[0], nn.Linear)
