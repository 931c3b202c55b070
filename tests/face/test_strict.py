"""strict=True: every weight that meets an input is rewritten, or nothing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_models import JETMOE, MODELS
from graph_helpers import Formula, weight
from targets import ASYMMETRIC, intx
from tiny_models import activations, tiny_llama, tiny_qwen2, token_ids
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torchao.utils import TorchAOBaseTensor
from toys import WIDTH, Shapes, changed, mlp, report_of, state, vectors

from magr_fx import (
    CalibrationError,
    MagRConfig,
    MagRPass,
    magr_quantize,
    magr_transform,
)
from magr_fx.errors import CoverageError
from magr_fx.passes.rewriting import solve_sites
from magr_fx.passes.rewriting.quantized_weights import quantized_weights
from magr_fx.solver.solver import solve_magr

INT4 = intx(4, ASYMMETRIC, None)
QUICK = MagRConfig(alpha=1e-3)
ONE_TOKEN = [token_ids(1, 1, seed=5)]


class Odd(nn.Module):
    """An ordinary linear, and ``odd``, which holds what cannot be rewritten."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.odd = nn.Linear(WIDTH, WIDTH), odd

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.odd(functional.relu(self.plain(x)))
        return result


def weight_normed() -> nn.Module:
    return Odd(parametrizations.weight_norm(nn.Linear(WIDTH, 8)))


def lora_sum() -> nn.Module:
    parts = {"base": weight(8, WIDTH), "b": weight(8, 2, seed=1), "a": weight(2, WIDTH, seed=2)}
    return Odd(Formula(lambda m, x: functional.linear(x, m.base + m.b @ m.a), **parts))


def overlapping() -> nn.Module:
    def function(m: Any, x: Tensor) -> Tensor:
        first = functional.linear(x, m.rows[:20])
        return functional.linear(x.relu() + 1, m.rows[10:30]) + first

    return Odd(Formula(function, rows=weight(30, WIDTH)))


def pruned() -> nn.Module:
    linear = nn.Linear(WIDTH, 8)
    prune.random_unstructured(linear, "weight", 0.5)  # type: ignore[no-untyped-call]
    return Odd(linear)


def unreached() -> nn.Module:
    return Odd(Formula(lambda m, x: x, unused=nn.Linear(WIDTH, 8)))


# name → (model, calibration, what the message names, a part of its owner's name)
UNCOVERED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[str, ...], str]] = {
    "tied": (
        tiny_qwen2,
        lambda: [token_ids(3, 7)],
        ("1 weights", "model.embed_tokens.weight: tied: an embedding shares this weight"),
        "embed_tokens",
    ),
    "weight_norm": (
        weight_normed,
        vectors,
        ("odd.parametrizations.weight.original1: ", "computed the weight"),
        "odd",
    ),
    "lora": (
        lora_sum,
        vectors,
        ("3 weights", "odd.base: ", "odd.b: ", "odd.a: ", "computed the weight"),
        "odd",
    ),
    "overlap": (
        overlapping,
        vectors,
        ("2 weights", "odd.rows[0:20]: overlaps odd.rows[10:30]", "odd.rows[10:30]: overlaps"),
        "odd",
    ),
    "recurrence": (
        lambda: Odd(nn.LSTM(WIDTH, 8, batch_first=True)),
        vectors,
        ("2 weights", "odd.weight_ih_l0: read by aten.lstm", "odd.weight_hh_l0: read by aten.lstm"),
        "odd",
    ),
    "pruned": (
        pruned,
        vectors,
        ("1 weights", "odd.weight_orig: ", "computed the weight"),
        "odd",
    ),
    "spectral_norm": (
        lambda: Odd(parametrizations.spectral_norm(nn.Linear(WIDTH, 8))),
        vectors,
        ("1 weights", "odd.parametrizations.weight.original: also read by aten.div"),
        "odd",
    ),
    "bilinear": (
        lambda: Odd(Formula(lambda m, x: m.two(x, x), two=nn.Bilinear(WIDTH, WIDTH, 8))),
        vectors,
        ("1 weights", "odd.two.weight: read by aten.bilinear"),
        "two",
    ),
    "unreached": (
        unreached,
        vectors,
        ("1 weights", "odd.unused.weight: no calibration input reaches it"),
        "unused",
    ),
    "experts": (
        MODELS["mixtral"],
        lambda: ONE_TOKEN,
        (
            "4 weights",
            "experts.gate_up_proj[",
            "experts.down_proj[",
            "no counted calibration token",
        ),
        "experts",
    ),
}
uncovered = pytest.mark.parametrize("name", list(UNCOVERED))


def transform(model: nn.Module, calib: Any, **options: Any) -> nn.Module:
    return magr_transform(model, calib, QUICK, trace="make_fx", **options)


def quantize(model: nn.Module, calib: Any, **options: Any) -> nn.Module:
    quick = {"config": QUICK, "trace": "make_fx", "propagate": False, "holdout": 0.0}
    return magr_quantize(model, calib, INT4, **{**quick, **options})


def run_pass(model: nn.Module, calib: Any, **options: Any) -> nn.Module:
    """MagRPass on the exported model, whose parameters are the model's own."""
    batch = torch.export.Dim.AUTO
    shapes = tuple({0: batch} for _ in calib[0].shape[:1])
    exported = torch.export.export(model, (calib[0],), dynamic_shapes=shapes, strict=False)
    graph_module: nn.Module = exported.module()
    MagRPass(calib, QUICK, **options)(graph_module)  # type: ignore[arg-type]
    return graph_module


def tensors(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)]


def assert_refused(
    run: Callable[..., Any], model: nn.Module, calib: Any, named: tuple[str, ...]
) -> None:
    before, modules = state(model), list(model.named_modules())
    model.train()
    with pytest.raises(CoverageError, match=r"^strict=True, and \d+ weights that meet") as caught:
        run(model, calib, strict=True)
    for part in named:
        assert part in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert changed(model, before) == []
    assert list(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert not hasattr(model, "magr_report")


# Refused.


@uncovered
def test_magr_transform_refuses_and_names_what_it_would_skip(name: str) -> None:
    make, calib, named, _ = UNCOVERED[name]
    assert_refused(transform, make(), calib(), named)


@uncovered
def test_magr_quantize_refuses_and_names_what_it_would_skip(name: str) -> None:
    make, calib, named, _ = UNCOVERED[name]
    assert_refused(quantize, make(), calib(), named)


@pytest.mark.parametrize("name", ["weight_norm", "lora", "overlap"])
def test_magr_pass_refuses_and_names_what_it_would_skip(name: str) -> None:
    make, calib, named, _ = UNCOVERED[name]
    model = make().eval()
    before = state(model)
    with pytest.raises(CoverageError, match="would not be rewritten") as caught:
        run_pass(model, calib(), strict=True)
    for part in named:
        assert part in str(caught.value)
    assert changed(model, before) == []


@pytest.mark.parametrize("make", [JETMOE, MODELS["dbrx"], MODELS["gpt_oss"]])
@pytest.mark.slow_unless("make1")
def test_experts_without_tokens_are_refused_however_they_are_stored(make: Any) -> None:
    assert_refused(transform, make(), ONE_TOKEN, ("experts", "no c"))


def test_what_torchao_cannot_quantize_is_refused_by_magr_quantize_alone() -> None:
    parts = {"linear": nn.Linear(WIDTH, 8), "raw": weight(8, 4)}
    model = Formula(lambda m, x: m.linear(x) @ m.raw, **parts)
    assert_refused(quantize, model, vectors(), ("1 weights", "raw: not rewritten: torchao"))
    transform(model, vectors(), strict=True)
    assert len(report_of(model).rewritten) == 2


def test_gpt_oss_biases_are_no_weights_that_meet_an_input() -> None:
    model = transform(MODELS["gpt_oss"](), [token_ids(4, 16)], strict=True)
    skipped = {site.name.rpartition(".")[2] for site in report_of(model).skipped}
    assert skipped == {"weight", "gate_up_proj_bias", "down_proj_bias"}


def test_only_padding_reaching_a_weight_is_refused() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(WIDTH, 8)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            result: Tensor = self.plain(inputs_embeds)
            return result

    batch = {"inputs_embeds": activations(2, 5, WIDTH), "attention_mask": torch.zeros(2, 5).long()}
    with pytest.raises(CalibrationError, match="no token of the 1 calibration batches counts"):
        transform(Masked(), [batch], strict=True)


def test_a_long_list_is_cut_and_counted() -> None:
    parts = {f"unused{at}": nn.Linear(WIDTH, 8) for at in range(7)}
    model = Odd(Formula(lambda m, x: x, **parts))
    with pytest.raises(CoverageError, match="and 7 weights") as caught:
        transform(model, vectors(), strict=True)
    assert str(caught.value).count("no calibration input reaches it") == 5
    assert "; ...." in str(caught.value)


# Not refused.


@uncovered
def test_without_strict_it_is_reported_and_the_others_are_rewritten(name: str) -> None:
    make, calib, _, part = UNCOVERED[name]
    model = transform(make(), calib())
    assert any(part in site.name for site in report_of(model).skipped)
    assert report_of(model).rewritten


@uncovered
@pytest.mark.parametrize("run", [transform, quantize])
@pytest.mark.slow_if("transform-tied", "quantize-experts")
def test_what_filter_fn_leaves_out_needs_no_rewriting(
    run: Callable[..., nn.Module], name: str
) -> None:
    make, calib, _, part = UNCOVERED[name]
    model = run(make(), calib(), strict=True, filter_fn=lambda module, fqn: part not in fqn)
    assert report_of(model).rewritten
    assert any(part in site.name for site in report_of(model).skipped)


@pytest.mark.parametrize("name", ["weight_norm", "lora", "overlap"])
def test_what_filter_fn_leaves_out_needs_no_rewriting_in_a_graph(name: str) -> None:
    make, calib, _, part = UNCOVERED[name]
    options: dict[str, Any] = {"filter_fn": lambda module, fqn: part not in fqn}
    graph_module: Any = run_pass(make().eval(), calib(), strict=True, **options)
    assert [site.name for site in graph_module.meta["magr"].rewritten] == ["plain.weight"]


def test_a_filter_that_leaves_out_something_else_does_not_help() -> None:
    model = lora_sum()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(CoverageError, match=r"odd\.base"):
        transform(model, vectors(), strict=True, filter_fn=lambda module, name: name != "extra")


def test_embeddings_norms_and_convolutions_are_no_weights_to_rewrite() -> None:
    def function(m: Any, ids: Tensor) -> Tensor:
        x = m.norm(m.table(ids)).transpose(-1, -2)
        result: Tensor = m.head(m.conv(x).transpose(-1, -2))
        return result

    torch.manual_seed(0)
    parts = {
        "table": nn.Embedding(64, 16),
        "norm": nn.LayerNorm((5, 16)),  # its weight has two dimensions
        "conv": nn.Conv1d(16, 8, 1),
        "head": nn.Linear(8, 4),
    }
    for run in (transform, quantize):
        model = run(Formula(function, **parts), [token_ids(3, 5)], strict=True)
        report = report_of(model)
        assert [site.name for site in report.rewritten] == ["head.weight"]
        assert {site.name for site in report.skipped} == {
            "table.weight",
            "norm.weight",
            "norm.bias",
            "conv.weight",
        }
        parts["head"] = nn.Linear(8, 4)


@pytest.mark.parametrize(
    ("run", "make"),
    [(run_pass, mlp), (transform, mlp), (quantize, mlp), (transform, tiny_llama)],
)
@pytest.mark.slow_if("transform-tiny_llama")
def test_where_all_are_rewritten_strict_changes_nothing(
    run: Callable[..., nn.Module], make: Callable[[], nn.Module]
) -> None:
    calib = vectors() if make is mlp else [token_ids(3, 7)]
    strict, other = make(), make()
    run(strict, calib, strict=True)
    run(other, calib)
    for key, parameter in strict.named_parameters():
        one, two = parameter, other.get_parameter(key)
        if isinstance(one, TorchAOBaseTensor):
            assert torch.equal(one.dequantize(), two.dequantize())
        else:
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gpt_oss"}))
@pytest.mark.slow_if("qwen3_moe")
def test_experts_and_conv1d_are_covered(name: str) -> None:
    model = transform(MODELS[name](), [token_ids(4, 16)], strict=True)
    meets = [s for s in report_of(model).skipped if "embedding table" not in s.reason]
    assert meets == []


# Failures on the way.


def failing(reason: str, part: str) -> Callable[..., Any]:
    """quantized_weights, but for the sites whose first one's name has this part."""

    def quantized(shared: Any, *args: Any) -> Any:
        if part in shared.sites[0].name:
            raise CalibrationError(reason)
        return quantized_weights(shared, *args)

    return quantized


def fail_for(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    def solve(weight: Tensor, *args: Any, **options: Any) -> Any:
        if len(weight) == rows:
            raise CalibrationError("provoked")
        return solve_magr(weight, *args, **options)

    monkeypatch.setattr(solve_sites, "solve_magr", solve)


@pytest.mark.parametrize("strict", [True, False])
def test_a_failed_solve_is_raised_at_the_end_with_its_name(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    before = state(model)
    fail_for(monkeypatch, 48)
    if strict:
        with pytest.raises(CoverageError, match="1 weights failed") as caught:
            transform(model, vectors(), strict=True)
        assert "0.weight: CalibrationError: provoked" in str(caught.value)
        assert "The other 1 are rewritten" in str(caught.value)
    else:
        transform(model, vectors())
    report = report_of(model)
    assert [site.name for site in report.failed] == ["0.weight"]
    assert [site.name for site in report.rewritten] == ["2.weight"]
    assert changed(model, before) == ["2.weight"]


def test_a_failed_solve_in_a_graph_is_raised_at_the_end_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    before = state(model)
    fail_for(monkeypatch, 48)
    with pytest.raises(CoverageError, match=r"0\.weight: CalibrationError: provoked"):
        run_pass(model, vectors(), strict=True)
    assert changed(model, before) == ["2.weight"]


def test_a_failure_keeps_magr_quantize_from_quantizing_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    before = state(model)
    monkeypatch.setattr(solve_sites, "quantized_weights", failing("provoked", "0."))
    config = replace(QUICK, zero_point="whole")
    with pytest.raises(CoverageError, match="nothing was quantized") as caught:
        quantize(model, vectors(), strict=True, config=config)
    assert "0.weight: CalibrationError: provoked" in str(caught.value)
    assert tensors(model) == []
    assert changed(model, before) == ["2.weight"]
    assert [site.name for site in report_of(model).rewritten] == ["2.weight"]
    assert not any(site.quantized for site in report_of(model).sites)


def test_after_a_failure_with_gptq_the_report_says_what_was_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    before = state(model)
    monkeypatch.setattr(solve_sites, "quantized_weights", failing("provoked", "0."))
    with pytest.raises(CoverageError, match=r"0\.weight: CalibrationError: provoked"):
        quantize(model, vectors(), strict=True, rounding="gptq")
    assert tensors(model) == []
    assert changed(model, before) == []
    assert "magr_report" not in vars(model)


def test_what_no_view_reads_of_a_parameter_is_refused_too() -> None:
    assert_refused(transform, Shapes(), vectors(), ("1 weights", "fused[32:64]: no calibration"))
