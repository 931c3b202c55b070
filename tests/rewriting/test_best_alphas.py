"""Which alphas are tried: asked of a sample of the rows, the same one whoever works on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from targets import ASYMMETRIC, SYMMETRIC, intx
from tiny_models import text_calib, tiny_llama
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

from magr_fx import CalibrationError, MagRConfig, magr_quantize
from magr_fx.passes.rewriting import quantized_weights
from magr_fx.rounding.search import best_alphas

ROWS, IN = 160, 32


def linear(rows: int = ROWS) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, rows, bias=False)).eval()


def inputs(scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(1)
    return [scale * torch.randn(100, IN) @ torch.randn(IN, IN) for _ in range(2)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, list[float]]]:
    """The samples that were asked, and their answers."""
    seen: list[tuple[Tensor, list[float]]] = []

    def noted(sample: Tensor, *args: Any, **options: Any) -> list[float]:
        found = best_alphas(sample, *args, **options)
        seen.append((sample, found))
        return found

    monkeypatch.setattr(quantized_weights, "best_alphas", noted)
    return seen


def tried(model: Any) -> set[str]:
    (site,) = model.magr_report.sites
    return {*site.quantization.alphas}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("zero_point", ["free", "whole"])
@pytest.mark.parametrize("group_size", [None, 16])
def test_only_what_the_sample_asks_for_is_tried(
    asked: list[Any], group_size: int | None, zero_point: str, rounding: str
) -> None:
    model = linear()
    weight = model[0].weight.detach().clone()
    config = MagRConfig(alpha="auto", zero_point=zero_point)
    target = intx(3, ASYMMETRIC, group_size)
    magr_quantize(model, inputs(), target, config, rounding=rounding, progress=False)
    ((sample, found),) = asked
    assert torch.equal(sample, weight[torch.arange(64) * ROWS // 64])
    assert tried(model) <= {"0", *(f"{alpha:g}" for alpha in found)}
    (site,) = model.magr_report.sites
    assert site.quantization.error < site.quantization.error_alone


@pytest.mark.parametrize("rows", [1, 64, 127])
def test_of_few_rows_all_alphas_are_tried(asked: list[Any], rows: int) -> None:
    magr_quantize(linear(rows), inputs(), intx(3, ASYMMETRIC, None), progress=False)
    assert asked == []


@pytest.mark.parametrize("target", [targets.ODD_SCALES[2], *targets.ONE_STEP[:1]], ids=str)
def test_rows_that_depend_on_each_other_are_not_sampled(asked: list[Any], target: Any) -> None:
    magr_quantize(linear(), inputs(), target, progress=False)
    assert asked == []


def test_a_sample_for_a_packed_target_is_whole_panels(asked: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(IN, 256, bias=False)).eval()
    magr_quantize(model, inputs(), PrototypeInt4WeightOnlyConfig(group_size=32), progress=False)
    assert [len(sample) for sample, _ in asked] == [64]


def test_a_given_alpha_is_taken(asked: list[Any]) -> None:
    model = magr_quantize(
        linear(), inputs(), intx(3, ASYMMETRIC, None), MagRConfig(alpha=0.01), progress=False
    )
    assert asked == []
    assert tried(model) == {"0.01"}


@pytest.mark.parametrize("mapping", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("options", [{}, {"damping": 0.0}, {"solver": "pgd"}], ids=str)
def test_inputs_that_are_all_0(
    options: dict[str, Any], group_size: int | None, rounding: str, mapping: Any
) -> None:
    config = MagRConfig(alpha="auto", **options)
    half = inputs()
    for x in half:
        x[:, :16] = 0
    for calib in (inputs(0.0), half):
        model = magr_quantize(
            linear(), calib, intx(3, mapping, group_size), config, rounding=rounding, progress=False
        )
        with torch.no_grad():
            assert model(inputs()[0]).isfinite().all()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_resumed_run_is_checked_too(rounding: str, tmp_path: Path) -> None:
    """The states were saved before the whole calibration had been seen."""
    calib = [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)} for ids in text_calib()]
    for _ in range(2):
        model = tiny_llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CalibrationError, match=r"no token of the .* nothing was changed"):
            magr_quantize(
                model,
                calib,
                intx(3, ASYMMETRIC, None),
                rounding=rounding,
                checkpoint_dir=tmp_path,
                progress=False,
            )
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Overflowing(nn.Module):
    """The third linear gets Inf where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(IN, IN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        x = second(first(x))
        made: Tensor = third(x.exp())
        return made


def test_what_is_found_after_a_saved_state_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magr_fx.passes.rewriting.checkpoint.BETWEEN_STATES", 0)
    calib = inputs()
    calib[1] *= 1e4
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"NaN or Inf in calibration batch 1"):
            magr_quantize(
                Overflowing().eval(),
                calib,
                intx(3, ASYMMETRIC, None),
                checkpoint_dir=tmp_path,
                progress=False,
            )
