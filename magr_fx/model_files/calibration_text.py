"""Read calibration batches of token ids from a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError, brief

BATCH = 4  # windows per batch


def text_batches(
    tokenizer: Any, file: Path, *, tokens: int, length: int, batch: int = BATCH
) -> list[Tensor]:
    """Batches ``[batch, length]`` of int64 token ids: windows that are spread evenly over the text.

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
    except Exception as error:  # a tokenizer can raise anything for text it has no token for
        raise CalibrationError(
            f"the model's tokenizer cannot read {file}: {brief(error)}; give another text, or "
            "repair the tokenizer"
        ) from error
    batches = max(1, -(-tokens // (batch * length)))
    windows = batches * batch
    if len(ids) < windows * length:
        raise CalibrationError(
            f"{file} has {len(ids):,} tokens, but {windows * length:,} are needed; ask for fewer "
            "tokens or shorter windows, or give a longer text"
        )
    starts = torch.linspace(0, len(ids) - length, windows, dtype=torch.float32, device=ids.device)
    return list(torch.split(torch.stack([ids[at : at + length] for at in starts.long()]), batch))
