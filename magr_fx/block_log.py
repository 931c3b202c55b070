"""One record for each finished block, for whoever listens to the logger ``magr_fx.blocks``."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from magr_fx.errors import ConfigError
from magr_fx.report import SiteReport

blocks = logging.getLogger("magr_fx.blocks")


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
def blocks_to(path: Path | None) -> Iterator[None]:
    """Append each block that is done to a file, as one line of JSON, for as long as it is open.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield
        return
    try:
        handler = _JsonLines(path, encoding="utf-8")
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


class _JsonLines(logging.FileHandler):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(record.block, allow_nan=False)  # type: ignore[attr-defined]
