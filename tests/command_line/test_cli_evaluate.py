"""magr-fx evaluate: two models by their names, beside compare on the same tokens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SMALL, done, run
from safetensors.torch import load_file, save_file
from tiny_directories import save_model, save_text, save_tokenizer
from tiny_models import tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from magr_fx import compare


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what magr-fx quantize made of it, and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "model", tiny_llama())
    save_text(folder / "text.txt")
    rest = ("--calib", folder / "text.txt", "--target", "int2-per-channel", *SMALL)
    done("quantize", folder / "model", folder / "int2", *rest)
    return folder


def evaluate(place: Path, *more: Any, quantized: str = "int2") -> Any:
    text = ("--text", place / "text.txt", "--tokens", "128", "--length", "16")
    return done("evaluate", place / quantized, "--against", place / "model", *text, *more)


def test_the_table_and_the_files_are_those_of_compare(place: Path, tmp_path: Path) -> None:
    shown = evaluate(place, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png").stdout
    original, quantized = (
        AutoModelForCausalLM.from_pretrained(place / name).eval() for name in ("model", "int2")
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    text = (place / "text.txt").read_text()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - 16, 8).long()
    wanted = compare(original, quantized, [torch.stack([ids[at : at + 16] for at in starts])]).text
    assert wanted is not None
    assert f"{wanted.divergence.value:.5f} ±" in shown
    assert "tokens predicted" in shown
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["text"]["divergence"]["value"] == pytest.approx(wanted.divergence.value, rel=1e-6)
    assert saved["text"]["tokens"] == 8 * 15
    assert (tmp_path / "a.png").stat().st_size > 1000
    sizes = [(place / name / "model.safetensors").stat().st_size for name in ("model", "int2")]
    assert [saved[key]["disk"] for key in ("size_original", "size")] == sizes
    assert sizes[1] < sizes[0]


def test_each_window_begins_as_the_tokenizer_begins_a_text(place: Path, tmp_path: Path) -> None:
    for name in ("model", "int2"):
        other = tmp_path / name
        other.mkdir()
        for file in (place / name).iterdir():
            (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    first = "w0"  # not the one that stands for what is unknown
    number = tokenizer["model"]["vocab"][first]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": first, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [number], "tokens": [first]}},
    }
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    options["bos_token"] = first
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(options))
    (tmp_path / "text.txt").write_bytes((place / "text.txt").read_bytes())
    evaluate(tmp_path, "--json", tmp_path / "begun.json")
    evaluate(place, "--json", tmp_path / "plain.json")
    begun, plain = (
        json.loads((tmp_path / f"{name}.json").read_text())["text"] for name in ("begun", "plain")
    )
    assert begun["tokens"] == plain["tokens"]  # windows of 16 with the first one, which is given
    assert begun["perplexity_original"] != plain["perplexity_original"]


def test_an_encoder(tmp_path: Path, place: Path) -> None:
    for name, amount in (("model", 0.0), ("other", 0.01)):
        encoder = tiny_bert()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(amount)
        encoder.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    (tmp_path / "text.txt").write_bytes((place / "text.txt").read_bytes())
    shown = evaluate(tmp_path, quantized="other").stdout
    assert re.search(r"relative error of the outputs +\d+\.\d+%", shown)


def refused(message: str, *command: Any) -> None:
    result = run("evaluate", *command)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert re.match(rf"magr-fx: error: .*{message}", lines[0]), lines[0]


def test_bad_input_is_told_in_one_line(place: Path, tmp_path: Path) -> None:
    model, text = place / "model", ("--text", place / "text.txt")
    small = ("--tokens", "128", "--length", "16")
    refused("are the same model", model, "--against", model, *text, *small)
    refused("is not a directory", place / "none" / "here", "--against", model, *text, *small)
    refused("is not a file; give a GGUF", place / "a.gguf", "--against", model, *text, *small)
    (tmp_path / "short.txt").write_text("so short")
    short = ("--text", tmp_path / "short.txt", *small)
    refused("has 2 tokens, but 128 are needed", place / "int2", "--against", model, *short)
    save_model(tmp_path / "wide", tiny_llama(vocab_size=96))
    wide = (tmp_path / "wide", "--against", model)
    refused("vocabularies of 64 and 96", *wide, *text, *small)
    (tmp_path / "odd").mkdir()
    refused(r"config\.json cannot be read", tmp_path / "odd", "--against", model, *text, *small)
    refused("cannot be read as text", place / "int2", "--against", model, "--text", tmp_path / "no")


def test_results_that_cannot_be_written_are_refused_first(place: Path, tmp_path: Path) -> None:
    models = (place / "int2", "--against", place / "model", "--text", place / "text.txt")
    refused("--json .* is not a directory", *models, "--json", tmp_path / "no" / "a.json")
    refused("--plot .* is not a directory", *models, "--plot", tmp_path / "no" / "a.png")
    refused(r"ends in \.png, \.pdf or \.svg", *models, "--plot", tmp_path / "a.txt")


def test_a_tensor_that_is_missing_is_not_made_up(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    text = ("--text", place / "text.txt", "--tokens", "128", "--length", "16")
    message = r"lacks model\.layers\.0\.mlp\.up_proj\.weight"
    refused(message, tmp_path / "damaged", "--against", place / "model", *text)


@pytest.mark.slow
def test_ranks_share_the_text(place: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "magr_fx"]
    text = ["--text", str(place / "text.txt"), "--tokens", "256", "--length", "16"]
    models = [str(place / "int2"), "--against", str(place / "model")]
    alone, together = (
        subprocess.run(
            [sys.executable, *how, "evaluate", *models, *text],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for how in (command[-2:], command)
    )
    assert "16 windows" in alone
    assert together == alone
