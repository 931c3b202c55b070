"""Room on a disk, and parts of files."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from magr_fx.machine.disk import copy_bytes, is_full, preallocate, save


@pytest.mark.parametrize("platform", ["linux", "another"])
def test_room_is_taken(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if platform == "another":
        monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"abc")
        preallocate(file, 100_000)
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


class Raising(io.BytesIO):
    """A file that takes some bytes, and then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def write(self, data: Any) -> int:
        if self.tell() > 1000:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError("of the host"),
        torch.OutOfMemoryError("of the device"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("handling", [False, True])
def test_saving_raises_what_the_file_raised(error: BaseException, handling: bool) -> None:
    """torch.save alone says in its place that the position in the file is unexpected."""
    value = {"weight": torch.zeros(10_000)}
    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save(value, Raising(error))
    error.__context__ = None

    def saved() -> None:
        if not handling:
            save(value, Raising(error))
        try:
            raise ValueError("of something else")
        except ValueError:
            save(value, Raising(error))

    with pytest.raises(type(error)) as raised:
        saved()
    assert raised.value is error


def test_saving_raises_what_torch_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("of its own")))
    try:
        raise OSError(errno.ENOSPC, "handled, and of something else")
    except OSError:
        with pytest.raises(RuntimeError, match="of its own"):
            save({}, io.BytesIO())
