"""What the options of the command line take, where click's own types let too much pass."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import click


class PathType(click.Path):
    """A path with a name that the system can have."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the name is empty", param, ctx)
        try:
            # Whatever is there or not, and whoever may see it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                os.lstat(value)
        except (OSError, ValueError) as error:  # too long, or with a zero in it
            self.fail(f"no file has this name: {error}", param, ctx)
        return super().convert(value, param, ctx)


class Positive(click.FloatRange):
    """A finite number above 0, of minutes or TFLOP/s: not beyond all measure."""

    def __init__(self) -> None:
        super().__init__(0, 1e9, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


FILE = PathType(dir_okay=False, path_type=Path)
# Resolved: the name of "." is needed, for what is not finished.
FOLDER = PathType(path_type=Path, resolve_path=True)
_MOST = 10**12
TOKENS, LENGTH = click.IntRange(1, _MOST), click.IntRange(2, _MOST)
