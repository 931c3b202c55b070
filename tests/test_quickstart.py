"""The examples run without a download: any_module, and the quickstart on a tiny local model."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]


def run_example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """An example as a user runs it: in a process of its own, from the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and a tokenizer of single bytes, saved as Hub models are."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_llama(vocab_size=len(alphabet)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_quickstart_compares_and_reports(local_model: Path, tmp_path: Path) -> None:
    options = ["--bits", "2", "4", "--tokens", "512", "--eval-tokens", "256", "--length", "32"]
    done = run_example(
        "examples/quickstart.py", "--model", local_model, "--out", tmp_path, *options
    )
    assert done.returncode == 0, done.stderr
    cells = r" +([\d,.]+) \| +([\d.]+) \| +([\d.]+)% \|"
    rows = re.findall(rf"^\| (\S.*?) +\|{cells}{cells}$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == [
        "original, float32",
        "int2, torchao alone",
        "int2, magr_quantize",
        "int4, torchao alone",
        "int4, magr_quantize",
    ]
    # Random weights know nothing: the original's perplexity is about that of a uniform guess.
    assert float(rows[0][1]) == pytest.approx(256, rel=0.2)
    assert rows[0][2:4] == ("0", "100")
    assert float(rows[1][3]) < 100  # a token changes at least, and the divergence is tiny
    assert (tmp_path / "quickstart.txt").read_text() in done.stdout
    report = json.loads((tmp_path / "int2.json").read_text())
    sites = [site for site in report["sites"] if site["outcome"] == "rewritten"]
    assert len(sites) == 14
    assert all(0 < site["quantization"]["error"] < 1 for site in sites)
    assert (tmp_path / "int4.png").stat().st_size > 10_000
    assert done.stdout.count("14 rewritten") == 2
    assert "Q4_1" not in done.stdout  # the caveat is about the default model alone


@pytest.mark.slow
def test_quickstart_spends_a_budget(local_model: Path, tmp_path: Path) -> None:
    options = ["--bits", "5.5", "--tokens", "512", "--eval-tokens", "256", "--length", "32"]
    done = run_example(
        "examples/quickstart.py", "--model", local_model, "--out", tmp_path, *options
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| 5\.5 bits, magr_quantize ", done.stdout, re.MULTILINE)
    plan = json.loads((tmp_path / "5.5-bits.json").read_text())["bits"]
    assert 5 < plan["bits"] <= 5.5
    assert len({row["config"] for row in plan["rows"]}) > 1
    assert (tmp_path / "5.5-bits-plan.png").stat().st_size > 10_000
    wrong = run_example("examples/quickstart.py", "--bits", "1.5")
    assert wrong.returncode == 2
    assert "1.5 is not from 2 to 8" in wrong.stderr


@pytest.mark.slow
def test_quickstart_says_what_is_missing(tmp_path: Path) -> None:
    done = run_example("examples/quickstart.py", "--model", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr


@pytest.mark.slow
def test_alpha_sensitivity_draws_what_each_row_chose(local_model: Path, tmp_path: Path) -> None:
    layer = "model.layers.1.mlp.down_proj"
    options = ["--layers", layer, "--tokens", "2048", "--length", "32"]
    done = run_example(
        "examples/alpha_sensitivity.py", "--model", local_model, "--out", tmp_path, *options
    )
    assert done.returncode == 0, done.stderr
    found = re.search(rf"{layer}: torchao alone ([\d.]+)%.*? ([\d.]+)% .* ([\d.]+)%", done.stdout)
    assert found is not None, done.stdout
    alone, single, chosen = map(float, found.groups())
    assert single <= alone
    assert chosen < alone
    assert (tmp_path / "alpha_sensitivity.png").stat().st_size > 10_000


@pytest.mark.slow
def test_any_module_rewrites_what_torchao_cannot_take() -> None:
    done = run_example("examples/any_module.py")
    assert done.returncode == 0, done.stderr
    assert "3 rewritten, 0 skipped" in done.stdout
    assert "2 rewritten, 1 skipped" in done.stdout
    errors = dict(re.findall(r"^  (\S.*?)  +([\d.]+)%$", done.stdout, re.MULTILINE))
    assert len(errors) == 3
    assert all(math.isfinite(float(error)) for error in errors.values())
    assert float(errors["magr_quantize"]) < float(errors["torchao alone"])
