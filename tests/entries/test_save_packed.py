"""Packed files: every code bit for bit, the model as it was, and as few bytes as its bits."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import contents, done, tensors
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from model_zoo import ZOO
from targets import ASYMMETRIC, SYMMETRIC, intx
from tiny_directories import save_model, save_text
from tiny_models import text_calib, tiny_llama
from torch import Tensor, nn
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from toys import mlp, vectors
from transformers import AutoModelForCausalLM

from magr_fx import ConfigError, MagRConfig, ModelError, magr_quantize, save_packed
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.handover.to_compressed_tensors import check_format
from magr_fx.passes.handover.torchao_rounding import grid_of

WHOLE = MagRConfig(alpha="auto", zero_point="whole")


def no_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def quantized(target: Any, model: Any = None, **options: Any) -> Any:
    model = tiny_llama() if model is None else model
    options.setdefault("config", WHOLE)
    return magr_quantize(model, text_calib(), target, filter_fn=no_head, progress=False, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(text_calib()[0]).logits
    return found


def assert_the_files_hold(model: nn.Module, folder: Path) -> None:
    """Unpacked again, codes, scales and zero points are those of the model."""
    stored = tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    bits = group["weights"]["num_bits"]
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) and is_quantized(module.weight)):
            continue
        weight: Any = module.weight
        grid = grid_of(weight)
        shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
        assert shape == weight.shape
        codes = unpack_from_int32(stored[f"{name}.weight_packed"], bits, shape)
        assert torch.equal(codes, weight.qdata)
        assert torch.equal(stored[f"{name}.weight_scale"], grid.scale)
        if group["weights"]["symmetric"]:
            assert not grid.zero_point.any()
        else:
            zero = stored[f"{name}.weight_zero_point"]
            zero = unpack_from_int32(zero, bits, grid.scale.shape, packed_dim=0)
            assert torch.equal(zero, grid.zero_point.to(torch.int8))


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("mapping", [ASYMMETRIC, SYMMETRIC])
@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_loaded_is_what_was_saved(
    bits: int, mapping: Any, group_size: int | None, tmp_path: Path
) -> None:
    if bits == 1 and mapping == SYMMETRIC:
        pytest.skip("torchao's symmetric int1 makes NaN")
    model = quantized(intx(bits, mapping, group_size))
    before = logits(model)
    save_packed(model, tmp_path)
    assert_the_files_hold(model, tmp_path)
    assert torch.equal(logits(model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    # The same float32 weights go through the same products.
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_gptqs_codes_and_tied_heads(rounding: str, tied: bool, tmp_path: Path) -> None:
    model = quantized(
        intx(3, ASYMMETRIC, 16), tiny_llama(tie_word_embeddings=tied), rounding=rounding
    )
    save_packed(model, tmp_path)
    assert_the_files_hold(model, tmp_path)
    assert ("lm_head.weight" in tensors(tmp_path)) != tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_one_group_is_stored_like_those_with_several(tmp_path: Path) -> None:
    model = quantized(intx(3, ASYMMETRIC, 32), tiny_llama(intermediate_size=64))
    save_packed(model, tmp_path)
    assert_the_files_hold(model, tmp_path)  # one layout
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


def test_half_precision(tmp_path: Path) -> None:
    model = quantized(intx(4, ASYMMETRIC, 16), tiny_llama().to(torch.bfloat16))
    save_packed(model, tmp_path)
    assert_the_files_hold(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    # (code - zero)·scale is rounded once more in one of the two than in the other.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.05, atol=0.05)


def test_int8_weights_of_torchaos_other_tensor(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=no_head)
    save_packed(model, tmp_path)
    assert_the_files_hold(model, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 64])
def test_the_size_is_that_of_the_bits(bits: int, group_size: int | None, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tiny_llama(**wide).to(torch.bfloat16)
    quantize_(model, intx(bits, ASYMMETRIC, group_size), filter_fn=no_head)
    save_packed(model, tmp_path)
    wanted = 0.0
    for parameter in model.parameters():
        if not is_quantized(parameter):
            wanted += parameter.nbytes
            continue
        rows, columns = parameter.shape
        groups = columns // (group_size or columns)
        wanted += rows * columns * bits / 8 + rows * groups * (2 + bits / 8)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size == pytest.approx(wanted, rel=0.02)


def mixed(mapping: Any) -> Any:
    """The model with 4 bits in q, 8 in the other projections, and no others quantized."""
    model = tiny_llama()
    attention = {"q_proj": 4, "k_proj": 8, "v_proj": 8, "o_proj": 8}
    by_name: Any = {f"re:.*\\.{name}": intx(bits, mapping, 16) for name, bits in attention.items()}
    quantize_(model, FqnToConfig(by_name), filter_fn=None)
    return model


def test_mixed_bits_are_groups_of_their_own(tmp_path: Path) -> None:
    model = mixed(SYMMETRIC)
    save_packed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    found = {g["weights"]["num_bits"]: g["targets"] for g in config["config_groups"].values()}
    assert found.keys() == {4, 8}
    assert all("q_proj" in name for name in found[4])
    assert not any("q_proj" in name for name in found[8])
    assert "lm_head" in config["ignore"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


def test_who_cannot_load_mixed_zero_points_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "magr_fx"):
        save_packed(mixed(ASYMMETRIC), tmp_path)
    assert "transformers" in caplog.text
    assert "several layouts" in caplog.text


def test_one_bit_of_the_callers_model_stays(tmp_path: Path) -> None:
    model = quantized(intx(4, ASYMMETRIC, 16))
    config = model.config.to_dict()
    names = {name: id(value) for name, value in model.named_parameters()}
    save_packed(model, tmp_path / "a" / "b")
    assert model.config.to_dict() == config
    assert {name: id(value) for name, value in model.named_parameters()} == names
    first = contents(tmp_path / "a" / "b")
    save_packed(model, tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == first


def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    free = quantized(intx(2, ASYMMETRIC, 16), config=None)
    with pytest.raises(ModelError, match=r"are not whole.*zero_point=\"whole\""):
        save_packed(free, folder)
    with pytest.raises(ModelError, match="no weight is quantized"):
        save_packed(tiny_llama(), folder)
    with pytest.raises(ModelError, match="is no model of transformers"):
        save_packed(magr_quantize(mlp(), vectors(), intx(4, SYMMETRIC, 16)), folder)
    inputs = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]
    acts = tiny_llama()
    quantize_(acts, inputs, filter_fn=lambda m, n: n.endswith("gate_proj"))
    with pytest.raises(ModelError, match="quantizes its inputs too"):
        save_packed(acts, folder)
    gpt2 = ZOO["GPT-2"].make()
    magr_quantize(
        gpt2,
        text_calib(),
        intx(4, SYMMETRIC, 16),
        filter_fn=lambda _, name: name != "lm_head",
        progress=False,
    )
    with pytest.raises(ModelError, match="make linears of experts"):
        save_packed(gpt2, folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'magr-fx\[packed\]'"):
        save_packed(free, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "target", ["int2-group-16", "int3-per-channel", "int4-per-channel-symmetric"]
)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_command_writes_what_the_call_saves(target: str, rounding: str, tmp_path: Path) -> None:
    source, text = save_model(tmp_path / "model"), save_text(tmp_path / "text.txt")
    small = ("--tokens", "128", "--length", "16", "--rounding", rounding)
    options = ("--calib", text, "--target", target, *small)
    done("quantize", source, tmp_path / "packed", *options, "--format", "compressed-tensors")
    done("quantize", source, tmp_path / "bytes", *options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    sizes = {
        name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors"))
        for name in ("packed", "bytes")
    }
    assert sizes["packed"] < sizes["bytes"]
    stored = tensors(tmp_path / "packed")
    layers = {name for name in stored if name.endswith("weight_packed")}
    assert len(layers) == 14
    assert not any(name.startswith("lm_head") for name in layers)
    assert math.isfinite(float(logits(loaded).sum()))
    if target.endswith("symmetric"):  # then no zero points differ between the two
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "bytes")
        torch.testing.assert_close(logits(loaded), logits(again), rtol=1e-4, atol=1e-5)


def test_configs_that_the_format_cannot_hold() -> None:
    for fine in (intx(2, ASYMMETRIC, 16), Int8WeightOnlyConfig()):
        check_format(fine)
    dynamic = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]
    for other in (dynamic, None):
        with pytest.raises(ConfigError, match="pack-quantized can hold"):
            check_format(other)
