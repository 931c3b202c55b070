"""Zero points that are not whole: where they are the default, what they gain, what holds them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import ASYMMETRIC, PACKED, SYMMETRIC, intx
from tiny_models import text_calib, tiny_llama
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    PerAxis,
    PerGroup,
)
from toys import INT, changed, mlp, report_of, state, vectors
from transformers import LlamaForCausalLM

from magr_fx import ConfigError, MagRConfig, MagRPass, magr_quantize, magr_transform

INT2 = intx(2, ASYMMETRIC, None)
DYNAMIC = Int8DynamicActivationIntxWeightConfig(INT[3], PerGroup(16), ASYMMETRIC)
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "gptq"])
FREE, WHOLE = MagRConfig(zero_point="free"), MagRConfig(zero_point="whole")


def zero_points(model: nn.Module) -> list[Tensor]:
    return [p.zero_point for p in model.parameters() if hasattr(p, "zero_point")]


def is_free(model: nn.Module) -> bool:
    return any(bool((z != z.round()).any()) for z in zero_points(model))


@ROUNDINGS
@pytest.mark.parametrize(
    ("target", "free"),
    [
        (INT2, True),
        (intx(4, ASYMMETRIC, 16), True),
        (DYNAMIC, True),
        (intx(8, ASYMMETRIC, None), False),
        (intx(2, SYMMETRIC, None), False),
        (Int8DynamicActivationIntxWeightConfig(INT[3], PerAxis(0)), False),
        (Int8WeightOnlyConfig(set_inductor_config=False), False),
    ],
)
def test_they_are_free_where_the_tensor_holds_them(target: Any, free: bool, rounding: str) -> None:
    model = magr_quantize(mlp(), vectors(), target, rounding=rounding)
    assert is_free(model) == free
    report = report_of(model)
    assert report.config.zero_point == ("free" if free else "whole")
    found = [site.quantization.free for site in report.rewritten if site.quantization]
    assert len(found) == 2
    assert all(share > 0.5 if free else share == 0 for share in found)
    assert ("zero points that are no whole numbers: " in report.totals()) == free
    assert not is_free(magr_quantize(mlp(), vectors(), target, WHOLE, rounding=rounding))


@ROUNDINGS
def test_asked_for_they_are_free_on_a_symmetric_config_too(rounding: str) -> None:
    assert is_free(magr_quantize(mlp(), vectors(), intx(2, SYMMETRIC, 16), FREE, rounding=rounding))


@ROUNDINGS
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group_size", [None, 16])
def test_they_lower_the_output_error(bits: int, group_size: int | None, rounding: str) -> None:
    target = intx(bits, ASYMMETRIC, group_size)
    options: dict[str, Any] = {"holdout": 0.0, "propagate": False}
    errors = []
    for config in (FREE, WHOLE):
        model = magr_quantize(
            mlp(), vectors(200, 200), target, config, rounding=rounding, **options
        )
        found = [site.quantization for site in report_of(model).rewritten]
        errors.append(sum(one.error**2 for one in found if one))
        # Damping lets the gram itself say a little more than what torchao alone has.
        assert all(one.error <= 1.05 * one.error_alone for one in found if one)
    assert errors[0] < 0.95 * errors[1]


@ROUNDINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_judged_is_what_the_model_computes(rounding: str, dtype: torch.dtype) -> None:
    """In half precision too: scales and zero points are stored in it before codes are chosen."""
    model: Any = mlp(dtype=dtype)
    before = model[0].weight.detach().clone()
    calib = vectors(dtype=dtype)
    options: dict[str, Any] = {"rounding": rounding, "propagate": False, "holdout": 0.0}
    magr_quantize(model, calib, INT2, **options)
    found = report_of(model).rewritten[0].quantization
    assert found is not None
    rows, tensor = torch.cat(calib).double(), model[0].weight
    assert tensor.scale.dtype == tensor.zero_point.dtype == dtype
    away = (rows @ (tensor.dequantize().double() - before.double()).T).norm()
    assert found.error == pytest.approx(float(away / (rows @ before.double().T).norm()), rel=1e-3)
    (x, *_) = calib
    with torch.no_grad():
        plain = nn.functional.linear(x, tensor.dequantize(), model[0].bias)
        assert torch.equal(model[0](x), plain)


@pytest.mark.parametrize("target", [Int8WeightOnlyConfig(set_inductor_config=False), PACKED])
def test_a_target_that_cannot_hold_them_is_refused(target: Any) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(ConfigError, match=r'"free" does not work with .*IntxWeightOnly'):
        magr_quantize(model, vectors(), target, FREE)
    assert changed(model, before) == []


def test_a_transform_cannot_have_them() -> None:
    model = mlp()
    for run in (
        lambda: magr_transform(model, vectors(), FREE),
        lambda: magr_transform(model, vectors(), FREE, target=INT2),
        lambda: MagRPass(vectors(), FREE),
    ):
        with pytest.raises(ConfigError, match="belongs to magr_quantize"):
            run()


@pytest.mark.parametrize("word", ["half", "", 1, True])
def test_other_words_are_refused(word: Any) -> None:
    with pytest.raises(ConfigError, match="zero_point must be one of free, whole"):
        MagRConfig(zero_point=word)


def test_the_published_recipe_keeps_whole_ones() -> None:
    model = magr_quantize(mlp(), vectors(), INT2, MagRConfig.published())
    assert not is_free(model)


def test_a_model_with_them_is_saved_copied_exported_and_compiled(tmp_path: Path) -> None:
    (x, *_) = vectors()
    model = magr_quantize(mlp(), vectors(), INT2, rounding="gptq")
    assert is_free(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = mlp()
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    loaded.load_state_dict(saved, assign=True)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        for other in (
            loaded,
            copy.deepcopy(model),
            exported,
            torch.compile(model, backend="eager"),
        ):
            assert torch.equal(other(x), model(x))


@pytest.mark.slow
@ROUNDINGS
def test_transformers_saves_and_loads_them(rounding: str, tmp_path: Path) -> None:
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    target = intx(3, ASYMMETRIC, 16)
    model = magr_quantize(
        tiny_llama(),
        text_calib(),
        target,
        rounding=rounding,
        filter_fn=lambda module, name: "head" not in name,
    )
    model.config.quantization_config = TorchAoConfig(target)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert is_free(loaded)
    with torch.no_grad():
        for ids in text_calib():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
