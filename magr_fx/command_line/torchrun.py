"""The processes that torchrun started for one command: they meet, and one of them speaks."""

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

# Seconds to wait for the first rank to tell how it ended, and for the others to hear of it.
_TO_TELL, _TO_HEAR = 60.0, 2.0


class Launched:
    """This process among those that were started for the same command, by its environment.

    Args:
        alone: whatever the environment says: of a command that each process does by itself.

    Attributes:
        rank: of 0 to world - 1; the first one shows and writes, and tells errors.
        world: how many there are; 1 is this one alone.
        local_rank: among those of this machine, as far as whoever started them says.
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
    def joined(self, minutes: float) -> Iterator[None]:
        """Have them all in torch.distributed's default group; alone there is none.

        Args:
            minutes: the longest that one of them waits for another.

        Raises:
            DistributedError: they do not find each other.
        """
        if not self.several:
            yield
            return
        timeout = timedelta(minutes=minutes)
        # Communicators of NCCL are made when something on a device is sent, if ever.
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
                f"rank {self.rank} of {self.world} does not find the others: {error}. Start them "
                "with torchrun, which says where they meet"
            ) from error
        self._store = store
        with _one_interrupt():
            try:
                yield
            finally:
                dist.destroy_process_group()

    def tell(self, message: str) -> None:
        """Write it to stderr once: the first rank does, or where that one does not, the others.

        All come here that have failed; those which the failure of another has ended say the same.
        """
        if self.rank == 0:
            click.echo(message, err=True)
            self._leave_undisturbed()
            # This one may keep the store, and has to stay until all have seen it.
            self._post("told")
            self._posted([f"heard {rank}" for rank in range(1, self.world)], _TO_HEAR)
        elif self._posted(["told"], _TO_TELL):
            self._leave_undisturbed()
            self._post(f"heard {self.rank}")
        else:
            click.echo(message, err=True)

    def _leave_undisturbed(self) -> None:
        """torchrun ends all ranks when one has ended; these end by themselves, with their codes."""
        if self.several and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _post(self, key: str) -> None:
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            if self._store is not None:
                self._store.set(key, "")

    def _posted(self, keys: list[str], seconds: float) -> bool:
        """Whether these are there in time; asked for, since a wait that fails is logged."""
        until = time.monotonic() + seconds
        try:
            while self._store is not None and time.monotonic() < until:
                if self._store.check(keys):
                    return True
                time.sleep(0.02)
        except RuntimeError:  # of a store that is gone
            pass
        return False


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Only the first Ctrl-C counts: torchrun sends another one to whom the terminal has sent one.

    The second would cut short the way out, on which what was made is put in order.
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
