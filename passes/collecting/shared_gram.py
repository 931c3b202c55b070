"""SharedGram: what was taken of one activation, for all the sites that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from magr_fx.config import MagRConfig
from magr_fx.grams.gram import add_to_drift, add_to_gram
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.finding.find_linears import Site


@dataclass(eq=False)
class SharedGram:
    """The gram of everything that these sites read: G = XᵀX, ``[in, in]`` float32.

    Attributes:
        sites: who reads it.
        pending: where activations are still to be taken.
        gram: G; None before the first activation, and after :meth:`free_matrices`.
        drift: X̂ᵀ(X - X̂), where X̂ are the activations and X those of the original model; None
            where they are the same.
        held: the gram of the tokens that were kept aside; None where there were none.
        tokens, held_tokens: how many tokens are in ``gram``, and in ``held``.
        padding_counted: there was padding, but no way to tell it in these activations.
        note: what else is worth knowing of the gram.
    """

    sites: list[Site]
    pending: set[fx.Node] = field(default_factory=set)
    gram: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    held: torch.Tensor | None = None
    tokens: int = 0
    held_tokens: int = 0
    padding_counted: bool = False
    note: str = ""

    @property
    def collected(self) -> torch.Tensor:
        """The gram of a site that a token has reached, until the caller is done with it."""
        if self.gram is None:
            raise RuntimeError("no activation was taken, or the gram was let go of")
        return self.gram

    def add(
        self,
        tokens: torch.Tensor,
        counted: torch.Tensor | None,
        *,
        original: torch.Tensor | None = None,
        holdout: float = 0.0,
    ) -> None:
        """Add an activation ``[tokens, in]``.

        Args:
            tokens: X, or X̂ of a model that is partly quantized.
            counted: the indices of the rows that count, ascending; None where all do.
            original: X of the original model, for ``drift``.
            holdout: the share of the tokens that count which goes into ``held`` instead: the last
                ones, since single tokens here and there would be too much like their neighbours.
        """
        count = len(tokens) if counted is None else len(counted)
        fitted = count - held_out(count, holdout)
        used, rows = _part(tokens, counted, slice(fitted))
        if self.gram is None:
            self.gram = self.zeros(tokens.device)
        add_to_gram(self.gram, used, rows)
        self.tokens += fitted
        if original is not None:
            if self.drift is None:
                self.drift = self.zeros(tokens.device)
            add_to_drift(self.drift, used, original[: len(used)], rows)
        if fitted < count:
            if self.held is None:
                self.held = self.zeros(tokens.device)
            add_to_gram(self.held, *_part(tokens, counted, slice(fitted, None)))
            self.held_tokens += count - fitted

    def damping(self, config: MagRConfig) -> float:
        """The share of mean(diag G) that is added to G to solve with, by the number of tokens."""
        return config.regularisation(self.tokens, self.sites[0].shape[1])

    @property
    def notes(self) -> str:
        """What the report should say of the gram."""
        padding = "padding is counted: the input's shape does not tell which tokens are padding"
        notes = (padding if self.padding_counted else "", self.note)
        return "; ".join(note for note in notes if note)

    def free_matrices(self) -> None:
        """Free the matrices: the sites are done with."""
        self.gram = self.drift = self.held = None

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A matrix ``[in, in]`` to sum in."""
        size = self.sites[0].shape[1]
        return torch.zeros(size, size, dtype=torch.float32, device=device)


_MATRICES = ("gram", "drift", "held")
_NUMBERS = ("tokens", "held_tokens", "padding_counted")


def add_up(grams: Sequence[SharedGram], ranks: Ranks) -> None:
    """Give each of them what was taken on all ranks, on every rank.

    The matrices are summed in float32. Where nothing was taken on any rank there is still none.
    """
    if ranks.world == 1 or not grams:
        return
    found = torch.tensor(
        [
            [int(getattr(shared, key) is not None) for key in _MATRICES]
            + [int(getattr(shared, key)) for key in _NUMBERS]
            for shared in grams
        ],
        device="cpu",
    )
    ranks.sum(found)
    for shared, (*matrices, tokens, held_tokens, padding) in zip(
        grams, found.tolist(), strict=True
    ):
        for key, anywhere in zip(_MATRICES, matrices, strict=True):
            if anywhere:
                if getattr(shared, key) is None:
                    setattr(shared, key, shared.zeros(shared.sites[0].parameter.device))
                ranks.sum(getattr(shared, key))
        shared.tokens, shared.held_tokens = tokens, held_tokens
        shared.padding_counted = padding > 0


def held_out(count: int, holdout: float) -> int:
    """How many of so many tokens of one activation are kept aside: never all of them."""
    return min(int(holdout * count), max(count - 1, 0))


def _part(
    tokens: torch.Tensor, counted: torch.Tensor | None, part: slice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the tokens that count, those in ``part``: an activation, and which of its rows."""
    return (tokens[part], None) if counted is None else (tokens, counted[part])
