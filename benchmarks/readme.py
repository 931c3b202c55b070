"""Puts a benchmark's table into README.md, between two comments that name its command."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def put_table(name: str, table: str) -> None:
    """Replace what stands between ``<!-- name: ... -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: the README has no such place.
    """
    text = README.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"README.md has no place for {name}")
    new = place.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)
    README.write_text(new, encoding="utf-8")
