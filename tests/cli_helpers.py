"""Run a command of magr-fx in this process, and look at the directories that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from magr_fx.cli import magr_fx

SMALL = ("--tokens", "128", "--length", "16")
INT3 = ("--target", "int3-per-channel")


def run(*arguments: Any) -> Result:
    """The result of ``magr-fx ARGUMENTS``; what is no error of the user is raised."""
    result = CliRunner().invoke(magr_fx, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: Any) -> Result:
    """The same of a command that succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the safetensors of a directory hold."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, but for the report, which has times in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("magr_report")
    }
