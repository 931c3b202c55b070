"""Files on a disk: allocating them beforehand, copying, syncing, and errors of a full disk."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from magr_fx.errors import ConfigError

# Seconds between two saved states of a run. A run that is killed loses the work since the last
# state: at most these seconds and one step, which is less than a minute if a step takes less than
# half a minute. A state holds all activations. Were one saved after each step, of which a layer has
# four, a run would write a hundred times the bytes of its model.
BETWEEN_STATES = 30.0

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
_CHUNK = 2**24  # bytes per read or write


def folder_named(given: Any, option: str) -> Path:
    """The directory that an option names, given as str, bytes or path.

    Raises:
        ConfigError: ``given`` is of another type, or empty.
    """
    try:
        name = os.fsdecode(given)
    except TypeError:
        name = ""
    if not name:
        raise ConfigError(f"{option} must be the name of a directory, got {given!r}")
    return Path(name)


def preallocate(file: BinaryIO, size: int) -> None:
    """Extend a file with zeros to ``size`` bytes, for which the disk then has reserved the space.

    Raises:
        OSError: the disk has not enough space.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_END)
    while file.tell() < size:
        file.write(bytes(min(_CHUNK, size - file.tell())))
    file.flush()


def copy_bytes(origin: BinaryIO, made: BinaryIO, start: int, stop: int) -> None:
    """Copy the bytes from ``start`` to ``stop`` of a file to the same position of another.

    Raises:
        OSError: ``origin`` ends before ``stop``, or ``made`` cannot be written.
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

    A rename survives a loss of power only after its directory was synced. A directory that the
    platform cannot open (Windows) or cannot sync (some network file systems) is silently skipped.
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
    """Whether an error says that the disk, a quota or a file size limit is exhausted."""
    return isinstance(error, OSError) and error.errno in _FULL


def save(value: Any, file: BinaryIO) -> None:
    """torch.save, but with the original error of a failed write.

    A write, or the copy of a tensor to the CPU, can raise an OSError of a full disk, an
    out-of-memory error or a KeyboardInterrupt. torch's own clean-up then raises a RuntimeError
    instead, which only says how many bytes were written. This function raises the first error.

    Raises:
        OSError: the file cannot be written.
    """
    outer = sys.exc_info()[1]  # an error that the caller is handling already is not ours
    try:
        torch.save(value, file)
    except RuntimeError as error:
        first: BaseException = error
        while first.__context__ is not None and first.__context__ is not outer:
            first = first.__context__
        if first is error:
            raise
        raise first from None
