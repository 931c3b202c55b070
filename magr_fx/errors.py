"""The errors that magr-fx raises: one base class, and one subclass for each kind of remedy."""

from __future__ import annotations

import torch


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message: torch's messages can be very long."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "no message")


class MagRError(Exception):
    """Base of every error that magr-fx raises on purpose."""


class ConfigError(MagRError, ValueError):
    """An option, a target or a filter is wrong; nothing was changed."""


class CalibrationError(MagRError, ValueError):
    """The calibration inputs are empty, of the wrong type, or not finite; nothing was changed."""


class ModelError(MagRError, ValueError):
    """The model cannot be processed as it is (meta device, NaN weights, already quantized)."""


class TraceError(MagRError, RuntimeError):
    """The model cannot be traced; nothing was changed."""


class CoverageError(MagRError, RuntimeError):
    """With ``strict``: the weight of a matmul was not rewritten; the message says which."""


class CheckpointError(MagRError, RuntimeError):
    """A run's checkpoint directory cannot be written, is damaged, or belongs to another run."""


class HandoverError(MagRError, RuntimeError):
    """torchao left weights unquantized that it should quantize; the message lists them."""


class OutOfMemoryError(MagRError, torch.OutOfMemoryError, MemoryError):
    """The host or the device is out of memory; the message says what had been changed by then.

    ``except torch.OutOfMemoryError`` and ``except MemoryError`` catch it too.
    """


class DistributedError(MagRError, RuntimeError):
    """A rank failed or died, or the ranks were called with different arguments."""


# By name, because a rank sends the name of the error that it raised to the other ranks.
_KINDS: list[type[MagRError]] = [MagRError, *MagRError.__subclasses__()]
PUBLIC_ERRORS = {kind.__name__: kind for kind in _KINDS}


def brief(error: BaseException) -> str:
    """The class and first line of another library's error; two lines if the first ends in ":"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[: 1 + lines[0].endswith(':')])}"
