"""SharedGram: the gram of the activations that several sites read."""

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
    """The gram of all activations X ``[tokens, in]`` that these sites read: G = XᵀX.

    Attributes:
        sites: the sites that read the activations.
        pending: the nodes before which activations are still to be captured.
        gram: G, ``[in, in]`` float32; None before the first activation, and after
            :meth:`free_matrices`.
        drift: X̂ᵀ(X - X̂), ``[in, in]`` float32. X̂ are the activations of the quantized model, which
            ``gram`` is then made of, and X the original ones; None without propagation.
        held: the gram of the held-out tokens, ``[in, in]`` float32; None if there are none.
        tokens, held_tokens: the number of tokens in ``gram``, and in ``held``.
        padding_counted: True if ``gram`` has padding tokens, because no mask fits the activations.
        note: a further remark for the report.
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
        """The gram, which must exist: an activation was added, and the matrices are not freed.

        Raises:
            RuntimeError: there is no gram.
        """
        if self.gram is None:
            raise RuntimeError("no activation was added, or the gram was freed")
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
            counted: the indices of the rows that count, ascending; None: all of them.
            original: X of the original model, for ``drift``.
            holdout: the share of the counted tokens that goes into ``held`` instead of ``gram``.
                These are the last ones, because single held-out tokens would be too similar to
                their neighbours in ``gram``.
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
        """The share of mean(diag G) that is added to G's diagonal; depends on the tokens."""
        return config.regularisation(self.tokens, self.sites[0].shape[1])

    @property
    def notes(self) -> str:
        """The remarks on the gram for the report, separated by semicolons."""
        padding = "padding is counted: the input's shape does not tell which tokens are padding"
        notes = (padding if self.padding_counted else "", self.note)
        return "; ".join(note for note in notes if note)

    def free_matrices(self) -> None:
        """Free the matrices when the sites are done."""
        self.gram = self.drift = self.held = None

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A matrix of zeros, ``[in, in]`` float32."""
        size = self.sites[0].shape[1]
        return torch.zeros(size, size, dtype=torch.float32, device=device)


_MATRICES = ("gram", "drift", "held")
_NUMBERS = ("tokens", "held_tokens", "padding_counted")


def add_up(grams: Sequence[SharedGram], ranks: Ranks) -> None:
    """Replace the matrices and counts of each gram by their sums over all ranks, on every rank.

    The matrices are summed in float32. A matrix that no rank has stays None.
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
    """How many of the ``count`` tokens of one activation are held out; never all of them."""
    return min(int(holdout * count), max(count - 1, 0))


def _part(
    tokens: torch.Tensor, counted: torch.Tensor | None, part: slice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The part of the counted tokens: an activation, and the indices of its rows (None: all)."""
    return (tokens[part], None) if counted is None else (tokens, counted[part])
