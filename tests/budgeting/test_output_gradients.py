"""The Fisher information of each row, against closed forms; and what is left as it was."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import text_calib, tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn
from toys import WIDTH, Shapes, changed, state, vectors

from magr_fx import ModelError
from magr_fx.machine.ranks import ALONE
from magr_fx.passes.budgeting.output_gradients import output_gradients
from magr_fx.passes.finding.counted_tokens import Tokens
from magr_fx.passes.finding.find_linears import Site, find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import Batch, read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import AUTO


def found_in(model: nn.Module, calib: Any) -> tuple[list[Batch], list[Site]]:
    batches = read_calib(calib, model)
    traced = trace_or_read(model, batches, AUTO)
    return batches, find_linears([one.trace for one in traced], model).sites


def gradients(model: nn.Module, calib: Any) -> dict[str, Tensor]:
    with calibration_mode(model):
        batches, sites = found_in(model, calib)
        return output_gradients(model, batches, sites, ALONE)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(x), "hidden": x * 3}


def test_classes_are_drawn_with_the_softmaxs_probabilities() -> None:
    model, x = Classifier(), torch.cat(vectors(4000, 4000))
    found = gradients(model, [x])["head.weight"]
    p = model.head(x).softmax(-1).detach().double()
    # E(pᵢ - [drawn i])² = pᵢ(1 - pᵢ), and ∂ℓ/∂wᵢ is a sum of independent terms.
    wanted = ((p * (1 - p)) * x.double().square().sum(-1, keepdim=True)).mean(0)
    spread = float(found.mean() / wanted.mean())
    assert 0.2 < spread < 5  # one draw of a square with as many degrees as there are inputs
    many = torch.stack(
        [gradients(model, [x[at : at + 40]])["head.weight"] for at in range(0, 8000, 400)]
    )
    assert float(many.mean() / wanted.mean()) == pytest.approx(1, abs=0.3)


def test_other_outputs_get_noise_of_their_own_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 48, bias=False))
    x = torch.cat(vectors(64, 64))
    found = gradients(model, [x])["0.weight"]
    wanted = (x.square().sum(-1) / model(x).detach().square().sum(-1)).mean()
    assert float(found.mean() / wanted) == pytest.approx(1, abs=0.5)
    larger = gradients(model, [100 * x])["0.weight"]
    torch.testing.assert_close(larger, found, rtol=1e-3, atol=0)


def test_tokens_of_padding_count_for_nothing() -> None:
    model, x = Classifier(), torch.stack(vectors(20, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 5:] = 0
    changed_padding = x.clone()
    changed_padding[1, 5:] = 100.0
    one, two = (
        gradients(model, [{"x": each, "attention_mask": mask}]) for each in (x, changed_padding)
    )
    torch.testing.assert_close(one["head.weight"], two["head.weight"], rtol=1e-4, atol=1e-6)


def test_rows_of_any_layout() -> None:
    model, x = Shapes(), torch.cat(vectors())
    with calibration_mode(model):
        batches, sites = found_in(model, [x])
        found = output_gradients(model, batches, sites, ALONE)
        # The same by autograd's own gradients, for the same draw.
        with torch.enable_grad():
            y = model(x)
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
            wanted = torch.autograd.grad(
                y, list(model.parameters()), noise / y.detach().norm(dim=-1, keepdim=True)
            )
    by_name = dict(zip([n for n, _ in model.named_parameters()], wanted, strict=True))
    for site in sites:
        grad = by_name[site.name.partition("[")[0]]
        laid_out = torch.empty_strided(site.parameter.shape, site.parameter.stride())
        laid_out.copy_(grad)
        own = laid_out.as_strided(site.shape, site.view.stride, site.view.offset)
        torch.testing.assert_close(
            found[site.name], own.square().sum(-1) / len(x), rtol=1e-4, atol=1e-9
        )
    assert len(sites) == 4


def test_everything_is_as_it_was() -> None:
    model: Any = tiny_llama()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    seen: list[Tensor] = []
    model.lm_head.weight.register_post_accumulate_grad_hook(seen.append)
    kept, before = model.lm_head.weight.grad, state(model)
    random = torch.get_rng_state()
    found = gradients(model, text_calib())
    assert all(bool((each > 0).any()) for each in found.values())
    assert changed(model, before) == []
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert model.lm_head.weight.grad is kept
    assert bool((kept == 1).all())
    assert seen == []  # an optimizer may step in such a hook
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert torch.equal(torch.get_rng_state(), random)


def test_under_inference_mode() -> None:
    wanted = gradients(tiny_llama(), text_calib())
    model = tiny_llama()
    with torch.inference_mode():
        found = gradients(model, text_calib())
        made_inside = nn.Sequential(nn.Linear(WIDTH, 8))
        with pytest.raises(ModelError, match=r"0\.weight was made under torch\.inference_mode"):
            gradients(made_inside, vectors())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_buffers_that_forward_writes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            scale: Any = self.scale
            scale.mul_(0.9).add_(0.1)
            out: Tensor = self.inner(x) * scale
            return out

    counts = Counts().eval()
    before = state(counts)
    found = gradients(counts, vectors(40, 24))
    assert all(bool((each > 0).all()) for each in found.values())
    assert changed(counts, before) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_overflow_are_unknown(value: float) -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.early, self.late = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            bent = self.early(x)
            bent.register_hook(lambda grad: grad * value) if bent.requires_grad else None
            out: Tensor = bent + self.late(x)
            return out

    found = gradients(Overflows(), vectors())
    assert bool(found["early.weight"].isnan().all())
    assert bool((found["late.weight"] > 0).all())


class Named(nn.Module):
    """Returns its output in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.conv = form, nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.form == "dataclass":
            return Output(y)
        if self.form == "picture":
            return {"logits": y.view(2, -1, 4, 5).permute(0, 3, 1, 2)}
        if self.form == "numbers":
            return y.sum(-1)
        return y.round().long()


@dataclass
class Output:
    logits: Tensor


def test_forms_of_outputs(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.cat(vectors(24, 16))
    plain = gradients(Named("dataclass"), [x])["conv.weight"]
    picture = gradients(Named("picture"), [x])["conv.weight"]
    torch.testing.assert_close(picture, plain)  # the same classes, drawn in the same order
    numbers = gradients(Named("numbers"), [x])["conv.weight"]
    assert bool((numbers > 0).all())
    with caplog.at_level("WARNING", logger="magr_fx"):
        whole = gradients(Named("whole"), [x])["conv.weight"]
    assert not whole.any()
    assert "no output of Named depends on its weights by autograd" in caplog.text


def test_masks_by_place_and_of_decoders() -> None:
    model, x = Classifier(), torch.stack(vectors(20, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 5:] = 0
    named = gradients(model, [{"x": x, "attention_mask": mask}])["head.weight"]
    by_place = gradients(model, [(x, mask)])["head.weight"]
    assert torch.equal(named, by_place)
    t5 = tiny_t5()
    ids, decoder = token_ids(4, 12), token_ids(4, 12, seed=1)
    encoder_mask = torch.ones(4, 12, dtype=torch.long)
    encoder_mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": encoder_mask, "decoder_input_ids": decoder}
    batches = read_calib([batch], t5)
    tokens = Tokens(batches, t5)
    counted = tokens.counted(batches[0], (4, 12), "logits")
    assert counted is not None
    assert int(counted.sum()) == 48
    of_encoder = tokens.counted(batches[0], (4, 12), "encoder_last_hidden_state")
    assert of_encoder is not None
    assert int(of_encoder.sum()) == 16


def test_the_same_each_time() -> None:
    one, two = (gradients(tiny_llama(), text_calib()) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_gradients_there_are_zeros() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tower, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.tower(x)
            out: Tensor = self.head(x)
            return out

    found = gradients(Frozen(), vectors())
    assert not found["tower.weight"].any()
    assert bool((found["head.weight"] > 0).all())


def test_a_model_that_cannot_run_backwards_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no backward kernel")

    monkeypatch.setattr(torch.autograd, "backward", fails)
    with pytest.raises(ModelError, match=r"batch 0, .*no backward kernel.*FqnToConfig"):
        gradients(model, vectors())


def test_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Tensor] = []
    ranks: Any = SimpleNamespace(owns=lambda at: at % 2 == 1, world=2, sum=summed.append)
    model = nn.Sequential(nn.Linear(WIDTH, 8))
    with calibration_mode(model):
        batches, sites = found_in(model, vectors(40, 24, 8))
        found = output_gradients(model, batches, sites, ranks)["0.weight"]
    assert len(summed) == 2  # one weight, and the number of outputs
    assert float(summed[1]) == 24  # the second of three batches
    torch.testing.assert_close(found, summed[0] / 24)
