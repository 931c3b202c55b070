"""A rewritten model is an ordinary model: saved, loaded, copied and pickled like any other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import text_calib, tiny_llama
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor
from toys import INT, changed, mlp, report_of, state, vectors
from transformers import LlamaForCausalLM, TorchAoConfig

from magr_fx import MagRConfig, magr_quantize, magr_transform
from magr_fx.passes.handover.target import describe


@pytest.mark.parametrize(
    "target",
    [
        IntxWeightOnlyConfig(weight_dtype=INT[3]),
        IntxWeightOnlyConfig(INT[2], mapping_type=MappingType.ASYMMETRIC),
        IntxWeightOnlyConfig(INT[4], granularity=PerGroup(16)),
    ],
    ids=["int3", "int2 asymmetric", "int4 groups"],
)
@pytest.mark.slow_unless("int3")
def test_quantizing_a_saved_model_while_loading_is_quantizing_it_in_memory(
    target: Any, tmp_path: Path
) -> None:
    model = magr_transform(tiny_llama(), text_calib(), target=target)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(target), dtype=torch.float32
    ).eval()
    # transformers leaves the head as it is.
    quantize_(model, target, lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")

    names = dict(model.named_parameters())
    quantized = [name for name, p in names.items() if isinstance(p, TorchAOBaseTensor)]
    assert len(quantized) == 14
    for name, parameter in names.items():
        other = loaded.get_parameter(name)
        assert type(other) is type(parameter), name
        both = (parameter, other)
        if name in quantized:
            both = (parameter.dequantize(), other.dequantize())
        assert torch.equal(*both), name
    with torch.no_grad():
        for ids in text_calib():
            assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_saved_without_quantization_it_loads_with_the_rewritten_weights(tmp_path: Path) -> None:
    model = magr_transform(tiny_llama(), text_calib())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert changed(loaded, state(model)) == []
    assert changed(tiny_llama(), state(model)) != []
    assert "magr" not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "target",
    [
        IntxWeightOnlyConfig(weight_dtype=INT[3]),
        IntxWeightOnlyConfig(INT[4], PerGroup(16), MappingType.ASYMMETRIC),
        Int8WeightOnlyConfig(set_inductor_config=False),
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        Int8DynamicActivationIntxWeightConfig(INT[3], PerGroup(16)),
    ],
    ids=describe,
)
def test_gptqs_codes_are_saved_and_loaded_as_torchaos_own(target: Any, tmp_path: Path) -> None:
    whole, (x, *_) = MagRConfig(zero_point="whole"), vectors()
    model = magr_quantize(mlp(), vectors(), target, whole, rounding="gptq")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    # Not weights_only, which refuses the enums in torchao's settings as Python 3.11.2 pickles them.
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    plain, filled, replaced = mlp(), mlp(), mlp()
    quantize_(plain, target)
    quantize_(filled, target)
    filled.load_state_dict(saved)
    replaced.load_state_dict(saved, assign=True)
    with torch.no_grad():
        assert torch.equal(filled(x), model(x))
        assert torch.equal(replaced(x), model(x))
        assert not torch.equal(plain(x), model(x))


def test_the_report_is_no_part_of_the_state_dict() -> None:
    model = magr_transform(mlp(), vectors())
    assert model.state_dict().keys() == mlp().state_dict().keys()
    assert mlp().load_state_dict(model.state_dict()).missing_keys == []


def test_copies_and_pickles_carry_the_report(tmp_path: Path) -> None:
    model = magr_transform(mlp(), vectors())
    torch.save(model, tmp_path / "model.pt")
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in others:
        assert changed(other, state(model)) == []
        assert report_of(other) is not report_of(model)
        assert str(report_of(other)) == str(report_of(model))


def test_training_and_moving_on_are_not_hindered() -> None:
    model = magr_transform(mlp(), vectors())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state(model)
    model.train()(vectors()[0]).square().sum().backward()
    optimizer.step()
    assert changed(model, before) == list(before)
    assert model.to(torch.float64)(vectors(dtype=torch.float64)[0]).dtype == torch.float64
