"""What of a model is rewritten: all that transformers quantizes, but for modules of given names.

A name is a pattern of :mod:`fnmatch`: ``*`` is any text, dots too, and ``?`` one character. What it
names is left alone with everything inside of it.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Iterator

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from magr_fx.errors import ConfigError
from magr_fx.passes.finding.find_linears import FilterFn
from magr_fx.passes.known_layers.transformers_private import HfQuantizer

_SHOWN = 3  # names in a message
_log = logging.getLogger("magr_fx")


def rewritable(
    model: nn.Module, skip: tuple[str, ...] = (), *, head: bool = False, linears_only: bool = False
) -> FilterFn:
    """What to rewrite: all but what transformers does not quantize, and what is to be skipped."""
    kept = [] if head else HfQuantizer.get_modules_to_not_convert(model)

    def chosen(module: nn.Module, name: str) -> bool:
        wanted = isinstance(module, nn.Linear) or not linears_only
        return wanted and should_convert_module(name, kept) and not is_skipped(name, skip)

    return chosen


def is_skipped(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns names a module, or one that it is in."""
    return any(fnmatch.fnmatchcase(n, pattern) for n in _around(name) for pattern in patterns)


def check_skipped(
    model: nn.Module, skip: tuple[str, ...], *, head: bool = False, linears_only: bool = False
) -> None:
    """Whether each pattern names something, and something is left.

    A pattern that names only what is left alone without it is no mistake: it is warned of.

    Args:
        model: its weights do not matter.
        skip, head, linears_only: as for :func:`rewritable`.

    Raises:
        ConfigError: a pattern names no module of the model, or nothing is left to rewrite.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(
                f"--skip {pattern!r} names no module of the model, so that nothing would be left "
                f"alone for it; {_names_like(pattern, modules)}"
            )
    taken = rewritable(model, head=head, linears_only=linears_only)
    owners = [
        name
        for name, module in model.named_modules()
        if _has_matrix(module) and taken(module, name)
    ]
    for pattern in skip:
        if not any(is_skipped(name, (pattern,)) for name in owners):
            _log.warning(
                "--skip %r changes nothing: what it names is left alone without it", pattern
            )
    if all(is_skipped(name, skip) for name in owners):
        raise ConfigError(
            "nothing is left to rewrite: "
            + ("quantize takes nn.Linear only, and " if linears_only else "")
            + f"--skip leaves out {', '.join(skip) or 'nothing'}"
        )


def _around(name: str) -> Iterator[str]:
    """A module's name and those of the modules that it is in, but for the model itself."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _has_matrix(module: nn.Module) -> bool:
    """Whether it has a parameter of its own that may be the weight of a product."""
    # Models whose embedding and head are one count by the head.
    matrix = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    return matrix and not isinstance(module, nn.Embedding)


def _names_like(pattern: str, modules: dict[str, nn.Module]) -> str:
    """The names that come closest, with a ``*`` in the place of each number."""
    names: dict[str, str] = {}  # by what is compared
    for name, module in modules.items():
        if any(True for _ in module.parameters()):
            parts = ["*" if part.isdigit() else part for part in name.split(".")]
            for at in range(len(parts)):
                shown = ".".join(parts[at:] if at == 0 else ["*", *parts[at:]])
                names.setdefault(shown.lower(), shown)
                names.setdefault(".".join(parts[at:]).lower(), shown)
    close = difflib.get_close_matches(pattern.lower(), names, _SHOWN)
    if close:
        return f"names like it are {', '.join(dict.fromkeys(names[one] for one in close))}"
    owners = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    return f"names are such as {', '.join((owners or list(modules))[:_SHOWN])}"
