"""An exported graph that computes something else than its model is not used."""

from __future__ import annotations

import operator
import os
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import Formula
from tiny_models import ARCHITECTURES, activations, text_calib, tiny_mixtral
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from toys import WIDTH, changed, report_of, state, vectors
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from magr_fx import MagRConfig, TraceError, magr_transform
from magr_fx.passes.graphs.decisions import is_random
from magr_fx.passes.graphs.torch_private import tree_flatten
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.same_output import check_same_output
from magr_fx.passes.tracing.trace_batches import Tracing, trace_batches

QUICK = MagRConfig(alpha=1e-3)


def linears() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, 8)}


def otherwise(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    if torch.compiler.is_exporting():
        x = x.tril()
    return m.b(x)


def another_shape(m: Any, x: Tensor) -> Any:
    x = m.b(m.a(x))
    return x[:, :4] if torch.compiler.is_exporting() else x


def test_auto_takes_the_model_as_it_runs() -> None:
    calib = vectors(40, 24)
    model = magr_transform(Formula(otherwise, **linears()), calib, QUICK)
    report = report_of(model)
    assert report.tracer == "make_fx"
    assert report.refusal.startswith(
        "the exported graph of Formula computes something else than the model itself with "
        "calibration batch 0: its outputs differ by 0."
    )
    assert f"\nbecause {report.refusal}\n" in report.totals()
    plain = magr_transform(Formula(lambda m, x: m.b(m.a(x)), **linears()), calib, QUICK)
    assert report_of(plain).tracer == "export"
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "how"), [(otherwise, "differ by 0."), (another_shape, r"shapes \[\(40, 4\)\]")]
)
def test_asked_for_export_it_is_an_error(function: Any, how: str) -> None:
    model = Formula(function, **linears())
    before = state(model)
    with pytest.raises(TraceError, match=rf'{how}.*needs trace="make_fx"'):
        magr_transform(model, vectors(), trace="export")
    assert changed(model, before) == []


def test_every_signature_is_compared_but_not_every_batch() -> None:
    calls: SimpleQueue[float] = SimpleQueue()  # a list would be what it was

    def function(m: Any, x: Tensor, scale: float = 1.0) -> Any:
        if not torch.compiler.is_exporting():
            calls.put(scale)
        return m.b(m.a(x)) * (3.0 if scale == 2.0 and torch.compiler.is_exporting() else 1.0)

    x, y = vectors(40, 24)
    magr_transform(Formula(function, **linears()), [x, y, x], QUICK, trace="export")
    assert (calls.get(), calls.empty()) == (1.0, True)
    with pytest.raises(TraceError, match="with calibration batch 1"):
        magr_transform(Formula(function, **linears()), [x, (y, 2.0)], QUICK, trace="export")


def test_a_model_that_looks_at_the_number_of_images_is_compared_with_all() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.a(x.flatten(1)[:, :WIDTH])
        if len(x) > 4 and torch.compiler.is_exporting():
            x = x * 2
        return m.b(x)

    model = Formula(function, **linears())
    with calibration_mode(model), pytest.raises(TraceError, match="its outputs differ"):
        trace_batches(model, read_calib([torch.randn(9, 3, 8, 8)], model), Tracing("export"))


def test_state_random_numbers_and_inputs_stay() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x.mul_(2)
        m.count.add_(1)
        m.last = x
        return m.b(m.a(x)) + m.count

    model = Formula(function, **linears())
    model.register_buffer("count", torch.zeros(1))
    model.register_buffer("last", torch.zeros(1))
    x = activations(40, WIDTH)
    kept, generator = x.clone(), torch.get_rng_state()
    magr_transform(model, [x], QUICK, trace="export")
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.count.item() == 0
    assert torch.equal(model.last, torch.zeros(1))


def test_random_numbers_are_no_difference() -> None:
    def function(m: Any, x: Tensor) -> Any:
        return m.b(m.a(x) + torch.randn_like(x))

    model = magr_transform(Formula(function, **linears()), vectors(), QUICK)
    assert report_of(model).tracer == "export"


def test_rounding_in_half_precision_is_no_difference() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        return m.b(x * 1.01 if torch.compiler.is_exporting() else x)

    half = Formula(function, **linears()).to(torch.bfloat16)
    calib = vectors(dtype=torch.bfloat16)
    assert report_of(magr_transform(half, calib, QUICK)).tracer == "export"
    assert report_of(magr_transform(Formula(function, **linears()), vectors(), QUICK)).refusal


# --- what carries the tag of random numbers, and draws none


def attends(m: Any, x: Tensor) -> Any:
    """Attention, causal only while it is exported."""
    q = m.a(x).view(len(x), 4, 1, -1).transpose(1, 2)
    causal = torch.compiler.is_exporting()
    y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)
    return m.b(y.transpose(1, 2).flatten(1))


def test_attention_without_dropout_is_compared() -> None:
    report = report_of(magr_transform(Formula(attends, **linears()), vectors(), QUICK))
    assert report.tracer == "make_fx"
    assert "computes something else" in report.refusal


@pytest.mark.parametrize("kind", ["forward", "pre", "child", "with_kwargs"])
def test_a_model_with_hooks_is_compared(kind: str) -> None:
    model = Formula(otherwise, **linears())
    seen: SimpleQueue[int] = SimpleQueue()  # a list would be what it was
    if kind == "forward":
        model.register_forward_hook(lambda *_: seen.put(1))
    elif kind == "pre":
        model.register_forward_pre_hook(lambda *_: seen.put(1))
    elif kind == "child":
        model.get_submodule("a").register_forward_hook(lambda *_: seen.put(1))
    else:
        model.register_forward_hook(lambda *_: seen.put(1), with_kwargs=True)
    assert report_of(magr_transform(model, vectors(), QUICK)).tracer == "make_fx"
    assert not seen.empty()


def test_hooks_that_change_what_is_computed_are_a_part_of_the_model() -> None:
    model = Formula(lambda m, x: m.b(m.a(x)), **linears())
    model.get_submodule("a").register_forward_hook(lambda m, args, output: output.relu())
    assert report_of(magr_transform(model, vectors(), QUICK)).tracer == "export"


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("same", [True, False])
def test_a_graph_that_draws_random_numbers_is_compared_with_the_same_ones(
    drawn: float, same: bool
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = nn.functional.dropout(m.a(x), drawn, training=True)
        return m.b(x if same or not torch.compiler.is_exporting() else x + 1)

    model, calib = Formula(forward, **linears()), vectors()
    state = torch.get_rng_state()
    report = report_of(magr_transform(model, calib, QUICK))
    assert report.tracer == ("export" if same else "make_fx")
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_from_elsewhere_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        noise = torch.from_numpy(np.frombuffer(os.urandom(WIDTH), dtype=np.uint8) / 255)
        return m.b(nn.functional.dropout(m.a(x), 0.5, training=True) + noise.to(x))

    report = report_of(magr_transform(Formula(forward, **linears()), vectors(), QUICK))
    assert report.tracer == "export"
    (record,) = [r for r in caplog.records if "could not be compared" in r.getMessage()]
    assert record.levelname == "WARNING"
    assert "random numbers outside torch" in record.getMessage()


def test_a_graph_that_fails_where_the_model_runs_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return y + torch.linalg.cholesky(-torch.eye(8)) if torch.compiler.is_exporting() else y

    report = report_of(magr_transform(Formula(forward, **linears()), vectors(8, 8), QUICK))
    assert report.tracer == "make_fx"
    assert "it fails with _LinAlgError" in report.refusal


def test_a_graph_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    graph = fx.Graph()
    graph.output([graph.call_function(operator.add, (graph.placeholder("x"), None))])
    graph_module, x = fx.GraphModule({}, graph), vectors()[0]
    with pytest.raises(TypeError):
        graph_module(x)
    assert "eval_with_key" in capfd.readouterr().err  # what torch prints otherwise
    model = Formula(lambda m, x: m.b(m.a(x)), **linears()).eval()
    leaves, spec = tree_flatten({"inputs": (x,)})
    with pytest.raises(TraceError, match="it fails with TypeError"), torch.no_grad():
        check_same_output(graph_module, model, 0, leaves, spec)
    assert capfd.readouterr() == ("", "")


def test_no_memory_for_both_outputs_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("magr_fx.passes.tracing.same_output.difference", full)
    report = report_of(magr_transform(Formula(otherwise, **linears()), vectors(), QUICK))
    assert report.tracer == "export"
    assert "could not be compared with the model itself (calibration batch 0)" in caplog.text


@pytest.mark.parametrize("kind", ["nan", "integers", "truth", "complex"])
def test_outputs_of_every_kind_are_compared(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        other = torch.compiler.is_exporting()
        if kind == "nan":
            return torch.where(y > 1, torch.nan, y) if other else y
        if kind == "complex":
            return torch.complex(y, -y if other else y)
        y = y.flip(-1) if other else y
        return y.argmax(-1) if kind == "integers" else y > 0

    assert report_of(magr_transform(Formula(forward, **linears()), vectors(), QUICK)).refusal


@pytest.mark.parametrize("otherwise", [False, True])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral"])
@pytest.mark.slow_unless("bert-False", "bert-True", "vit-False")
def test_families_of_transformers_are_compared(name: str, otherwise: bool) -> None:
    """With a fault put in that only the graph has, none of them may stay with its graph."""
    make, calib, *_ = ARCHITECTURES.get(name, (tiny_mixtral, text_calib))
    model = make()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output * (1.2 if otherwise and torch.compiler.is_exporting() else 1.0)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook)
    batches = read_calib(calib()[:1], model)
    with calibration_mode(model):
        traced = trace_batches(model, batches)
    assert {t.trace.tracer for t in traced} == {"make_fx" if otherwise else "export"}


DRAWS: list[tuple[Any, bool]] = [
    (lambda x: nn.functional.dropout(x, 0.5, training=False), False),
    (lambda x: nn.functional.dropout(x, 0.0, training=True), False),
    (lambda x: nn.functional.dropout(x, 0.5, training=True), True),
    (lambda x: torch.dropout(x, p=0.5, train=False), False),
    (lambda x: torch.native_dropout(x, 0.5, False)[0], False),
    (lambda x: nn.functional.alpha_dropout(x, 0.5, training=False), False),
    (lambda x: nn.functional.feature_alpha_dropout(x, 0.5, training=True), True),
    (lambda x: nn.functional.rrelu(x, training=False), False),
    (lambda x: nn.functional.rrelu(x, training=True), True),
    (lambda x: x + torch.randn_like(x), True),
    (lambda x: torch.bernoulli(x.sigmoid()), True),
    (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), False),
    (lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.0), False),
    (lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
]


@pytest.mark.parametrize(("function", "draws"), DRAWS)
def test_which_ops_draw_random_numbers(function: Any, draws: bool) -> None:
    traced = make_fx(function, pre_dispatch=True)(torch.randn(1, 2, 3, 4))
    assert any(is_random(node) for node in traced.graph.nodes) == draws
    # By drawing: the generator's state tells.
    state = torch.get_rng_state()
    function(-torch.ones(1, 2, 3, 4))
    assert (not torch.equal(torch.get_rng_state(), state)) == draws


TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 99,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip


def with_image(images: slice) -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(5, 80, (2, 24))
    ids[:, images] = 90
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}


@pytest.mark.slow
def test_paligemma_without_token_type_ids_is_taken_as_it_runs() -> None:
    """Its attention is causal only while it is exported: the grams tell which one was seen."""
    vision = {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32}
    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"}, vision_config=vision, image_token_index=90,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = PaliGemmaForConditionalGeneration(config).eval()
    batch = with_image(slice(0, 16))
    last = model.model.language_model.layers[-1].mlp.down_proj
    inputs: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    before = last.weight.detach().clone()
    magr_transform(model, [batch], MagRConfig(alpha=1e-2))
    assert report_of(model).tracer == "make_fx"
    x, moved = inputs[0].flatten(0, -2).double(), (last.weight - before).detach().double()
    error = float((x @ moved.T).norm() / (x @ before.double().T).norm())
    site = next(s for s in report_of(model).rewritten if s.name.endswith("1.mlp.down_proj.weight"))
    assert site.output_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("trace", ["auto", "export", "make_fx"])
@pytest.mark.slow_unless("make_fx")
def test_gemma_with_images_and_token_types_is_traced(trace: str) -> None:
    """Its graph has constants that are no tensors, and masks that torch.vmap makes."""
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    batch = with_image(slice(2, 6))
    batch["token_type_ids"] = (batch["input_ids"] == 90).long()
    report = report_of(magr_transform(model, [batch], MagRConfig(alpha=1e-2), trace=trace))
    assert len(report.rewritten) >= 2 * 7
    assert not report.failed
