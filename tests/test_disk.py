"""Room on a disk, and parts of files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from magr_fx.disk import copy_bytes, is_full, take_room, why_not_written


@pytest.mark.parametrize("platform", ["linux", "another"])
def test_room_is_taken(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if platform == "another":
        monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"abc")
        take_room(file, 100_000)
    assert path.read_bytes() == b"abc" + bytes(99_997)
    assert path.stat().st_blocks * 512 >= 100_000


def test_a_part_is_copied_to_its_place(tmp_path: Path) -> None:
    (tmp_path / "origin").write_bytes(bytes(range(100)))
    (tmp_path / "made").write_bytes(bytes(100))
    with (tmp_path / "origin").open("rb") as origin, (tmp_path / "made").open("r+b") as made:
        copy_bytes(origin, made, 10, 20)
        with pytest.raises(OSError, match="has become shorter"):
            copy_bytes(origin, made, 90, 101)
    wanted = bytes(10) + bytes(range(10, 20)) + bytes(70) + bytes(range(90, 100))
    assert (tmp_path / "made").read_bytes() == wanted


def test_a_full_disk_is_named() -> None:
    no_room = os.strerror(errno.ENOSPC)
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match=no_room) as raised,
    ):
        full.write(b"x")
    assert is_full(raised.value)
    assert not is_full(PermissionError(13, "no"))
    hidden = RuntimeError("unexpected pos 64 vs 0")
    hidden.__context__ = raised.value
    assert why_not_written(hidden) is raised.value
    assert why_not_written(RuntimeError("alone")).args == ("alone",)
