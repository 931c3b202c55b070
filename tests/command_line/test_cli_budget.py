"""``magr-fx quantize --target auto``: within an average, or a size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SMALL, done, run, tensors
from tiny_directories import save_model, save_text
from transformers import AutoModelForCausalLM

from magr_fx.passes.graphs.torchao_private import is_quantized


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("budget")
    return save_model(folder / "model"), save_text(folder / "text.txt")


def test_an_average_of_bits(given: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = given
    out = tmp_path / "out"
    printed = done(
        *("quantize", source, out, "--calib", text, *SMALL, "--rounding", "gptq"),
        *("--target", "auto", "--bits", "6.8", "--group", "16"),
    ).output
    assert "bits on average over the quantized weights" in printed
    record = json.loads((out / "magr_report.json").read_text())
    assert 6.3 < record["bits"]["bits"] <= 6.8
    planned = {row["name"]: int(row["config"][3]) for row in record["bits"]["rows"]}
    assert len(planned) == 14
    assert len(set(planned.values())) > 1
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    made = {
        name: int(str(weight.data.target_dtype)[-1])
        for name, weight in model.named_parameters()
        if is_quantized(weight.data)
    }
    assert made == planned
    ids = torch.arange(8)[None]
    assert bool(model(ids).logits.isfinite().all())
    assert "the budget of bits" in done("report", out).output


@pytest.mark.slow
def test_a_size_in_packed_files(given: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = given
    options = ("--calib", text, *SMALL, "--target", "auto", "--group", "16")
    stored = sum(value.nbytes for value in tensors(source).values())
    linears = sum(v.numel() for n, v in tensors(source).items() if "proj" in n)
    size = stored - 4 * linears + int(linears * 5.5 / 8)
    out = tmp_path / "packed"
    done("quantize", source, out, *options, "--size", f"{size}B", "--format", "compressed-tensors")
    written = sum(value.nbytes for value in tensors(out).values())
    assert written <= 1.02 * size
    assert written > 0.9 * size
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert bool(loaded(torch.arange(8)[None]).logits.isfinite().all())
    bits = {name: value.shape for name, value in tensors(out).items() if "packed" in name}
    assert len(bits) == 14


@pytest.mark.parametrize(("options", "message"), [
    (("--target", "auto"), "needs either --bits or --size"),
    (("--target", "auto", "--bits", "3", "--size", "1MB"), "needs either --bits or --size"),
    (("--target", "int3-per-channel", "--bits", "3"), "work with --target auto only"),
    (("--target", "int3-per-channel", "--group", "16"), "work with --target auto only"),
    (("--target", "auto", "--size", "sixty"), "size must be bytes"),
    (("--target", "auto", "--bits", "0"), "is not"),
    (("--target", "auto", "--bits", "1", "--group", "16"), "the budget of 1.0 bits is too small"),
    (("--target", "auto", "--bits", "9", "--group", "7"), "which groups of 7 do not divide"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(
    options: tuple[str, ...], message: str, given: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = given
    result = run("quantize", source, tmp_path / "out", "--calib", text, *SMALL, *options)
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()
