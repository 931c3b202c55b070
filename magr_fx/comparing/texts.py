"""Two causal language models on the same text → how far apart their predictions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from magr_fx.comparing.inputs import running, text_arguments
from magr_fx.comparing.next_token import NextToken
from magr_fx.comparing.statistics import summarise
from magr_fx.comparing.token_scores import TokenScores, token_scores
from magr_fx.errors import CalibrationError, ModelError
from magr_fx.machine.memory import trim
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.finding.counted_tokens import Tokens
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
    tokens, judged = Tokens(batches, quantized), NextToken(quantized)
    first = check_predictable(batches, quantized)
    none = torch.empty(0, dtype=torch.float64)
    parts = [TokenScores(none, none, none, none.bool(), none, none.long())]
    # Bars of several ranks would overwrite each other.
    hide = ranks.rank > 0 or (None if progress is None else not progress)
    for at, batch in enumerate(tqdm(batches, "compare", unit="batch", disable=hide)):
        if not ranks.owns(at):
            continue
        ids, counted = tokens.ids(batch), tokens.predicted(batch)
        window = torch.arange(first[at], first[at + 1])[:, None].expand(ids.shape)
        arguments, hidden = text_arguments(batch, quantized), hidden_of(at)
        with running(quantized, batch):
            own = judged.hidden(arguments)
            for part in _parts(ids.shape[0], ids.shape[1] - 1, judged.vocabulary):
                both = (
                    original.logits(hidden, part, arguments),
                    judged.logits(own, part, arguments),
                )
                keep, numbers = counted[part], window[part]
                _check_logits(*both, keep, numbers)
                p, q = (each[keep.to(each.device)] for each in both)
                following = ids[:, 1:][part][keep]
                parts.append(token_scores(p, q.to(p.device), following, numbers[keep]))
                del both, p, q
                trim()  # glibc keeps blocks of up to 32 MB, and they pile up
    scores = TokenScores(*(ranks.concat(column) for column in TokenScores.joined(parts)))
    return summarise(scores)


def check_predictable(batches: Sequence[Batch], model: Any) -> list[int]:
    """Check that there is something to predict in the batches, before any model runs.

    Returns:
        The number of the first window of each batch, and one more.

    Raises:
        CalibrationError: no token is to be predicted, or one is not in the model's vocabulary.
    """
    tokens = Tokens(batches, model)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for batch in batches:
        largest = int(tokens.ids(batch).max())
        if rows is not None and largest >= rows:
            raise CalibrationError(
                f"batch {batch.index} holds the token {largest:,}, and the model's embedding has "
                f"{rows:,} rows: use the model's own tokenizer"
            )
    if not any(bool(tokens.predicted(batch).any()) for batch in batches):
        raise CalibrationError(
            "nothing is predicted in the batches to compare the models on: each window needs two "
            "tokens that count, one after the other"
        )
    return [0, *accumulate(len(tokens.ids(batch)) for batch in batches)]


def _parts(sequences: int, length: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a batch whose logits take about BYTES: some tokens of some sequences."""
    most = max(1, BYTES // (8 * vocabulary))
    together = min(sequences, most)
    step = max(1, most // together)
    for row in range(0, sequences, together):
        for start in range(0, length, step):  # nothing follows the last token
            yield slice(row, row + together), slice(start, min(start + step, length))


def _check_logits(original: Tensor, quantized: Tensor, keep: Tensor, window: Tensor) -> None:
    """Raise where logits cannot be compared; ``keep`` and ``window`` are of their tokens."""
    if original.shape != quantized.shape:
        raise ModelError(
            f"the models have vocabularies of {original.shape[-1]:,} and {quantized.shape[-1]:,} "
            "tokens: compare a model with what was made of it"
        )
    for name, logits in (("original", original), ("quantized", quantized)):
        # -inf rules a token out; +inf, or -inf for all tokens, is no distribution.
        wrong = ~(logits.amax(-1).isfinite().cpu()) & keep  # NaN, too
        if wrong.any():
            raise ModelError(
                f"the logits of the {name} model are NaN or infinite in window "
                f"{int(window[wrong][0])}"
            )
