"""The lines of ``--log-json``: each block of a run once, whatever a run that was killed left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from magr_fx.errors import ConfigError
from magr_fx.reporting.block_log import blocks, blocks_to, log_block


def log(path: Path, out: str, *numbers: int, run: str = "", resumed: bool = False) -> None:
    """What a run for ``out`` logs that does blocks of these numbers."""
    with blocks_to(path, Path(out), run_id=lambda: run or f"run for {out}", resumed=resumed):
        for number in numbers:
            log_block(f"layers.{number}", number, 9, [], 0.5, float("nan"))


def logged(path: Path) -> list[tuple[str, int]]:
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["out"], record["number"]) for record in records]


def test_a_line_is_the_record_and_out(tmp_path: Path) -> None:
    log(tmp_path / "log", "/a", 3)
    assert json.loads((tmp_path / "log").read_text()) == {
        "block": "layers.3",
        "number": 3,
        "of": 9,
        "seconds": 0.5,
        "memory_mib": None,
        "sites": [],
        "out": "/a",
        "run": "run for /a",
    }
    assert blocks.handlers == []


def test_a_block_that_is_done_again_takes_the_place_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log(path, "/a", 1, 2, 3)
    log(path, "/a", 3, 4, resumed=True)
    assert logged(path) == [("/a", 1), ("/a", 2), ("/a", 3), ("/a", 4)]
    log(path, "/a", 2, 3, 4, resumed=True)  # several were done since the last state
    assert logged(path) == [("/a", 1), ("/a", 2), ("/a", 3), ("/a", 4)]
    log(path, "/a", 5, resumed=True)  # what was logged last was saved as well
    assert logged(path)[3:] == [("/a", 4), ("/a", 5)]


def test_other_runs_in_the_same_file_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log(path, "/a", 1, 2, 3)
    log(path, "/b", 1, 2, 3)
    log(path, "/a", 3, 4, resumed=True)
    others = [("/b", 1), ("/b", 2), ("/b", 3)]
    assert logged(path) == [("/a", 1), ("/a", 2), *others, ("/a", 3), ("/a", 4)]
    log(path, "/b", 1, 2, run="anew")
    log(path, "/c", 2, 3, resumed=True)
    assert logged(path)[7:] == [("/b", 1), ("/b", 2), ("/c", 2), ("/c", 3)]
    before = logged(path)
    log(path, "/b", 1, run="killed before it logged anything", resumed=True)
    assert logged(path) == [*before, ("/b", 1)]


@pytest.mark.parametrize("left", [1, 3, 10, 40, -1])
@pytest.mark.parametrize("resumed", [True, False])
def test_half_a_line_is_taken_back(left: int, resumed: bool, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log(path, "/a", 1, 2)
    whole = path.read_bytes()
    log(path, "/a", 3)
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:left])
    log(path, "/a", 3, 4, resumed=resumed)
    again = [] if resumed or left > 0 else [("/a", 3)]  # only its end is missing: it is a line
    assert logged(path) == [("/a", 1), ("/a", 2), *again, ("/a", 3), ("/a", 4)]


def test_what_somebody_else_wrote_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"notes of mine\n[3]\n\xff no end")
    log(path, "/a", 3, resumed=True)
    assert path.read_bytes().startswith(b"notes of mine\n[3]\n\xff no end\n{")


def test_nothing_is_taken_back_before_the_first_block(tmp_path: Path) -> None:
    """Whether this run may go on with the other one is not known earlier."""
    path = tmp_path / "log"
    log(path, "/a", 1, 2)
    path.write_bytes(path.read_bytes() + b'{"blo')
    before = path.read_bytes()
    log(path, "/a", resumed=True)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"cannot be written: .*name another file"),
        blocks_to(tmp_path / "none" / "log", Path("/a"), run_id=str, resumed=False),
    ):
        pass
