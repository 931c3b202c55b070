"""``--device``: which one is meant, and what torch does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import INT3, SMALL, contents, done, run
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from magr_fx.command_line.named_device import named_device
from magr_fx.errors import ConfigError
from magr_fx.passes.offloading.offloaded import offloading_hook, run_on


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_cuda_is_the_ranks_own(two_devices: None) -> None:
    assert named_device("cpu") == torch.device("cpu")
    assert named_device("auto") == named_device("cuda") == torch.device("cuda:0")
    assert named_device("cuda:1") == torch.device("cuda:1")
    assert named_device("auto", local_rank=1, several=True) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "rank", "several", "message"),
    [
        ("cuda:2", 0, False, r"2 CUDA devices here, and none is cuda:2; name another"),
        ("cuda", 2, True, "none is cuda:2; .*start no more ranks on a machine than it has"),
        ("cuda:1", 0, True, "each rank needs a device of its own; give --device cuda"),
        ("gpu", 0, False, "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("xpu", 0, False, "--device must be auto, cpu, cuda or cuda:N, got 'xpu'"),
    ],
)
def test_what_is_not_there_is_refused(
    name: str, rank: int, several: bool, message: str, two_devices: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        named_device(name, local_rank=rank, several=several)


def test_auto_is_the_cpu_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named_device("auto", local_rank=3, several=True) == torch.device("cpu")


@pytest.mark.parametrize("verb", ["transform", "quantize"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
def test_a_command_takes_the_cpu_and_refuses_what_is_not_there(verb: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    text = save_text(tmp_path / "text.txt")
    before = contents(tmp_path)
    command = (verb, tmp_path / "model", tmp_path / "out", "--calib", text, *INT3, *SMALL)
    result = run(*command, "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr.startswith("magr-fx: error: --device cuda: torch ")
    assert "finds no CUDA device here; give --device cpu" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert contents(tmp_path) == before
    done(*command, "--device", "cpu")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_all_hooks_and_buffers_go_to_the_device(tmp_path: Path) -> None:
    """Nothing is run on the meta device, which every machine has."""
    save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    hooks = [h for h in map(offloading_hook, model.modules()) if h is not None]
    assert len(hooks) > 7
    assert {torch.device(hook.execution_device) for hook in hooks} == {torch.device("cpu")}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    run_on(model, torch.device("meta"))
    assert {hook.execution_device for hook in hooks} == {torch.device("meta")}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
