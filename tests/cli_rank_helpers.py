"""Run a command of magr-fx on several ranks, each a process, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank_helpers import forked, wait_for
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# All that a command imports is there when a rank is forked.
_IMPORTED = (
    "magr_fx.command_line.cli",
    "magr_fx.directories.convert_directory",
    "transformers.models.llama.modeling_llama",
)


@dataclass(frozen=True)
class Ended:
    """What a rank wrote, and its exit code: 0, or the signal that ended it as -number."""

    code: int | None
    stdout: str
    stderr: str


def start_ranks(
    world: int,
    arguments: Sequence[Any],
    folder: Path,
    *,
    before: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """``magr-fx ARGUMENTS`` on every rank; the processes, which have a store to meet at.

    Args:
        world: how many ranks.
        arguments: of the command.
        folder: to leave in what they write.
        before: is called on each rank before the command; of a module that can be imported.
        environment: more of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has it
    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **(environment or {}),
    }
    given = [str(argument) for argument in arguments]
    processes = []
    for rank in range(world):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = forked(__name__, *_IMPORTED)(target=_rank, args=(own, given, folder, before))
        process.start()
        process.store = store  # for as long as it lives
        processes.append(process)
    return processes


def end_of(processes: list[Any], folder: Path, deadline: float = 60.0) -> list[Ended]:
    """How each rank ended; one that lasts longer than this many seconds is killed."""
    wait_for(processes, deadline)
    return [
        Ended(process.exitcode, *((folder / f"{n}-{rank}").read_text() for n in ("out", "err")))
        for rank, process in enumerate(processes)
    ]


def on_cli_ranks(world: int, arguments: Sequence[Any], folder: Path, **more: Any) -> list[Ended]:
    """Both at once."""
    return end_of(start_ranks(world, arguments, folder, **more), folder)


def _rank(
    environment: dict[str, str],
    arguments: list[str],
    folder: Path,
    before: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
        os.ftruncate(file, 0)
        os.dup2(file, number)
    # The fork's own streams were those of another process.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if before is not None:
        before()
    from magr_fx.command_line.cli import magr_fx

    magr_fx(arguments, prog_name="magr-fx")
