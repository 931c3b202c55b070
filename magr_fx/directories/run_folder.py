"""The folder of an unfinished run for OUT: ``OUT.unfinished``, locked by one run at a time."""

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
    """The folder of an unfinished run for ``out``: ``OUT.unfinished``."""
    return out.with_name(out.name + _UNFINISHED)


def is_resumable(out: Path) -> bool:
    """Whether an interrupted run for ``out`` has saved a state to resume from."""
    return any((run_of(out) / CHECKPOINT).glob("state-*.pt"))


def run_id(out: Path) -> str:
    """A random id of this run for ``out``; it stays the same when the run is resumed."""
    path = run_of(out) / _ID
    known = path.read_text(encoding="ascii") if path.exists() else ""
    if not known:  # a new run, or one that was interrupted before it wrote the id
        known = secrets.token_hex(8)
        path.write_text(known, encoding="ascii")
    return known


def is_run_folder(run: Path) -> bool:
    """Whether a run made this directory, so that it may be removed."""
    return os.path.isfile(run / _LOCK)  # unlike Path.is_file, False for a name that is too long


@contextlib.contextmanager
def run_folder(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make and lock ``OUT.unfinished`` on rank 0, and check that the other ranks see it.

    At the end it is removed, unless it has a state to resume from.

    Raises:
        ConfigError: it cannot be made, another process uses it, or a rank does not see it.
    """
    run = run_of(out)
    if ranks.rank > 0:
        mark, lock = ranks.gather("")[0], run / _LOCK
        if not lock.is_file() or lock.read_text(encoding="ascii") != mark:
            raise ConfigError(
                f"rank {ranks.rank}, on {socket.gethostname()}, does not see {run}, which rank 0 "
                "made; name an OUT on a file system that all ranks share"
            )
        yield
        return
    with locked(run) as mark:
        try:
            ranks.gather(mark)
            yield
        finally:
            if not is_resumable(out):
                shutil.rmtree(run, ignore_errors=True)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[str]:
    """Make and lock the run's folder. The system releases the lock when the process ends.

    Not by the filelock library, which empties the file that it locks: other ranks read this one.

    Yields:
        The random text in the lock file, by which other ranks recognise this run.

    Raises:
        ConfigError: the folder cannot be made or locked.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise ConfigError(
            "transform and quantize lock their working directory, which needs Linux or macOS; on "
            "Windows call magr_fx.magr_transform from Python"
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
                f"another process uses {run}; wait until it ends, or name another OUT"
            ) from error
        mark = secrets.token_hex(8)
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())  # on NFS other machines do not see the text before this
        yield mark
