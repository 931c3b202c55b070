"""Run a command of magr-fx in this process, and look at the directories that it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from magr_fx.command_line.cli import magr_fx

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


class Place(NamedTuple):
    """What a command is given."""

    model: Path
    out: Path
    text: Path


def refused(place: Place, *more: Any, message: str, command: str = "transform") -> str:
    """The command fails as it should, and leaves everything as it was; what it says."""
    before = contents(place.model.parent)
    rest = () if command == "plan" else (place.out, "--calib", place.text)
    result = run(command, place.model, *rest, *INT3, *SMALL, *more)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.match(rf"magr-fx: error: .*{message}", lines[0]), lines[0]
    assert contents(place.model.parent) == before
    return lines[0]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file of JSON holds."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def shard_with(model: Path, name: str) -> Path:
    """The file of a directory's index that has this tensor."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / str(index["weight_map"][name])
