"""Which modules are rewritten: those that transformers quantizes, without the skipped ones.

A skip pattern is one of :mod:`fnmatch`: ``*`` matches any text, also dots, and ``?`` one character.
A module that it matches is left unchanged, together with all modules inside it.
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
    """A filter for the modules to rewrite.

    Args:
        model: the model; its weights are not read.
        skip: patterns of the modules to leave unchanged.
        head: whether to include the modules that transformers does not quantize by default.
        linears_only: whether to take modules of type nn.Linear only.
    """
    kept = [] if head else HfQuantizer.get_modules_to_not_convert(model)

    def chosen(module: nn.Module, name: str) -> bool:
        wanted = isinstance(module, nn.Linear) or not linears_only
        return wanted and should_convert_module(name, kept) and not is_skipped(name, skip)

    return chosen


def is_skipped(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the module's name, or that of a module that contains it."""
    return any(
        fnmatch.fnmatchcase(n, pattern) for n in _module_and_parents(name) for pattern in patterns
    )


def check_skipped(
    model: nn.Module, skip: tuple[str, ...], *, head: bool = False, linears_only: bool = False
) -> None:
    """Check that each pattern matches a module, and that some module is left to rewrite.

    A pattern is no error if it matches only modules that are not rewritten anyway, but a warning
    is logged.

    Args:
        model, skip, head, linears_only: as for :func:`rewritable`.

    Raises:
        ConfigError: a pattern matches no module of the model, or nothing is left to rewrite.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(
                f"--skip {pattern!r} names no module of the model, and so would have no effect; "
                f"{_similar_names(pattern, modules)}"
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
                "--skip %r changes nothing: the modules that it names are not rewritten anyway",
                pattern,
            )
    if all(is_skipped(name, skip) for name in owners):
        raise ConfigError(
            "nothing is left to rewrite: "
            + ("quantize takes nn.Linear only, and " if linears_only else "")
            + f"--skip leaves out {', '.join(skip) or 'nothing'}"
        )


def _module_and_parents(name: str) -> Iterator[str]:
    """A module's name and those of the modules that contain it, without the model itself."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module itself has a parameter that may be the weight of a matmul."""
    # A tied embedding counts through its head.
    matrix = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    return matrix and not isinstance(module, nn.Embedding)


def _similar_names(pattern: str, modules: dict[str, nn.Module]) -> str:
    """The names that are most similar, with a ``*`` in place of each number."""
    names: dict[str, str] = {}  # lower-case text to compare with → name to show
    for name, module in modules.items():
        if any(True for _ in module.parameters()):
            parts = ["*" if part.isdigit() else part for part in name.split(".")]
            for at in range(len(parts)):
                shown = ".".join(parts[at:] if at == 0 else ["*", *parts[at:]])
                names.setdefault(shown.lower(), shown)
                names.setdefault(".".join(parts[at:]).lower(), shown)
    close = difflib.get_close_matches(pattern.lower(), names, _SHOWN)
    if close:
        return f"similar names are {', '.join(dict.fromkeys(names[one] for one in close))}"
    owners = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    return f"examples of its names are {', '.join((owners or list(modules))[:_SHOWN])}"
