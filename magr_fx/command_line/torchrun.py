"""The ranks that torchrun started for one command: they form a group, and one of them prints."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import click
import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from magr_fx.errors import DistributedError

# Seconds that other ranks wait until rank 0 has printed an error, and that it waits for them then.
_WAIT_FOR_MESSAGE, _WAIT_FOR_OTHERS = 60.0, 2.0


class Launched:
    """This process as one of the ranks that were started for a command, by its environment.

    Args:
        alone: whether to ignore the environment, for a command that does not work on ranks.

    Attributes:
        several: whether torchrun, or a launcher like it, started this process.
        rank: 0 to world - 1; rank 0 writes, and prints results and errors.
        world: the number of ranks.
        local_rank: the rank among those of this machine; ``rank`` if LOCAL_RANK is not set.
    """

    def __init__(self, *, alone: bool = False) -> None:
        alike = {"RANK", "MASTER_ADDR"} <= os.environ.keys() and _number("WORLD_SIZE", 1) > 1
        started = dist.is_available() and (dist.is_torchelastic_launched() or alike)
        self.several = started and not alone
        self.world = _number("WORLD_SIZE", 1) if self.several else 1
        self.rank = _number("RANK", 0) if self.several else 0
        self.local_rank = _number("LOCAL_RANK", self.rank) if self.several else 0
        self._store: Any = None

    @contextlib.contextmanager
    def default_group(self, minutes: float) -> Iterator[None]:
        """Join all ranks into torch.distributed's default group; without torchrun there is none.

        Args:
            minutes: the longest time that one rank waits for another.

        Raises:
            DistributedError: the ranks cannot connect to each other.
        """
        if not self.several:
            yield
            return
        timeout = timedelta(minutes=minutes)
        # NCCL connects only when the first tensor on a CUDA device is sent.
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            store, rank, world = next(rendezvous("env://", timeout=timeout))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"rank {self.rank} of {self.world} cannot connect to the others: {error}. Start "
                "all ranks with torchrun, which sets their common address"
            ) from error
        self._store = store
        with _one_interrupt():
            try:
                yield
            finally:
                dist.destroy_process_group()

    def print_once(self, message: str) -> None:
        """Print a message to stderr once: rank 0 prints it, and the others only if it does not.

        If one rank fails, every rank raises the same error and calls this.
        """
        if self.rank == 0:
            click.echo(message, err=True)
            self._ignore_sigterm()
            # This process may host the store, and must not end before all have read the key.
            self._post("told")
            self._wait_for([f"heard {rank}" for rank in range(1, self.world)], _WAIT_FOR_OTHERS)
        elif self._wait_for(["told"], _WAIT_FOR_MESSAGE):
            self._ignore_sigterm()
            self._post(f"heard {self.rank}")
        else:
            click.echo(message, err=True)

    def _ignore_sigterm(self) -> None:
        """Ignore SIGTERM, which torchrun sends to all ranks once one has ended.

        Each rank then ends by itself, with its own exit code.
        """
        if self.several and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _post(self, key: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store's host has ended
            if self._store is not None:
                self._store.set(key, "")

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        """Whether the store has these keys in time. It polls, as torch logs a wait that fails."""
        until = time.monotonic() + seconds
        try:
            while self._store is not None and time.monotonic() < until:
                if self._store.check(keys):
                    return True
                time.sleep(0.02)
        except RuntimeError:  # the store's host has ended
            pass
        return False


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Ignore every Ctrl-C after the first: torchrun sends one more than the terminal.

    A second one would interrupt the clean-up that follows the first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        signal.signal(signal.SIGINT, before)
        raise
    signal.signal(signal.SIGINT, before)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
