"""What a disk does when it is full, how to have its room beforehand, and how often to write."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from magr_fx.errors import ConfigError

# Seconds of work between two states of a run. One that is killed loses what it did since the last,
# at most this and a step: less than a minute where a step takes less than half of one, and a step
# where it takes longer. All activations are in a state: were one written after each step, of which
# a layer has four, a run would write a hundred times the bytes of its model.
BETWEEN_STATES = 30.0

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
_CHUNK = 2**24  # bytes that are written at once


def folder_named(given: Any, option: str) -> Path:
    """The directory that an option names, in whatever form Python has names.

    Raises:
        ConfigError: it names none.
    """
    try:
        name = os.fsdecode(given)
    except TypeError:
        name = ""
    if not name:
        raise ConfigError(f"{option} is the name of a directory, got {given!r}")
    return Path(name)


def take_room(file: BinaryIO, size: int) -> None:
    """Make a file so large, with zeros that the disk really has room for.

    Raises:
        OSError: it has not.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_END)
    while file.tell() < size:
        file.write(bytes(min(_CHUNK, size - file.tell())))
    file.flush()


def copy_bytes(origin: BinaryIO, made: BinaryIO, start: int, stop: int) -> None:
    """Copy a part of a file to the same place of another.

    Raises:
        OSError: the one ends before, or the other cannot be written.
    """
    origin.seek(start)
    made.seek(start)
    while start < stop:
        piece = origin.read(min(_CHUNK, stop - start))
        if not piece:
            raise OSError(errno.EIO, "the file has become shorter", origin.name)
        made.write(piece)
        start += len(piece)


def fsync_path(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk.

    What a rename did is safe against a loss of power only once the directory is; a directory that
    the platform cannot open (on Windows), or has nothing to do for (some network file systems), is
    left to it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_SYNC):
            raise
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room."""
    return isinstance(error, OSError) and error.errno in _FULL


def save(value: Any, file: BinaryIO) -> None:
    """torch.save, but raising what was raised within it.

    Whatever a write, or the way of a tensor to the CPU, raises (an OSError of a full disk, an
    error of memory, a KeyboardInterrupt), torch's own cleaning up raises a RuntimeError in its
    place, which tells only how far the file has come.

    Raises:
        OSError: the file cannot be written.
    """
    outer = sys.exc_info()[1]  # what is being handled already, and is no part of this
    try:
        torch.save(value, file)
    except RuntimeError as error:
        first: BaseException = error
        while first.__context__ is not None and first.__context__ is not outer:
            first = first.__context__
        if first is error:
            raise
        raise first from None
