"""The command line: directories in, directories out, and the same weights as in memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, contents, done, run, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama, tiny_mixtral
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    TorchAoConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.quantizers import AutoHfQuantizer

from magr_fx import MagRConfig, magr_quantize, magr_transform
from magr_fx.command_line.named_targets import named_target
from magr_fx.directories.convert_directory import report_of
from magr_fx.directories.skipped import rewritable
from magr_fx.model_files.calibration_text import text_batches
from magr_fx.passes.graphs.torchao_private import is_quantized

TARGET = named_target("int3-per-channel")
PLAIN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def no_head(module: nn.Module, name: str) -> bool:
    return name != "lm_head"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def batches(folder: Path, text: Path) -> list[torch.Tensor]:
    return text_batches(AutoTokenizer.from_pretrained(folder), text, tokens=128, length=16)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("tied", "dtype", "shards"),
    [(False, torch.float32, "40KB"), (True, torch.bfloat16, "5GB")],
    ids=["in shards", "tied, bfloat16"],
)
def test_transform_is_magr_transform(
    tied: bool, dtype: torch.dtype, shards: str, tmp_path: Path, text: Path
) -> None:
    made = tiny_llama(tie_word_embeddings=tied).to(dtype)
    source = save_model(tmp_path / "model", made, max_shard_size=shards)
    (source / "LICENSE").write_text("of the model")
    before = contents(source)
    result = done("transform", source, tmp_path / "out", "--calib", text, *INT3, *SMALL)
    assert "14 rewritten" in result.output
    assert contents(source) == before
    assert not (tmp_path / "out.unfinished").exists()

    wanted = load(source)
    magr_transform(wanted, batches(source, text), target=TARGET, filter_fn=no_head)
    ours, original = tensors(tmp_path / "out"), tensors(source)
    assert ours.keys() == original.keys()
    state = wanted.state_dict()
    assert all(torch.equal(ours[name], state[name]) for name in ours)
    assert sum(not torch.equal(ours[name], original[name]) for name in ours) == 14
    assert {t.dtype for t in ours.values()} == {dtype}
    out = contents(tmp_path / "out")
    assert out.keys() == before.keys()  # the same shards too
    same = [name for name in before if not name.endswith(".safetensors")]
    assert {*PLAIN, "LICENSE"} <= set(same)
    assert all(out[name] == before[name] for name in same)

    loaded = load(tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=TorchAoConfig(TARGET), dtype="auto"
    )
    assert sum(is_quantized(p) for p in quantized.parameters()) == 14


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path, text: Path) -> None:
    """transformers loads all of a model in one dtype; what is not rewritten is not touched."""
    source = save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1).to(torch.bfloat16))
    stored = load_file(source / "model.safetensors")
    stored["model.norm.weight"] = torch.rand(32, dtype=torch.float32)
    stored["model.layers.0.mlp.up_proj.weight"] = torch.randn(48, 32).half()
    save_file(stored, source / "model.safetensors", {"format": "pt", "made by": "a test"})
    command = ("transform", source, tmp_path / "out", "--calib", text, *SMALL)
    done(*command, "--alpha", "0.01", "--skip", "*.gate_proj")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(ours["model.norm.weight"], stored["model.norm.weight"])
    for name in ("up_proj", "gate_proj"):
        key = f"model.layers.0.mlp.{name}.weight"
        assert ours[key].dtype == stored[key].dtype
        assert torch.equal(ours[key], stored[key]) == (name == "gate_proj")
    assert b"made by" in (tmp_path / "out" / "model.safetensors").read_bytes()[:9000]


def test_fused_experts_are_saved_as_they_were(tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "model", tiny_mixtral(num_hidden_layers=1))
    assert any(".experts.3." in name for name in tensors(source))
    done("transform", source, tmp_path / "out", "--calib", text, *SMALL, "--alpha", "0.01")
    wanted = load(source)
    magr_transform(wanted, batches(source, text), MagRConfig(alpha=0.01), filter_fn=no_head)
    assert tensors(tmp_path / "out").keys() == tensors(source).keys()
    ours = load(tmp_path / "out").state_dict()
    state = wanted.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in state.items())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.slow
def test_quantize_is_magr_quantize(rounding: str, tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "model", tiny_llama())
    skipped = ("--skip", "*.0.mlp.down_proj") if rounding == "gptq" else ()
    out = tmp_path / "out"
    command = ("quantize", source, out, "--calib", text, *INT3, *SMALL, *skipped)
    result = done(*command, "--rounding", rounding)
    wanted = load(source)

    def chosen(module: nn.Module, name: str) -> bool:
        return name != "lm_head" and not (skipped and name == "model.layers.0.mlp.down_proj")

    magr_quantize(wanted, batches(source, text), TARGET, rounding=rounding, filter_fn=chosen)
    loaded = load(out)
    names = {name for name, p in wanted.named_parameters() if is_quantized(p)}
    assert {name for name, p in loaded.named_parameters() if is_quantized(p)} == names
    assert len(names) == 14 - bool(skipped)
    assert f"{len(names)} quantized by torchao: IntxWeightOnlyConfig" in result.output
    with torch.no_grad():
        for ids in batches(source, text):
            assert torch.equal(loaded(ids).logits, wanted(ids).logits)
    kept, before = contents(out), contents(source)
    assert all(kept[name] == before[name] for name in PLAIN[1:])
    config = json.loads(kept["config.json"])
    assert config["quantization_config"]["quant_method"] == "torchao"
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    assert rest == json.loads(before["config.json"])


@pytest.mark.slow
def test_a_quantized_directory_is_what_transformers_saves(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors and the same metadata, but for where they are and what is said of others."""
    monkeypatch.setattr("magr_fx.directories.write_quantized.SHARD", 20_000)
    source = save_model(tmp_path / "model", tiny_llama(tie_word_embeddings=True))
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    done("quantize", source, out, "--calib", text, *INT3, *SMALL, "--skip", "*.0.*.o_proj")
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == {
        name: file.name for file in files for name in load_file(file)
    }
    model = load(source)
    chosen = rewritable(model, ("*.0.*.o_proj",), linears_only=True)
    magr_quantize(model, batches(source, text), TARGET, filter_fn=chosen)
    model.config.quantization_config = TorchAoConfig(TARGET)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)
    model.save_pretrained(wanted)
    ours, theirs = tensors(out), tensors(wanted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(name.endswith("_weight_qdata") for name in ours) == 13
    described = metadata(wanted / "model.safetensors")
    for file in files:  # each says all: which other readers go by
        own = metadata(file)
        names = json.loads(own.pop("tensor_names"))
        assert own.pop("format") == "pt"
        assert sorted(names) == sorted(own)
        assert own.items() <= described.items()
        assert {n for n, what in described.items() if "Intx" in what} <= own.keys()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.slow_unless("nearest")
def test_what_torchao_cannot_run_is_left_alone(
    rounding: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in memory: a weight that no F.linear reads as a whole keeps its values, and is told of."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        halves = [functional.linear(h, rows) for rows in self.down_proj.weight.split(16)]
        return torch.cat(halves, -1)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    source = save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    out, name = tmp_path / "out", "model.layers.0.mlp.down_proj"
    done("quantize", source, out, "--calib", text, *INT3, *SMALL, "--rounding", rounding)
    loaded, original = load(out), load(source)
    kept = loaded.get_submodule(name).weight
    assert not is_quantized(kept)
    assert torch.equal(kept, original.get_submodule(name).weight)
    assert sum(is_quantized(p) for p in loaded.parameters()) == 6
    assert bool(loaded(batches(source, text)[0]).logits.isfinite().all())
    skipped = {site.name for site in report_of(out).skipped}
    assert {f"{name}.weight[0:16]", f"{name}.weight[16:32]"} <= skipped


def two_files(source: Path) -> None:
    """A whole file and shards of it: transformers reads the file, whatever the index says."""
    stored = load_file(source / "model.safetensors")
    save_file({name: value + 1 for name, value in stored.items()}, source / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(stored, "model-1.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("verb", ["transform", "quantize"])
@pytest.mark.slow_unless("quantize")
def test_the_models_own_files_are_left_alone(verb: str, tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    two_files(source)
    before, out = contents(source), tmp_path / "out"
    done(verb, source, out, "--calib", text, *INT3, *SMALL)
    assert contents(source) == before
    wanted = load(source)
    change = magr_transform if verb == "transform" else magr_quantize
    change(wanted, batches(source, text), target=TARGET, filter_fn=no_head)
    ids = batches(source, text)[0]
    assert torch.equal(load(out)(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("verb", [("transform",), ("quantize", "--rounding", "gptq")])
@pytest.mark.slow
def test_models_that_read_a_childs_weights_themselves(
    verb: tuple[str, ...], tmp_path: Path, text: Path
) -> None:
    """Mamba's mixers do, and then ask accelerate to fetch them."""
    config = MambaConfig(
        vocab_size=100,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=1,
        intermediate_size=64,
        time_step_rank=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MambaForCausalLM(config)
    source, out = save_model(tmp_path / "model", made), tmp_path / "out"
    done(*verb, source, out, "--calib", text, "--target", "int4-per-channel", *SMALL)
    assert any("in_proj" in site.name for site in report_of(out).rewritten)
    assert bool(load(out)(batches(source, text)[0]).logits.isfinite().all())


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def test_report_is_that_of_the_run(tmp_path: Path, text: Path) -> None:
    source, log = save_model(tmp_path / "model"), tmp_path / "log.jsonl"
    out = tmp_path / "out"
    result = done(
        "transform", source, out, "--calib", text, *INT3, *SMALL, "--log-json", log, "--progress"
    )
    table = done("report", out).output
    totals = result.stdout.splitlines()[:-1]
    assert len(totals) > 5
    assert totals == table.splitlines()[-len(totals) :]
    rows = re.findall(r"^(model\.layers\.\d\S+) +\d+x\d+ ", table, re.MULTILINE)
    assert len(rows) == 14
    assert "rows by alpha" in table
    assert "left out by filter_fn" in table

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [site["name"] for line in lines for site in line["sites"]] == rows
    assert [line["block"] for line in lines] == ["model.layers.0"] * 4 + ["model.layers.1"] * 4
    for line in lines:
        assert 0 < line["number"] <= line["of"]
        assert line["seconds"] > 0
        assert line["memory_mib"] > 100
        assert all(0 < site["output_error"] < 1 for site in line["sites"])
    # Of the bar, on a terminal that CliRunner does not have: blocks, time left, memory.
    assert re.search(r"magr: +\d+%.*\d+/\d+ \[\d+:\d+<.*peak \d+ MiB\]", result.stderr)


# The processes around it.


@pytest.mark.slow
def test_python_m_says_what_there_is() -> None:
    command = [sys.executable, "-m", "magr_fx", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("transform", "quantize", "report", "plan"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE)


def test_without_click_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from magr_fx.__main__ import main

    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "magr-fx: error: the command line needs click: pip install 'magr-fx[cli]'\n"
    )


def test_the_entry_point_is_packaged() -> None:
    settings = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'magr-fx = "magr_fx.__main__:main"' in settings
    assert 'cli = ["accelerate>=' in settings


def test_a_wrong_command_is_a_usage_error() -> None:
    assert run("transmogrify").exit_code == 2
    assert run("transform", "model").exit_code == 2
