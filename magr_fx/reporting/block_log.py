"""One record for each finished block, for whoever listens to the logger ``magr_fx.blocks``."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from magr_fx.errors import ConfigError
from magr_fx.reporting.report import SiteReport

blocks = logging.getLogger("magr_fx.blocks")
_BEGINNING = b'{"block": '  # of every line


def log_block(
    name: str, number: int, of: int, rows: Sequence[SiteReport], seconds: float, memory: float
) -> None:
    """Log, at level INFO, that a block is done; the record's ``block`` has the same for JSON.

    Args:
        name: the module path of the layer; "" outside of layers.
        number, of: which block of how many; with ``propagate`` a layer has several.
        rows: the report's rows of its sites.
        seconds: since the block before it was done.
        memory: the high-water mark in MiB.
    """
    if not blocks.isEnabledFor(logging.INFO):
        return
    block: dict[str, Any] = {
        "block": name,
        "number": number,
        "of": of,
        "seconds": round(seconds, 3),
        "memory_mib": None if math.isnan(memory) else round(memory, 1),
        "sites": [row.as_dict() for row in rows],
    }
    blocks.info("%s (%d of %d): %d sites, %.1f s", name, number, of, len(rows), seconds,
                extra={"block": block})  # fmt: skip


@contextlib.contextmanager
def blocks_to(
    path: Path | None, out: Path, *, run_id: Callable[[], str], resumed: bool
) -> Iterator[None]:
    """Append each block that is done to a file, as one line of JSON, for as long as it is open.

    Args:
        path: the file; None is none.
        out: what the run makes, which each line names beside what the record holds.
        run_id: tells what each line names as well, the same however often the run is taken up
            again; asked when the first block is done.
        resumed: whether this run goes on with one that was cut short, should there be one. That may
            have logged blocks which it had not saved yet: they are done again, and their lines take
            the place of the others.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield
        return
    is_new = not path.exists()
    try:
        handler = _JsonLines(path, str(out), run_id, resumed)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; name another file") from error
    level = blocks.level
    blocks.addHandler(handler)
    blocks.setLevel(logging.INFO)
    try:
        yield
    finally:
        blocks.setLevel(level)
        blocks.removeHandler(handler)
        handler.close()
        if is_new and path.is_file() and path.stat().st_size == 0:  # of a run that was refused
            path.unlink()


class _JsonLines(logging.FileHandler):
    def __init__(self, path: Path, out: str, run_id: Callable[[], str], resumed: bool) -> None:
        super().__init__(path, encoding="utf-8")
        self._path, self._out, self._run_id, self._resumed = path, out, run_id, resumed
        self._run = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self._run:  # which has its directory by now
            self._run = self._run_id()
            if self._path.is_file():  # no pipe
                number = record.block["number"]  # type: ignore[attr-defined]
                _mend(self._path, self._run, number if self._resumed else None)
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        line = {**record.block, "out": self._out, "run": self._run}  # type: ignore[attr-defined]
        return json.dumps(line, allow_nan=False)


def _mend(path: Path, run: str, number: int | None) -> None:
    """Take back what a run that was killed wrote: half a line, and the blocks that are done again.

    A block is logged as it is done, and saved later, so that those from this number on are logged
    anew. Other runs, also for the same OUT, may have written to the same file.
    """
    with path.open("r+b") as file:
        found = file.read()
        lines = found.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            is_half = not _record(lines[-1]) and lines[-1].startswith(_BEGINNING[: len(lines[-1])])
            lines[-1:] = [] if is_half else [lines[-1] + b"\n"]
        if number is not None:
            lines = [line for line in lines if not _is_again(_record(line), run, number)]
        mended = b"".join(lines)
        if mended != found:
            file.seek(0)
            file.write(mended)  # up to what is taken back the same bytes as before
            file.truncate()


def _is_again(record: dict[str, Any], run: str, number: int) -> bool:
    done = record.get("number")
    return record.get("run") == run and isinstance(done, int) and done >= number


def _record(line: bytes) -> dict[str, Any]:
    """What a line holds, empty if it is none of ours."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
