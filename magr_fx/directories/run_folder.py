"""Where a run for OUT keeps what is not finished: ``OUT.unfinished``, for one run at a time."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from magr_fx.errors import ConfigError
from magr_fx.machine.ranks import Ranks

CHECKPOINT = "checkpoint"
_UNFINISHED, _LOCK, _ID = ".unfinished", "lock", "id"


def run_of(out: Path) -> Path:
    """The directory of a run for ``out``."""
    return out.with_name(out.name + _UNFINISHED)


def is_resumable(out: Path) -> bool:
    """Whether a run for ``out`` was cut short that can be taken up again."""
    return any((run_of(out) / CHECKPOINT).glob("state-*.pt"))


def run_id(out: Path) -> str:
    """What tells the run for ``out`` from others for it, however often it is taken up again."""
    path = run_of(out) / _ID
    known = path.read_text(encoding="ascii") if path.exists() else ""
    if not known:  # or it was cut short just here
        known = secrets.token_hex(8)
        path.write_text(known, encoding="ascii")
    return known


def is_ours(run: Path) -> bool:
    """Whether a directory was made by a run, so that it may be removed."""
    return os.path.isfile(run / _LOCK)  # also asked of names that are too long to be there


@contextlib.contextmanager
def run_folder(out: Path, ranks: Ranks) -> Iterator[None]:
    """``OUT.unfinished``, which the first rank makes, and the others have to see.

    It stays where there is something in it to go on from, and is removed at the end otherwise.

    Raises:
        ConfigError: it cannot be made, another process works there, or a rank does not see it.
    """
    run = run_of(out)
    if ranks.rank > 0:
        mark, lock = ranks.gather("")[0], run / _LOCK
        if not lock.is_file() or lock.read_text(encoding="ascii") != mark:
            raise ConfigError(
                f"rank {ranks.rank}, on {socket.gethostname()}, does not see the {run} of "
                "rank 0; name an OUT on a file system that all ranks share"
            )
        yield
        return
    with alone(run) as mark:
        try:
            ranks.gather(mark)
            yield
        finally:
            if not is_resumable(out):
                shutil.rmtree(run, ignore_errors=True)


@contextlib.contextmanager
def alone(run: Path) -> Iterator[str]:
    """Have the run's directory to oneself; the lock goes with the process, however that ends.

    Yields what is written in the lock, which no other run has written.

    Raises:
        ConfigError: it cannot be made or locked.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise ConfigError(
            "transform and quantize lock the directory that they work in, which needs a Unix; "
            "under Windows call magr_fx.magr_transform from Python"
        ) from error
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / _LOCK).open("a", encoding="ascii")
    except OSError as error:
        raise ConfigError(
            f"{run} cannot be made: {error.strerror or error}; name an OUT where you may write"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process works on {run}; wait for it, or name another OUT"
            ) from error
        mark = secrets.token_hex(8)
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())  # other machines see it only then, where they share by NFS
        yield mark
