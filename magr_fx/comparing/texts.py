"""Two causal language models on the same text → how far apart their predictions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from magr_fx.comparing.inputs import Tokens, arguments_of
from magr_fx.comparing.next_token import Arguments, NextToken
from magr_fx.comparing.statistics import summarise
from magr_fx.comparing.token_scores import TokenScores, token_scores
from magr_fx.errors import CalibrationError, ModelError
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.reporting.comparison import Text

# Bytes of the logits that are worked on at a time: some ten tensors of their size, in float64.
BYTES = 2**25


def compare_text(
    original: NextToken,
    hidden_of: Callable[[int], Any],
    quantized: nn.Module,
    batches: Sequence[Batch],
    ranks: Ranks,
    progress: bool | None,
) -> Text:
    """Score every token that counts, and has one before it in its window.

    Args:
        original: the model, or its head.
        hidden_of: the number of a batch → the hidden states of the original's body.
        quantized: the other model.
        batches: with token ids.
        ranks: which share the batches.
        progress: whether to show a bar.

    Raises:
        CalibrationError, ModelError: see :func:`magr_fx.compare`.
    """
    judged, tokens = NextToken(quantized), Tokens(batches, quantized)
    first = [0, *accumulate(len(tokens.ids(batch)) for batch in batches)]  # windows of each batch
    none = torch.empty(0, dtype=torch.float64)
    parts = [TokenScores(none, none, none, none.bool(), none, none.long())]
    hidden = None if progress is None else not (progress and ranks.rank == 0)
    for at, batch in enumerate(tqdm(batches, "compare", unit="batch", disable=hidden)):
        if not ranks.owns(at):
            continue
        ids, counted = tokens.ids(batch), tokens.predicted(batch)
        window = torch.arange(first[at], first[at + 1])[:, None].expand(ids.shape)
        for part, *logits in _pieces(
            original, hidden_of(at), judged, arguments_of(batch, quantized)
        ):
            keep, numbers = counted[:, part], window[:, part]
            _check_logits(logits, ids, keep, numbers)
            p, q = (each[keep.to(each.device)] for each in logits)
            parts.append(token_scores(p, q.to(p.device), ids[:, 1:][:, part][keep], numbers[keep]))
    scores = TokenScores(*(ranks.concat(column) for column in TokenScores.joined(parts)))
    if not len(scores.loss):
        raise CalibrationError(
            "nothing is predicted in the batches to compare the models on: each window needs two "
            "tokens that count, one after the other"
        )
    return summarise(scores)


def _pieces(
    original: NextToken, hidden: Any, judged: NextToken, arguments: Arguments
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens at a time, and the logits of both models, ``[batch, tokens, vocabulary]``."""
    own = judged.hidden(arguments)
    batch, length = own.last_hidden_state.shape[:2]
    step = max(1, BYTES // (8 * batch * judged.vocabulary))
    for start in range(0, length - 1, step):  # nothing follows the last token
        part = slice(start, min(start + step, length - 1))
        yield (
            part,
            original.logits(hidden, part, arguments),
            judged.logits(own, part, arguments),
        )


def _check_logits(both: list[Tensor], ids: Tensor, keep: Tensor, window: Tensor) -> None:
    """Raise where logits cannot be compared; ``keep`` and ``window`` are of their tokens."""
    original, quantized = both
    if original.shape != quantized.shape:
        raise ModelError(
            f"the models have vocabularies of {original.shape[-1]:,} and {quantized.shape[-1]:,} "
            "tokens: compare a model with what was made of it"
        )
    if int(ids.max()) >= original.shape[-1]:
        raise CalibrationError(
            f"the batches hold the token {int(ids.max()):,}, and the models' vocabulary has "
            f"{original.shape[-1]:,}: use the model's own tokenizer"
        )
    for name, logits in (("original", original), ("quantized", quantized)):
        wrong = logits.isnan().any(-1).cpu() & keep
        if wrong.any():
            raise ModelError(
                f"the logits of the {name} model are NaN in window {int(window[wrong][0])}"
            )
