"""torchao's tensors in a directory of transformers: loaded, they are the same bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ZOO
from targets import ASYMMETRIC, SYMMETRIC, intx
from test_save_packed import logits, no_head
from tiny_models import text_calib, tiny_llama, tiny_mixtral, tiny_qwen2
from torch import Tensor
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    quantize_,
)
from toys import mlp, vectors
from transformers import AutoModelForCausalLM

from magr_fx import ConfigError, ModelError, magr_quantize, save_quantized
from magr_fx.passes.graphs.torchao_private import is_quantized

MIXED = FqnToConfig({
    "re:.*q_proj": intx(2, ASYMMETRIC, 16), "re:.*down_proj": intx(4, SYMMETRIC, None),
})  # fmt: skip
TARGETS: dict[str, Any] = {
    "free zero points": intx(2, ASYMMETRIC, 16),
    "rows": intx(3, ASYMMETRIC, None),
    "symmetric": intx(4, SYMMETRIC, 16),
    "int8": Int8WeightOnlyConfig(version=2),
    "dynamic": Int8DynamicActivationIntxWeightConfig(weight_granularity=PerGroup(16)),
}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_loaded_is_what_was_saved(name: str, rounding: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    model = magr_quantize(
        tiny_llama(), text_calib(), target, rounding=rounding, filter_fn=no_head, progress=False
    )
    assert_saved(model, target, tmp_path)


def plain(parameter: Any) -> Tensor:
    value: Tensor = parameter.data
    if is_quantized(value):
        value = value.dequantize()
    return value


def test_several_layouts(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(model, MIXED, filter_fn=None)
    assert_saved(model, MIXED, tmp_path)


def assert_saved(model: Any, target: Any, tmp_path: Path) -> None:
    before = logits(model)
    save_quantized(model, tmp_path / "saved", target)
    assert torch.equal(logits(model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), before)
    kinds = {n: type(p.data) for n, p in model.named_parameters()}
    assert {n: type(p.data) for n, p in loaded.named_parameters()} == kinds
    assert any(is_quantized(parameter) for parameter in loaded.parameters())


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_heads_experts_and_half_precision(
    make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, target = make().to(dtype), intx(4, ASYMMETRIC, 16)
    magr_quantize(model, text_calib(), target, filter_fn=no_head, progress=False)
    save_quantized(model, tmp_path, target)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    made = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        one, other = (
            p.data.dequantize() if is_quantized(p.data) else p.data for p in (parameter, made[name])
        )
        assert torch.equal(one, other), name


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model, target = tiny_llama(), intx(4, ASYMMETRIC, 16)
    magr_quantize(model, text_calib(), target, progress=False)
    compiled: Any = torch.compile(model)
    attributes, config = set(vars(model)), copy.deepcopy(model.config.to_dict())
    save_quantized(compiled, tmp_path, target)
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == config


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target = intx(4, ASYMMETRIC, 16)
    folder = tmp_path / "saved"
    with pytest.raises(ModelError, match="no weight is quantized"):
        save_quantized(tiny_llama(), folder, target)
    toy = magr_quantize(mlp(), vectors(), intx(4, ASYMMETRIC, None), progress=False)
    with pytest.raises(ModelError, match="is no model of transformers"):
        save_quantized(toy, folder, target)
    model = magr_quantize(tiny_llama(), text_calib(), target, progress=False)
    for family in ("GPT-2", "Mixtral"):
        made = magr_quantize(
            ZOO[family].make(), ZOO[family].calib(), target, progress=False,
            filter_fn=lambda _, name: name != "lm_head",
            calibrate_all_experts=family == "Mixtral",
        )  # fmt: skip
        with pytest.raises(ModelError, match=r"transformers could not load it.*filter_fn"):
            save_quantized(made, folder, target)
    wrong: Any = "int4"
    with pytest.raises(ConfigError, match="target must be the torchao config"):
        save_quantized(model, folder, wrong)
    assert not folder.exists()
