"""What the library does where the system is no Unix: simulated, by taking away what Unix has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_directories import save_model, save_text

# Everything else is imported before, with all that it may need itself.
WITHOUT = """
import ctypes, mmap, os, signal, sys
import accelerate, torch, torchao, transformers, click, huggingface_hub
import torch._inductor, torch.distributed.fsdp, transformers.models.llama.modeling_llama

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # as if it were not there
whole = ctypes.CDLL.__init__

def init(self, name, *given, **more):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    whole(self, name, *given, **more)

ctypes.CDLL.__init__ = init
for module, names in {
    mmap: ["MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_SHARED", "MADV_DONTNEED", "PROT_READ"],
    os: ["posix_fadvise", "posix_fallocate", "fork", "getuid", "statvfs", "sync", "nice"],
    signal: ["SIGKILL", "SIGHUP", "SIGALRM", "pthread_sigmask"],
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""

IN_MEMORY = (
    WITHOUT
    + """
import magr_fx, magr_fx.api, magr_fx.command_line.cli, magr_fx.command_line.plan_directory
import magr_fx.directories.convert_directory
from magr_fx.machine.memory import return_freed_memory_at_once
from toys import mlp, vectors
from targets import ASYMMETRIC, intx

return_freed_memory_at_once()
target = intx(3, ASYMMETRIC, None)
model = magr_fx.magr_transform(mlp(), vectors(), target=target, checkpoint_dir=sys.argv[1])
assert model.magr_report.rewritten
assert magr_fx.magr_quantize(mlp(), vectors(), target, rounding="gptq").magr_report.rewritten
try:
    magr_fx.magr_transform(accelerate.cpu_offload(mlp()), vectors())
except magr_fx.ModelError as error:
    print("offloaded:", error)
sys.platform = "win32"
try:
    magr_fx.magr_transform(mlp(), vectors(), spill_dir=sys.argv[1])
except magr_fx.ConfigError as error:
    print("spilled:", error)
"""
)

COMMAND = WITHOUT + "from magr_fx.__main__ import main\nmain()\n"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_python_works_on_models_in_memory(tmp_path: Path) -> None:
    ran = run(IN_MEMORY, tmp_path / "folder")
    assert ran.returncode == 0, ran.stderr
    offloaded, spilled = ran.stdout.splitlines()
    assert "offloaded: an offloaded or sharded model" in offloaded
    assert "load the whole model into memory" in offloaded
    assert "spilled: spill_dir needs a system" in spilled


@pytest.mark.slow
def test_the_command_line_says_that_it_cannot(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    text = save_text(tmp_path / "text.txt")
    options = ("--calib", text, "--target", "int3-per-channel", "--tokens", "64", "--length", "16")
    ran = run(COMMAND, "transform", tmp_path / "model", tmp_path / "out", *options)
    assert ran.returncode == 2, ran.stderr
    told = [line for line in ran.stderr.splitlines() if line.startswith("magr-fx")]
    assert len(told) == 1
    assert told[0].startswith("magr-fx: error: transform and quantize lock their working directory")
    assert not (tmp_path / "out").exists()
