"""Compare two models, given by name, on a text: ``magr-fx evaluate``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from magr_fx.comparing.compare import compare
from magr_fx.errors import ConfigError, ModelError, brief
from magr_fx.model_files.calibration_text import text_batches
from magr_fx.model_files.model_class import model_class
from magr_fx.model_files.model_directory import CONFIG, find_model
from magr_fx.reporting.comparison import Comparison


class Named(NamedTuple):
    """A model's directory, and the name of its GGUF file if the model is one."""

    folder: Path
    gguf: str | None

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``from_pretrained`` that select the GGUF file."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        if self.gguf is not None:
            return [self.folder / self.gguf]
        kinds = ([*self.folder.glob(kind)] for kind in ("*.safetensors", "*.bin", "*.pth", "*.pt"))
        return next((files for files in kinds if files), [])


def evaluate(
    quantized: str,
    original: str,
    text: Path,
    *,
    tokens: int,
    length: int,
    device: torch.device,
    progress: bool | None = None,
) -> Comparison:
    """Compare two models on a text, which is read with the tokenizer of the original model.

    If the tokenizer begins a text with a special token (BOS or CLS), so does each window.

    Args:
        quantized, original: directories, names on the Hub, or GGUF files.
        text: a UTF-8 text file.
        tokens: the approximate number of tokens to compare on.
        length: the number of tokens in a window.
        device: where both models are run.
        progress: whether to show a bar; None shows it on a terminal.

    Raises:
        MagRError: a model or the text cannot be read, or :func:`magr_fx.compare` failed.
    """
    places = [_named(name) for name in (original, quantized)]
    if places[0] == places[1]:
        raise ConfigError(
            f"{quantized} and {original} are the same model: --against must be the model before it "
            "was quantized"
        )
    batches = _windows(places[0], text, tokens=tokens, length=length)
    first, second = (_load(place, device) for place in places)
    found = compare(first, second, batches, progress=progress)
    disk = [sum(file.stat().st_size for file in place.files) for place in places]
    return replace(
        found,
        size=replace(found.size, disk=disk[1]),
        size_original=replace(found.size_original, disk=disk[0]),
    )


def _named(name: str) -> Named:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name} is not a file; give a GGUF file, a directory or a Hub name")
        return Named(path.parent.resolve(), path.name)
    return Named(find_model(name).resolve(), None)


def _windows(place: Named, text: Path, *, tokens: int, length: int) -> list[Tensor]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place.folder, trust_remote_code=False, **place.options
        )
    except Exception as error:  # transformers can raise anything here
        raise ModelError(
            f"{place.folder} has no tokenizer that transformers can load ({brief(error)}); copy "
            "its tokenizer files there"
        ) from error
    return text_batches(tokenizer, text, tokens=tokens, length=length)


def _load(place: Named, device: torch.device) -> Any:
    """The model as transformers loads it; it is quantized if its configuration says so."""
    config: dict[str, Any] = {}
    if place.gguf is None:
        try:
            config = json.loads((place.folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{place.folder / CONFIG} cannot be read: {error}") from error
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{place.folder} is an encoder with a decoder, which one text does not feed: call "
            "magr_fx.compare(original, quantized, batches) with inputs for both"
        )
    kind = model_class(config)
    try:
        model, info = kind.from_pretrained(
            place.folder,
            dtype="auto",
            trust_remote_code=False,
            output_loading_info=True,
            **place.options,
        )
    except Exception as error:  # transformers can raise anything for a model it does not know
        raise ModelError(
            f"transformers cannot load {place.folder} as {kind.__name__}: {brief(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random values
        raise ModelError(
            f"{place.folder} lacks {missing[0]}, and {len(missing) - 1} more tensors of "
            f"{type(model).__name__}: download or save the model again"
        )
    return model.eval().to(device)
