"""compare: two models on the same inputs, against what their whole outputs say."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from expert_models import MODELS
from model_zoo import ZOO
from targets import ASYMMETRIC, intx
from tiny_models import activations, t5_calib, tiny_bert, tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import mlp, report_of, state, vectors

from magr_fx import (
    CalibrationError,
    Comparison,
    ConfigError,
    ModelError,
    compare,
    magr_quantize,
)
from magr_fx.comparing import texts
from magr_fx.comparing.next_token import NextToken, predicts_next_token
from magr_fx.passes.graphs.trace import calibration_mode

INT2 = intx(2, ASYMMETRIC, None)
BATCHES = [token_ids(3, 12, seed=seed) for seed in range(3)]
CAUSAL = [
    *("Llama", "Llama 4", "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2"),
    *("OPT", "GPT-NeoX", "Falcon", "Mamba", "JetMoE"),
]


def noisy(model: nn.Module, amount: float = 0.02) -> Any:
    """A copy whose weights are a little other."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=draw))
    return other


def sharper(model: Any, times: float = 30.0) -> Any:
    """Random models predict next to nothing; with a larger head they disagree about more."""
    with torch.no_grad():
        model.get_output_embeddings().weight *= times
    return model


def whole(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits.double()
    return logits


def test_every_figure_is_that_of_whole_logits() -> None:
    original = sharper(tiny_llama())
    quantized = noisy(original)
    found = compare(original, quantized, BATCHES)
    assert found.outputs is None
    text = found.text
    assert text is not None
    p, q = (
        torch.cat([whole(each, input_ids=ids)[:, :-1] for ids in BATCHES]).log_softmax(-1)
        for each in (original, quantized)
    )
    following = torch.cat(BATCHES)[:, 1:]
    divergence = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    losses = [functional.nll_loss(each.flatten(0, 1), following.flatten()) for each in (p, q)]
    assert text.tokens == 99
    assert text.divergence.value == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert text.largest == pytest.approx(float(divergence.max()), rel=1e-5)
    assert text.median == pytest.approx(float(divergence.median()), rel=1e-5)
    assert text.perplexity_original.value == pytest.approx(float(losses[0].exp()), rel=1e-5)
    assert text.perplexity.value == pytest.approx(float(losses[1].exp()), rel=1e-5)
    assert text.ratio.value == pytest.approx(float((losses[1] - losses[0]).exp()), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    assert text.same_top.value == pytest.approx(float(same.mean()))
    assert 0.1 < text.same_top.value < 1
    change = [each.gather(-1, following[..., None]).exp() for each in (p, q)]
    rms = float((change[1] - change[0]).square().mean().sqrt())
    assert text.probability_rms == pytest.approx(rms, rel=1e-5)
    assert [window.number for window in text.windows] == list(range(9))
    by_window = [window.divergence for window in text.windows]
    assert by_window == pytest.approx(divergence.mean(-1).tolist(), rel=1e-5)
    # Of the mean of windows of the same length: their standard deviation by the root of nine.
    error = float(divergence.mean(-1).std() / 3)
    assert text.divergence.error == pytest.approx(error, rel=1e-5)
    # The errors of both perplexities have nearly all in common.
    assert text.ratio.error / text.ratio.value < text.perplexity.error / text.perplexity.value


@pytest.mark.parametrize("name", [*CAUSAL, *(f"experts: {name}" for name in MODELS)])
def test_logits_in_pieces_are_those_of_the_whole_model(name: str) -> None:
    model: Any = MODELS[name[9:]]() if name.startswith("experts") else ZOO[name].make()
    assert predicts_next_token(model)
    arguments: Any = ((), {"input_ids": BATCHES[0], "use_cache": False})
    with calibration_mode(model):
        wanted = model(**arguments[1]).logits
        judged = NextToken(model)
        hidden = judged.hidden(arguments)
        for one in (judged, judged.head()):
            rows = []
            for sequences in (slice(0, 2), slice(2, 3)):
                parts = [(sequences, slice(at, at + 5)) for at in (0, 5, 10)]
                rows.append(torch.cat([one.logits(hidden, p, arguments) for p in parts], 1))
            torch.testing.assert_close(torch.cat(rows), wanted)
        torch.testing.assert_close(model(**arguments[1]).logits, wanted)  # it is whole again


def test_a_model_and_its_copy_are_exactly_the_same() -> None:
    model = tiny_llama()
    found = compare(model, copy.deepcopy(model), BATCHES)
    assert found.text is not None
    assert found.text.largest == found.text.divergence.error == found.text.probability_rms == 0
    assert found.text.same_top == (1.0, 0.0)
    assert found.text.ratio == (1.0, 0.0)
    assert found.text.collapsed == []
    assert re.search(r"same top token +100\.00% ± 0\.00%\n", str(found))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *made, 0)
        return out


@pytest.mark.parametrize("shape", [(2, 64), (64, 2)])
def test_no_whole_logits_are_in_memory(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "BYTES", 2**18)
    model = tiny_llama(vocab_size=8192)
    other = noisy(model)
    ids = [token_ids(*shape)]
    with Largest() as seen:
        found = compare(model, other, ids)
    assert found.text is not None
    assert found.text.tokens == shape[0] * (shape[1] - 1)
    weights = 8192 * 32 * 4
    assert seen.bytes < weights + 2**18 < 2 * 64 * 8192 * 4  # of one whole tensor in float32


def test_padding_and_ignored_labels_do_not_count() -> None:
    model = sharper(tiny_llama())
    other, ids = noisy(model), token_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, :4] = -100
    alone = [ids[:1], ids[1:, :6]]
    wanted = compare(model, other, alone).text
    found = compare(model, other, [{"input_ids": ids, "attention_mask": mask}]).text
    assert wanted is not None
    assert found is not None
    assert [w.tokens for w in found.windows] == [9, 5]
    assert found.divergence.value == pytest.approx(wanted.divergence.value, rel=1e-5)
    ignored = compare(
        model, other, [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    ).text
    assert ignored is not None
    assert [w.tokens for w in ignored.windows] == [6, 5]


@pytest.mark.parametrize(
    ("make", "calib"),
    [(tiny_bert, lambda: BATCHES), (mlp, lambda: vectors(5, 7)), (tiny_t5, t5_calib)],
)
def test_outputs_of_other_models(make: Callable[[], Any], calib: Callable[[], list[Any]]) -> None:
    original = make().eval()
    other, batches = noisy(original), calib()
    found = compare(original, other, batches)
    assert found.text is None
    outputs = found.outputs
    assert outputs is not None
    error = norm = 0.0
    cosines = []
    for batch in batches:
        kwargs = batch if isinstance(batch, dict) else {}
        args = () if kwargs else (batch,)
        with torch.no_grad(), calibration_mode(original), calibration_mode(other):
            ys = [
                [t for t in tree_leaves(each(*args, **kwargs)) if isinstance(t, Tensor)]
                for each in (original, other)
            ]
        for y, made in zip(*ys, strict=True):
            error += float((made - y).double().square().sum())
            norm += float(y.double().square().sum())
            cosines.append(functional.cosine_similarity(y.double(), made.double(), -1).flatten())
    assert outputs.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-5)
    assert outputs.cosine.value == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-6)
    assert 0 < outputs.relative_error < max(outputs.by_window)
    same = compare(original, copy.deepcopy(original), batches).outputs
    assert same is not None
    assert same.relative_error == 0
    assert same.cosine.value == pytest.approx(1)


def test_padding_of_an_encoder_does_not_count() -> None:
    model = tiny_bert()
    other, ids = noisy(model), token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    padded = compare(model, other, [{"input_ids": ids, "attention_mask": mask}]).outputs
    alone = compare(model, other, [ids[:, :5]]).outputs
    assert padded is not None
    assert alone is not None
    assert padded.relative_error == pytest.approx(alone.relative_error, rel=1e-4)


def test_models_are_left_as_they_are() -> None:
    original = tiny_llama().train()
    quantized = noisy(original)
    original.model.forward = own = original.model.forward
    befores = [state(each) for each in (original, quantized)]
    compare(original, quantized, BATCHES)
    for model, before in zip((original, quantized), befores, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())
    assert original.model.forward == own
    assert "forward" not in vars(quantized.model)


def test_compiled_and_offloaded_models() -> None:
    model = tiny_llama()
    other = noisy(model)
    wanted = compare(model, other, BATCHES)
    compiled: Any = torch.compile(copy.deepcopy(other), backend="eager")
    assert str(compare(model, compiled, BATCHES).text) == str(wanted.text)
    offloaded = cpu_offload(copy.deepcopy(model))
    found = compare(offloaded, other, BATCHES)
    assert str(found.text) == str(wanted.text)
    assert str(found.size_original) == str(wanted.size_original)


def test_sizes_are_those_of_the_tensors() -> None:
    model = tiny_llama()
    quantized = magr_quantize(copy.deepcopy(model), BATCHES, INT2)
    found = compare(model, quantized, BATCHES)
    numbers = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert found.size_original.memory == 4 * numbers + buffers
    assert found.size_original.bits == 32
    own = 4 * numbers + buffers
    for module in model.modules():
        if isinstance(module, nn.Linear):  # a code is a byte, a scale and a zero point are four
            rows, columns = module.weight.shape
            own += rows * columns * (1 - 4) + rows * (4 + 4)
    assert found.size.memory == own
    assert found.size.weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert found.size.disk is None


# ---- what is refused


def test_one_and_the_same_model_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ModelError, match=r"one and the same: .*copy\.deepcopy"):
        compare(model, model, BATCHES)
    with pytest.raises(ModelError, match="one and the same"):
        compare(torch.compile(model), model, BATCHES)  # type: ignore[arg-type]


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match="vocabularies of 64 and 96 tokens"):
        compare(tiny_llama(), tiny_llama(vocab_size=96), BATCHES)


def test_nan_names_the_model_and_the_window() -> None:
    model, ids = tiny_llama(), token_ids(4, 12)
    broken = copy.deepcopy(model)
    ids[:] = ids % 60
    ids[2, 3] = 63
    with torch.no_grad():
        broken.model.embed_tokens.weight[63] = math.nan
    with pytest.raises(ModelError, match="of the quantized model are NaN or infinite in window 6"):
        compare(model, broken, [ids % 60, ids])
    with pytest.raises(ModelError, match="of the original model are NaN or infinite in window 2"):
        compare(broken, model, [ids])
    large = sharper(tiny_llama(), 1e6).half()  # its logits overflow
    with pytest.raises(ModelError, match="are NaN or infinite in window 0"):
        compare(large, copy.deepcopy(large), [ids])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "to compare the models on: calib is empty"),
        ([token_ids(2, 1)], "each window needs two tokens"),
        ([{"inputs_embeds": activations(2, 5, 32)}], "has no input_ids"),
        ([token_ids(2, 5) + 64], "holds the token .* embedding has 64 rows"),
        ([{"input_ids": token_ids(1, 4), "labels": torch.full((1, 4), -100)}], "two tokens"),
        (
            [{"input_ids": token_ids(1, 4), "attention_mask": torch.zeros(1, 4).long()}],
            "each window needs two tokens",
        ),
    ],
)
def test_batches_that_predict_nothing_are_refused(batches: Any, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match=message):
        compare(model, noisy(model), batches)
    before = state(model)
    with pytest.raises(CalibrationError, match=message):  # before anything is quantized
        magr_quantize(model, BATCHES, INT2, evaluate=batches)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be compared"):
        compare(nn.Linear(8, 4), nn.Linear(8, 6), [activations(2, 8)])
    other = nn.Linear(8, 4)
    with torch.no_grad():
        other.weight[:] = math.nan
    with pytest.raises(ModelError, match="NaN or infinite in batch 0"):
        compare(nn.Linear(8, 4), other, [activations(2, 8)])


def test_what_the_models_own_code_raises_is_told_with_the_batch() -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise IndexError("provoked")

    with pytest.raises(ModelError, match=r"Fails does not run on batch 0 .*IndexError: provoked"):
        compare(nn.Linear(8, 4), Fails(8, 4), [activations(2, 8)])
    with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, got str"):
        compare("model", nn.Linear(8, 4), [activations(2, 8)])  # type: ignore[arg-type]


# ---- inputs of other forms


def test_inputs_and_buffers_that_forward_changes_are_what_they_were() -> None:
    class Changes(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            result: Tensor = self.linear(x.mul_(2))
            return result

    x = activations(3, 8)
    before = x.clone()
    model, other = Changes(), Changes()
    found = compare(model, other, [x])
    assert found.outputs is not None
    assert found.outputs.relative_error == 0
    assert torch.equal(x, before)
    assert model.calls == other.calls == 0


def test_the_decoder_has_a_mask_of_its_own() -> None:
    model = tiny_t5()
    other = noisy(model)
    ids, decoder = token_ids(2, 6), token_ids(2, 6, seed=1)
    masks = [torch.ones_like(ids) for _ in range(2)]
    masks[0][1, 4:] = 0
    masks[1][0, 3:] = 0
    batch = {"input_ids": ids, "decoder_input_ids": decoder}
    batch |= {"attention_mask": masks[0], "decoder_attention_mask": masks[1]}
    found = compare(model, other, [batch]).outputs
    assert found is not None
    error = norm = 0.0
    with torch.no_grad():
        ys = [each(**batch, use_cache=False) for each in (model, other)]
    for name, keep in (("logits", masks[1]), ("encoder_last_hidden_state", masks[0])):
        y, made = (each[name][keep.bool()].double() for each in ys)
        error += float((made - y).square().sum())
        norm += float(y.square().sum())
    assert found.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-4)
    labels = {"input_ids": ids, "labels": decoder}  # which make the decoder's inputs
    assert compare(model, other, [labels]).outputs is not None


def test_arguments_by_place_and_of_the_outputs_form() -> None:
    model = sharper(tiny_llama())
    other, ids = noisy(model), token_ids(2, 9)
    wanted = compare(model, other, [ids]).text
    by_place = (ids, None, None, None, None, ids)  # labels
    named = {"input_ids": ids, "return_dict": False, "logits_to_keep": 1}
    for batch in (by_place, named):
        assert str(compare(model, other, [batch]).text) == str(wanted)
    whole = copy.deepcopy(other)
    whole.compile(backend="eager", fullgraph=True)
    assert str(compare(model, whole, [ids]).text) == str(wanted)


def test_what_is_masked_out_in_both_outputs_is_the_same() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.arange(4) == 2, -math.inf)

    model = Masked(8, 4)
    plain, masked = (
        compare(each, noisy(each), [activations(3, 8)]).outputs for each in (nn.Linear(8, 4), model)
    )
    assert plain is not None
    assert masked is not None
    assert 0 < masked.relative_error < 1


def test_a_graph_of_pt2e_is_compared_by_its_outputs() -> None:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    model = tiny_bert()
    converted = magr_quantize(copy.deepcopy(model), BATCHES, quantizer)
    found = compare(model, converted, BATCHES)
    assert found.outputs is not None
    assert 0 < found.outputs.relative_error < 0.2
    assert found.size.bits < 32


# ---- in the report


@pytest.mark.parametrize(("make", "calib"), [(tiny_llama, BATCHES), (mlp, vectors())])
def test_magr_quantize_compares_with_what_the_model_was(
    make: Callable[[], Any], calib: list[Any], tmp_path: Path
) -> None:
    original = make().eval()
    model = copy.deepcopy(original)
    magr_quantize(model, calib, INT2, evaluate=calib)
    report = report_of(model)
    wanted = compare(original, model, calib)
    assert isinstance(report.comparison, Comparison)
    assert str(report.comparison) == str(wanted)
    assert str(wanted) in str(report)
    report.to_json(tmp_path / "report.json")
    wanted.to_json(tmp_path / "wanted.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["comparison"] == json.loads((tmp_path / "wanted.json").read_text())
    assert report_of(magr_quantize(make(), calib, INT2)).comparison is None


def test_evaluate_is_not_for_graphs_of_pt2e() -> None:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    with pytest.raises(ConfigError, match=r"call magr_fx\.compare"):
        magr_quantize(mlp(), vectors(), X86InductorQuantizer(), evaluate=vectors())


# ---- as text, JSON and a picture


def test_collapsed_windows_are_named(tmp_path: Path) -> None:
    model = sharper(tiny_llama(), 100)
    broken = noisy(model, 1.0)
    found = compare(model, broken, BATCHES)
    text = found.text
    assert text is not None
    bad = [w.number for w in text.windows if w.loss > w.loss_original + 3]
    assert text.collapsed == bad
    assert len(bad) > 3
    assert f"{bad[0]}, {bad[1]}, " in str(found)
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    found.to_json(tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["text"]["collapsed"] == bad
    assert saved["text"]["divergence"]["value"] == text.divergence.value
    assert "divergences" not in saved["text"]


def test_a_single_window_has_no_standard_error(tmp_path: Path) -> None:
    model = tiny_llama()
    found = compare(model, noisy(model), [token_ids(1, 8)])
    assert found.text is not None
    assert math.isnan(found.text.divergence.error)
    assert "±" not in str(found)
    found.to_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["text"]["ratio"]["error"] is None
    compare(mlp(), noisy(mlp()), vectors()).plot(tmp_path / "outputs.svg")
    assert (tmp_path / "outputs.svg").stat().st_size > 1000
