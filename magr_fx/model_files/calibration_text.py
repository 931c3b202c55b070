"""Read calibration batches of token ids from a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError, brief

BATCH = 4  # windows per batch
# Of so many batches for a calibration one has windows that are so many times shorter, and as many
# more of them; but none is shorter than so many tokens.
ONE_OF, SHORTER, SHORTEST = 4, 8, 32


def calibration_batches(tokenizer: Any, file: Path, *, tokens: int, length: int) -> list[Tensor]:
    """Batches ``[windows, length]`` of int64 token ids, a quarter of them with shorter windows.

    Many models give the first token of a window a part of its own, which all later ones rely on. A
    quantized model does that well only if the calibration has enough first tokens: of windows of
    512 tokens 1 in 512, and with a quarter of the tokens in windows of 64 1 in 186.

    Args, raises: as for :func:`text_batches`.
    """
    count = max(1, -(-tokens // (BATCH * length)))
    short = count // ONE_OF if length // SHORTER >= SHORTEST else 0
    batches = text_batches(tokenizer, file, tokens=(count - short) * BATCH * length, length=length)
    if short:
        own = length // SHORTER
        batch = -(-BATCH * length // own)
        batches += text_batches(
            tokenizer, file, tokens=short * batch * own, length=own, batch=batch
        )
    return batches


def text_batches(
    tokenizer: Any, file: Path, *, tokens: int, length: int, batch: int = BATCH
) -> list[Tensor]:
    """Batches ``[batch, length]`` of int64 token ids: windows that are spread evenly over the text.

    If the tokenizer begins a text with a special token (BOS or CLS), so does each window.

    Args:
        tokenizer: the model's tokenizer, of transformers.
        file: a UTF-8 text file.
        tokens: the number of tokens in all batches; it is rounded up to whole batches.
        length: the number of tokens in a window.
        batch: the number of windows in a batch.

    Raises:
        CalibrationError: the file cannot be read or tokenized, or has too few tokens.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{file} cannot be read as text: {error}; give a text file in UTF-8"
        ) from error
    if "\0" in text:
        raise CalibrationError(
            f"{file} cannot be read as text: it has zero bytes, like a binary file or UTF-16; "
            "give a text file in UTF-8"
        )
    try:
        # verbose=False suppresses the warning that the text is longer than the model's context.
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor(found, dtype=torch.long, device="cpu")
        begin = _first_tokens(tokenizer)
    except Exception as error:  # a tokenizer can raise anything for text it has no token for
        raise CalibrationError(
            f"the model's tokenizer cannot read {file}: {brief(error)}; give another text, or "
            "repair the tokenizer"
        ) from error
    windows = max(1, -(-tokens // (batch * length))) * batch
    own = length - len(begin)
    if len(ids) < windows * own:
        raise CalibrationError(
            f"{file} has {len(ids):,} tokens, but {windows * own:,} are needed; ask for fewer "
            "tokens or shorter windows, or give a longer text"
        )
    starts = [i * (len(ids) - own) // max(1, windows - 1) for i in range(windows)]
    cut = torch.stack([torch.cat([begin, ids[at : at + own]]) for at in starts])
    return list(torch.split(cut, batch))


def _first_tokens(tokenizer: Any) -> Tensor:
    """The special token that the tokenizer begins a text with, ``[0]`` or ``[1]`` int64."""
    first, plain = (
        tokenizer("a", add_special_tokens=special)["input_ids"][:1] for special in (True, False)
    )
    return torch.tensor([] if first == plain else first, dtype=torch.long, device="cpu")
