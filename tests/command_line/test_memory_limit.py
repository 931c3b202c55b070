"""A checkpoint several times as large as the memory that there is.

The limit is a control group's: ``ulimit -v`` limits addresses, and here every weight of the model
has its address from the start, while memory is behind the addresses of one block only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SMALL
from safetensors.torch import save_file
from tiny_directories import largest_layer, save_text, save_tokenizer
from tiny_models import VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM

from magr_fx.machine.safetensors_header import StoredTensor, read_header
from magr_fx.model_files.model_directory import read_directory

MIB = 2**20
LIMIT = 768 * MIB
LAYERS = 22
GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
LIMITS = "memory.limit_in_bytes", "memory.max"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]


def large_model(folder: Path) -> Path:
    """A Llama in float32, a file for each layer, without ever having it in memory."""
    config = LlamaConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    numbers = torch.randn(2**23, generator=torch.Generator().manual_seed(0)) * 0.02
    weight_map: dict[str, str] = {}
    for layer in [*(f"layers.{at}." for at in range(LAYERS)), ""]:
        names = [name for name in shapes if layer in name and name not in weight_map]
        tensors = {n: numbers[: shapes[n].numel()].view(shapes[n]).clone() for n in names}
        file = f"model-{layer.replace('.', '') or 'rest'}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    save_tokenizer(folder)
    return folder


@contextlib.contextmanager
def limited() -> Iterator[Path | None]:
    """A control group with this limit, of version 1 or 2; None where none can be made."""
    for folder, limit in zip(GROUPS, LIMITS, strict=True):
        group = folder / f"magr-fx-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(LIMIT))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def run_in(group: Path | None, code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in its own process, which is in the group from its first step on."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text("0")

    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        preexec_fn=enter,
        capture_output=True,
        text=True,
        check=False,
    )


# The most anonymous memory, which nothing but the process holds, looked at all the time.
SCRIPT = """
import sys, threading, time
peak = 0
def look():
    global peak
    while True:
        with open("/proc/self/status") as lines:
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak = max(peak, now * 1024)
        time.sleep(0.005)
threading.Thread(target=look, daemon=True).start()
from magr_fx.__main__ import main
try:
    main()
finally:
    print("peak", peak)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_model(tmp_path_factory.mktemp("large") / "model")


@pytest.mark.parametrize(
    "command",
    [
        ("transform", "--solver", "pgd", "--max-steps", "3"),
        ("quantize", "--target", "int8-per-channel", "--rounding", "gptq", "--alpha", "1e-3"),
    ],
    ids=lambda command: command[0],
)
def test_a_model_several_times_the_memory(
    command: tuple[str, ...], large: Path, tmp_path: Path
) -> None:
    text = save_text(tmp_path / "text.txt")
    stored = read_directory(large)
    size, block = sum(tensor.nbytes for tensor in stored.values()), largest_layer(stored)
    assert size > 3 * LIMIT
    assert block + 2**30 > LIMIT
    # One matrix of the first layer and of the last: what is between has to be run all the same.
    left = [
        "*.mlp.*",
        "*.[qkv]_proj",
        "model.layers.[1-9].*",
        "model.layers.1[0-9].*",
        "model.layers.20.*",
    ]
    skip = [part for pattern in left for part in ("--skip", pattern)]
    verb, *options = command
    out = tmp_path / "out"
    arguments = [verb, large, out, "--calib", text, *SMALL, *skip, *options]
    with limited() as group:
        if group is not None:  # the limit is one
            hungry = run_in(group, f"bytearray({LIMIT}).find(1)\nprint('alive')")
            assert (hungry.returncode, hungry.stdout) == (-9, "")
        ran = run_in(group, SCRIPT, *arguments, "--spill", tmp_path / "spilled")
    assert ran.returncode == 0, ran.stderr[-2000:]
    peak = int(ran.stdout.rsplit("peak", 1)[1])
    assert peak < min(LIMIT, block + 2**30)
    before, after = (
        stored,
        {n: t for f in out.glob("*.safetensors") for n, t in read_header(f).items()},
    )
    changed = {
        name for name in before if name not in after or bits(before, name) != bits(after, name)
    }
    sites = {f"model.layers.{at}.self_attn.o_proj.weight" for at in (0, LAYERS - 1)}
    assert changed == sites
    made = {name.replace("_weight_qdata", "weight") for name in after if "_weight_qdata" in name}
    assert made == (sites if verb == "quantize" else set())
    if group is None:
        pytest.skip("no control group can be made here; the peak was measured without one")


def bits(tensors: dict[str, StoredTensor], name: str) -> bytes:
    with tensors[name].file.open("rb") as file:
        file.seek(tensors[name].start)
        return file.read(tensors[name].nbytes)
