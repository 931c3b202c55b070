"""One log record for each finished block, from the logger ``magr_fx.blocks``."""

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
    """Log at level INFO that a block is done; the record's ``block`` is a dict for JSON.

    Args:
        name: the module path of the layer; "" outside of layers.
        number, of: the block's number, and how many blocks there are; with ``propagate`` a layer
            has several.
        rows: the report's rows for the block's sites.
        seconds: the time since the previous block was done.
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
    """Within the context, append each finished block to a file, as one line of JSON.

    Args:
        path: the file; None writes no file.
        out: the directory that the run makes; each line has it as "out".
        run_id: returns the identifier of the run, which each line has as "run". It stays the same
            when a run is resumed. It is called when the first block is done.
        resumed: whether this run may continue an interrupted one. The interrupted run may have
            logged blocks that it had not saved. They are done again, so their lines are removed.

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
        if is_new and path.is_file() and path.stat().st_size == 0:  # no block was done
            path.unlink()


class _JsonLines(logging.FileHandler):
    def __init__(self, path: Path, out: str, run_id: Callable[[], str], resumed: bool) -> None:
        super().__init__(path, encoding="utf-8")
        self._path, self._out, self._run_id, self._resumed = path, out, run_id, resumed
        self._run = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self._run:  # the run's directory, with its identifier, exists by now
            self._run = self._run_id()
            if self._path.is_file():  # not a pipe
                number = record.block["number"]  # type: ignore[attr-defined]
                _mend(self._path, self._run, number if self._resumed else None)
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        line = {**record.block, "out": self._out, "run": self._run}  # type: ignore[attr-defined]
        return json.dumps(line, allow_nan=False)


def _mend(path: Path, run: str, number: int | None) -> None:
    """Remove half a line, and the lines of this run's blocks that will be logged again.

    A killed run leaves such lines, because it logs a block before it saves it. The blocks from
    ``number`` on are done again; None removes no lines. The lines of other runs, also for the same
    OUT, are kept.
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
            file.write(mended)  # the bytes before the first removed line do not change
            file.truncate()


def _is_again(record: dict[str, Any], run: str, number: int) -> bool:
    done = record.get("number")
    return record.get("run") == run and isinstance(done, int) and done >= number


def _record(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; empty if there is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
