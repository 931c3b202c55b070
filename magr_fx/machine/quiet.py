"""Silencing what other libraries log and print."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Within the context the named loggers, and their children, log only errors."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def stdout_of_c_silenced() -> Iterator[None]:
    """Drop what compiled code prints to the process's standard output, of all threads."""
    sys.stdout.flush()  # what Python has printed before
    _flush_of_c()
    try:
        kept = os.dup(1)
    except OSError:  # the process has no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        _flush_of_c()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_of_c() -> None:
    """Write what C's own buffers hold; it would come later, where it is not to be dropped."""
    with contextlib.suppress(OSError, TypeError):  # a system without one library of all
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def torch_silenced() -> Iterator[None]:
    """Hide what torch logs, warns and prints when it cannot handle a model.

    The caller reports the failure itself. torch's loggers write warnings, errors and tracebacks,
    torch.export prints the whole graph so far, and a graph module its line of code that failed.
    """
    with (
        torch_unlogged(),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        # The warning that forward assigned a tensor to an attribute; the caller restores it.
        warnings.filterwarnings("ignore", "The tensor attribute")
        yield


@contextlib.contextmanager
def torch_unlogged() -> Iterator[None]:
    """Hide what torch logs in this thread; what the running code prints is still shown.

    Other threads still log. So do records below WARNING, which TORCH_LOGS turns on.
    """
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        own = record.name.partition(".")[0] == "torch" and record.thread == thread
        return not own or record.levelno < logging.WARNING

    # The filter is added to handlers: a logger's filter does not see the records of its children,
    # and some children are only created when torch imports further modules.
    handlers = list(_handlers())
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def _handlers() -> Iterator[logging.Handler]:
    """All handlers that may get a record of torch's loggers."""
    yield from logging.getLogger().handlers
    if logging.lastResort is not None:
        yield logging.lastResort
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            yield from logger.handlers
