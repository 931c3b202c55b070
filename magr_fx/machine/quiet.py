"""What other libraries say on stderr beside this one's own messages."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Loggers, and those below them, are silent under level ERROR for as long as it lasts."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def torch_silenced() -> Iterator[None]:
    """Keep away what torch logs and prints of a model that it refuses: the refusal is reported.

    Its loggers write warnings, errors and tracebacks, torch.export the whole graph so far, and a
    graph module the line of its code that failed.
    """
    with (
        torch_unlogged(),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        # That forward assigned a tensor to an attribute, which is put back.
        warnings.filterwarnings("ignore", "The tensor attribute")
        yield


@contextlib.contextmanager
def torch_unlogged() -> Iterator[None]:
    """Keep away what torch logs; what the code that runs prints by itself is still seen.

    What other threads log goes on, and so does what TORCH_LOGS asks for, below a warning.
    """
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        own = record.name.partition(".")[0] == "torch" and record.thread == thread
        return not own or record.levelno < logging.WARNING

    # Where records end. A logger's filter does not see those of the loggers below it, some of which
    # are made only as torch imports what it needs.
    handlers = list(_handlers())
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def _handlers() -> Iterator[logging.Handler]:
    """All handlers that a record of torch's may come to."""
    yield from logging.getLogger().handlers
    if logging.lastResort is not None:
        yield logging.lastResort
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            yield from logger.handlers
