"""Heads that share their weight with an embedding: give them one of their own, and take it back."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from torch import nn


class Head(NamedTuple):
    """A linear, and the parameter that it shared with an embedding."""

    module: nn.Linear
    tied: nn.Parameter


class UntiedHeads:
    """The heads of a model, each with a copy of its weight from now on.

    Attributes:
        heads: those that have a weight of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.heads = [
            Head(module, module.weight)
            for module in linears
            if id(module.weight) in tables and isinstance(module.weight, nn.Parameter)
        ]
        for module, tied in self.heads:
            module.weight = nn.Parameter(tied.detach().clone(), tied.requires_grad)
        # transformers would tie them again when it loads the model.
        self._configs = [c for c in _configs(model) if self.heads and _ties(c)]
        for config in self._configs:
            config.tie_word_embeddings = False

    @property
    def nbytes(self) -> int:
        """What the copies take."""
        return sum(module.weight.nbytes for module, _ in self.heads)

    def tie(self, unless: AbstractSet[int] = frozenset()) -> None:
        """Let heads share again, but for those with a weight among the ids ``unless``."""
        kept = []
        for head in self.heads:
            if {id(head.module.weight), id(head.tied)} & unless:
                kept.append(head)
            else:
                head.module.weight = head.tied
        self.heads = kept
        if not kept:
            for config in self._configs:
                config.tie_word_embeddings = True
            self._configs.clear()


def _configs(model: nn.Module) -> list[Any]:
    """The model's configuration of transformers, and that of its text model."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return [one for one in (config, text if text is not config else None) if one is not None]


def _ties(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))
