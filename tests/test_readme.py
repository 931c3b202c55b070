"""The README's Python blocks run as they stand, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from magr_fx import MagRConfig

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
@pytest.mark.slow_unless(
    'quantize_(model, MagRConfig(step="conver', "print(solution.weight.abs().max(), solut"
)
def test_block_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # one block saves a model
    model = tiny_llama(intermediate_size=64)  # divisible by the groups of 32 of one block
    model.config.use_cache = False
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    if '"checkpoint"' in block:
        model.save_pretrained("checkpoint")
    names: dict[str, Any] = {"model": model, "calib": [token_ids(2, 8), token_ids(3, 8, seed=1)]}
    exec(compile(block, "README.md", "exec"), names)
    if "magr_fx import solve_magr" in block:
        assert "converged: 64 rows" in capsys.readouterr().out
    else:  # whatever way it was done, a weight of the model is another one now
        if '"checkpoint"' in block:
            model = AutoModelForCausalLM.from_pretrained("rewritten")
        chosen = model.model.layers[0].mlp.up_proj
        assert not torch.equal(chosen.weight.dequantize(), before)


def test_first_block_is_the_six_line_use() -> None:
    assert len(BLOCKS) >= 5
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 6


def test_options_are_those_of_the_config() -> None:
    table = README.partition("## Options")[2].partition("\n\n##")[0]
    listed = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert listed[:10] == list(MagRConfig.__dataclass_fields__)


def test_linked_files_exist() -> None:
    root = Path(__file__).resolve().parents[1]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (root / link).exists()] == []
