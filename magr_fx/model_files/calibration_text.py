"""A text file → calibration batches of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError, brief

BATCH = 4  # windows


def text_batches(
    tokenizer: Any, file: Path, *, tokens: int, length: int, batch: int = BATCH
) -> list[Tensor]:
    """Windows ``[batch, length]`` of token ids, spread evenly over the text.

    Args:
        tokenizer: of transformers.
        file: UTF-8 text.
        tokens: how many in all; the last batch is a whole one, so that there may be a few more.
        length: of a window.
        batch: windows in a batch.

    Raises:
        CalibrationError: the file cannot be read, or has fewer tokens.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{file} cannot be read as text: {error}; give one in UTF-8"
        ) from error
    if "\0" in text:
        raise CalibrationError(
            f"{file} cannot be read as text: it holds zero bytes, as binary files do, and UTF-16; "
            "give one in UTF-8"
        )
    try:
        # verbose=False: no warning that the whole text is longer than the model's context.
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor(found, dtype=torch.long, device="cpu")
    except Exception as error:  # whatever a tokenizer raises of what it has no token for
        raise CalibrationError(
            f"the model's tokenizer cannot read {file}: {brief(error)}; give another text, or "
            "mend the tokenizer"
        ) from error
    batches = max(1, -(-tokens // (batch * length)))
    windows = batches * batch
    if len(ids) < windows * length:
        raise CalibrationError(
            f"{file} has {len(ids):,} tokens, too few for {windows * length:,} of calibration; "
            "ask for fewer, in shorter windows, or give a longer text"
        )
    starts = torch.linspace(0, len(ids) - length, windows, dtype=torch.float32, device=ids.device)
    return list(torch.split(torch.stack([ids[at : at + length] for at in starts.long()]), batch))
