"""Texts as calibration: windows of two lengths, each begun as the tokenizer begins a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.model_files.calibration_text import calibration_batches, text_batches

BOS = 7


class Letters:
    """A tokenizer with a token for each letter, and perhaps one that begins a text."""

    def __init__(self, bos: int | None = None, eos: int | None = None) -> None:
        self.before, self.after = ([] if one is None else [one] for one in (bos, eos))

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        del verbose
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(32 + i * i % 90) for i in range(20_000)))
    return path


def sizes(batches: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(batch.shape) for batch in batches]


@pytest.mark.parametrize(
    ("tokens", "length", "wanted"),
    [
        (16_384, 512, [(4, 512)] * 6 + [(32, 64)] * 2),
        (8_192, 512, [(4, 512)] * 3 + [(32, 64)]),
        (6_144, 512, [(4, 512)] * 3),  # too few batches for a quarter
        (5_000, 256, [(4, 256)] * 4 + [(32, 32)]),
        (4_096, 248, [(4, 248)] * 5),  # the short windows would be too short
        (8_000, 500, [(4, 500)] * 3 + [(33, 62)]),  # no fewer tokens than were asked for
        (1, 16, [(4, 16)]),
    ],
)
def test_a_quarter_of_the_tokens_is_in_short_windows(
    file: Path, tokens: int, length: int, wanted: list[tuple[int, int]]
) -> None:
    batches = calibration_batches(Letters(), file, tokens=tokens, length=length)
    assert sizes(batches) == wanted
    assert sum(batch.numel() for batch in batches) >= tokens
    assert all(batch.dtype == torch.int64 for batch in batches)


def windows_are_of(text: str, batches: list[Tensor], begun: int) -> bool:
    return all(
        "".join(map(chr, window[begun:])) in text for batch in batches for window in batch.tolist()
    )


def test_windows_are_of_the_text_and_spread_over_it(file: Path) -> None:
    text = file.read_text()
    batches = calibration_batches(Letters(), file, tokens=8_192, length=512)
    assert windows_are_of(text, batches, 0)
    assert "".join(map(chr, batches[0][0].tolist())) == text[:512]
    assert "".join(map(chr, batches[-1][-1].tolist())) == text[-64:]


@pytest.mark.parametrize("read", [calibration_batches, text_batches])
def test_each_window_begins_as_the_tokenizer_begins_a_text(file: Path, read: Any) -> None:
    plain = read(Letters(), file, tokens=8_192, length=512)
    begun = read(Letters(bos=BOS), file, tokens=8_192, length=512)
    assert sizes(begun) == sizes(plain)
    assert all((batch[:, 0] == BOS).all() for batch in begun)
    assert not any((batch[:, 1:] == BOS).any() for batch in begun)
    assert windows_are_of(file.read_text(), begun, 1)


def test_a_very_long_text_is_cut_up_to_its_end() -> None:
    """float32 counts every token up to 2^24 only."""

    class Long(Letters):
        def __call__(self, text: str, **options: Any) -> Any:
            if text == "a":
                return super().__call__(text, **options)
            return {"input_ids": range(2**24 + 514)}

    file = Path(__file__)
    (last,) = text_batches(Long(bos=BOS), file, tokens=4 * 512, length=512)[-1:]
    assert last.shape == (4, 512)
    assert int(last[-1, -1]) == 2**24 + 513


def test_a_token_that_only_ends_a_text_begins_none(file: Path) -> None:
    batches = text_batches(Letters(eos=BOS), file, tokens=1_024, length=64)
    assert not any((batch == BOS).any() for batch in batches)


def test_what_begins_a_window_is_none_of_the_texts_tokens(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 60)  # 4 windows of 16, of which 15 are of the text
    (batch,) = text_batches(Letters(bos=BOS), path, tokens=64, length=16)
    assert batch.shape == (4, 16)
    with pytest.raises(CalibrationError, match="has 60 tokens, but 64 are needed"):
        text_batches(Letters(), path, tokens=64, length=16)
