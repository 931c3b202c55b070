"""What a disk does when it is full, and how to have its room beforehand."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
_CHUNK = 2**24  # bytes that are written at once


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


def settle(path: Path) -> None:
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


def why_not_written(error: OSError | RuntimeError) -> BaseException:
    """What went wrong in the end: of a full disk torch.save tells only where it was in the file."""
    return error if isinstance(error, OSError) else error.__context__ or error
