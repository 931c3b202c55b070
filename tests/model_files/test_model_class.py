"""Models of other kinds than causal language models, from directory to directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, contents, done, run, tensors
from tiny_directories import save_model, save_text, save_tokenizer
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, LlamaForCausalLM

from magr_fx import magr_quantize, magr_transform
from magr_fx.command_line.named_targets import named_target
from magr_fx.model_files.calibration_text import text_batches
from magr_fx.model_files.model_class import model_class
from magr_fx.passes.graphs.torchao_private import is_quantized

TARGET = named_target("int3-per-channel")


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Path, Path]:
    tiny_bert().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model", save_text(tmp_path / "text.txt")


def batches(folder: Path, text: Path) -> list[torch.Tensor]:
    return text_batches(AutoTokenizer.from_pretrained(folder), text, tokens=128, length=16)


def test_the_configuration_says_which_class() -> None:
    assert model_class({"architectures": ["BertModel"]}) is BertModel
    assert model_class({"architectures": ["LlamaForCausalLM"]}) is LlamaForCausalLM
    others: list[dict[str, Any]] = [{}, {"architectures": []}, {"architectures": ["Trainer"]}]
    others.append({"architectures": ["BertModel"], "model_type": "llama"})
    for other in others:
        assert model_class(other) is AutoModelForCausalLM


@pytest.mark.slow
def test_an_encoder_is_transformed(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = encoder
    done("transform", source, tmp_path / "out", "--calib", text, *INT3, *SMALL)
    wanted: Any = BertModel.from_pretrained(source).eval()
    report_names = {name for name, a in tensors(source).items()
                    if not torch.equal(a, tensors(tmp_path / "out")[name])}  # fmt: skip

    def chosen(module: nn.Module, name: str) -> bool:
        return f"{name}.weight" in report_names

    magr_transform(wanted, batches(source, text), target=TARGET, filter_fn=chosen)
    ours = tensors(tmp_path / "out")
    assert ours.keys() == tensors(source).keys()
    state = wanted.state_dict()
    assert all(torch.equal(ours[name], state[name]) for name in ours)
    assert len(report_names) >= 12  # of two layers, six each


@pytest.mark.slow
def test_an_encoder_is_quantized_and_planned(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = encoder
    planned = done("plan", source, *INT3, *SMALL).output
    done("quantize", source, tmp_path / "out", "--calib", text, *INT3, *SMALL)
    loaded: Any = BertModel.from_pretrained(tmp_path / "out").eval()
    names = {name for name, p in loaded.named_parameters() if is_quantized(p)}
    assert len(names) >= 12
    assert f"rewritten: {len(names)} sites" in planned

    def chosen(module: nn.Module, name: str) -> bool:
        return f"{name}.weight" in names

    wanted: Any = BertModel.from_pretrained(source).eval()
    magr_quantize(wanted, batches(source, text), TARGET, filter_fn=chosen)
    with torch.no_grad():
        for ids in batches(source, text):
            assert torch.equal(loaded(ids)[0], wanted(ids)[0])


@pytest.mark.parametrize("command", ["plan", "transform"])
def test_what_takes_two_texts_is_refused(command: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_t5())
    text = save_text(tmp_path / "text.txt")
    before = contents(tmp_path)
    more = () if command == "plan" else (tmp_path / "out", "--calib", text)
    result = run(command, tmp_path / "model", *more, *INT3, *SMALL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "T5ForConditionalGeneration is an encoder with a decoder" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_class_that_transformers_lacks_is_a_causal_lm(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    config = source / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "OwnLlama"))
    text = save_text(tmp_path / "text.txt")
    done("transform", source, tmp_path / "out", "--calib", text, *INT3, *SMALL)
    assert "OwnLlama" in (tmp_path / "out" / "config.json").read_text()
