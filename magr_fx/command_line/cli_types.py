"""Types of options that are stricter than click's own types."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import click


class PathType(click.Path):
    """A path whose name is valid on this system, whether or not it exists."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the name is empty", param, ctx)
        try:
            # These three errors do not mean that the name itself is invalid.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                os.lstat(value)
        except (OSError, ValueError) as error:  # the name is too long, or has a zero byte
            self.fail(f"no file can have this name: {error}", param, ctx)
        return super().convert(value, param, ctx)


class Positive(click.FloatRange):
    """A number above 0 and up to 1e9, of minutes or TFLOP/s; NaN is refused."""

    def __init__(self) -> None:
        super().__init__(0, 1e9, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


FILE = PathType(dir_okay=False, path_type=Path)
# Resolved, because OUT.unfinished needs the real name of a directory such as ".".
FOLDER = PathType(path_type=Path, resolve_path=True)
_MOST = 10**12
TOKENS, LENGTH = click.IntRange(1, _MOST), click.IntRange(2, _MOST)
