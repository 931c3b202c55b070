"""The errors that magr-fx raises: one base class, one kind for each remedy."""

from __future__ import annotations

import torch


def first_line(error: BaseException) -> str:
    """What an error says first: of torch's, that is all that fits into another message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "no message")


class MagRError(Exception):
    """Base of every error that magr-fx raises on purpose."""


class ConfigError(MagRError, ValueError):
    """An option, a target or a filter is wrong; nothing was changed."""


class CalibrationError(MagRError, ValueError):
    """The calibration inputs are empty, of the wrong type, or not finite; nothing was changed."""


class ModelError(MagRError, ValueError):
    """The model cannot be worked on as it is (meta device, NaN weights, already quantized)."""


class TraceError(MagRError, RuntimeError):
    """The model cannot be traced; nothing was changed."""


class CoverageError(MagRError, RuntimeError):
    """With ``strict``: a weight that meets an input was not rewritten; the message says which."""


class CheckpointError(MagRError, RuntimeError):
    """A run's checkpoint directory cannot be written, is damaged, or belongs to another run."""


class HandoverError(MagRError, RuntimeError):
    """torchao left a rewritten weight unquantized; the message lists which."""


class OutOfMemoryError(MagRError, torch.OutOfMemoryError, MemoryError):
    """The memory of the host or of the device is used up; the message says what was done by then.

    ``except torch.OutOfMemoryError`` and ``except MemoryError`` catch it too.
    """


class DistributedError(MagRError, RuntimeError):
    """A rank failed, died, or was called with something else than the others."""


# By their names, which is how one rank tells another what it raised.
_KINDS: list[type[MagRError]] = [MagRError, *MagRError.__subclasses__()]
PUBLIC_ERRORS = {kind.__name__: kind for kind in _KINDS}


def brief(error: BaseException) -> str:
    """The kind and the first line of another library's error, or two where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[: 1 + lines[0].endswith(':')])}"
