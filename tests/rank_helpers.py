"""Run a function on several ranks of torch.distributed: gloo on the CPU, each rank a process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

# Ranks are forked from a process that has imported everything and done nothing else.
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """How a rank ended: what it returned, or what it raised; its exit code, 0 if it did either."""

    value: Any
    error: Exception | None
    code: int | None


def forked(*modules: str) -> Any:
    """Makes processes that are forked off one which has imported these, as of the first call."""
    _CONTEXT.set_forkserver_preload(list(modules))
    with pytest.MonkeyPatch.context() as patched:  # the forkserver of Python 3.11 ignores sys.path
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        ensure_running()
    return _CONTEXT.Process


def wait_for(processes: list[Any], deadline: float) -> None:
    """Wait until all have ended; one that lasts longer than this many seconds is killed."""
    until = time.monotonic() + deadline
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def on_ranks(
    world: int,
    function: Callable[..., Any],
    folder: Path,
    *args: Any,
    patience: float = 60.0,
    deadline: float = 240.0,
    backend: str = "gloo",
) -> list[Ended]:
    """``function(*args)`` on every rank, with the default group initialised.

    Args:
        world: how many ranks.
        function: of a module that can be imported.
        folder: to meet in, and to leave results in.
        args: picklable.
        patience: seconds that a collective may take.
        deadline: seconds until the ranks are killed.
        backend: of torch.distributed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process_of = forked("conftest", function.__module__)
    processes = [
        process_of(target=_rank, args=(rank, world, backend, patience, folder, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    wait_for(processes, deadline)
    ended = []
    for rank, process in enumerate(processes):
        path = folder / f"rank-{rank}.pt"
        value, error = torch.load(path, weights_only=False) if path.exists() else (None, None)
        path.unlink(missing_ok=True)
        ended.append(Ended(value, error, process.exitcode))
    (folder / "store").unlink(missing_ok=True)
    return ended


def _rank(
    rank: int,
    world: int,
    backend: str,
    patience: float,
    folder: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=patience),
    )
    value, error = None, None
    try:
        value = function(*args)
    except Exception as raised:
        error = raised
    torch.save((value, error), folder / f"rank-{rank}.pt")
    if error is None:
        with contextlib.suppress(RuntimeError):  # where another rank has failed
            dist.barrier()  # nobody leaves while another is still arriving
    dist.destroy_process_group()
