"""What a model's directory holds, by the headers of its safetensors; no weight is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from magr_fx.errors import ModelError
from magr_fx.machine.safetensors_header import DOWNLOAD, StoredTensor, read_header
from magr_fx.model_files.hub import download

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files that hold weights, whoever reads them.
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.index.json")


def find_model(name: str, *, weights: bool = True) -> Path:
    """The directory of a model: itself, or what is downloaded of a name on the Hub.

    Args:
        name: a directory, or a name such as ``"HuggingFaceTB/SmolLM2-135M"``.
        weights: whether to download them; else only what describes the model.

    Raises:
        ModelError: there is neither; the message says why, and what to do.
    """
    folder = Path(name)
    try:
        if name and folder.is_dir():
            return folder
        exists = not name or folder.exists()
    except OSError as error:  # too long a name, or a directory that is not to be looked into
        raise ModelError(
            f"{name} is no directory: {error.strerror}; give one, or a model's name on the Hub"
        ) from error
    if exists or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(
            f"{name or 'MODEL, which is empty,'} is no directory; give one, or a model's name on "
            "the Hub"
        )
    ignored = [pattern for pattern in WEIGHTS if weights is False or pattern not in _WANTED]
    return download(name, [*ignored, "original/*", "onnx/*"])


_WANTED = ("*.safetensors", "*.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        ModelError: it is missing or damaged, or of a model that is quantized already.
    """
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no {CONFIG}; give a directory that transformers' save_pretrained or a "
            "download made"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}; {DOWNLOAD}") from error
    if not (isinstance(config, dict) and isinstance(text_config(config), dict)):
        raise ModelError(f"{path} does not describe a model; {DOWNLOAD}")
    quantization = config.get("quantization_config")
    if quantization is not None:
        known = isinstance(quantization, dict)
        kind = quantization.get("quant_method") if known else None
        kind = kind or "an unknown method"
        raise ModelError(
            f"{folder} is already quantized, by {kind}; start from the full-precision model"
        )
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is of the text model."""
    text: dict[str, Any] = config.get("text_config") or config
    return text


def size_of(config: dict[str, Any], *names: str) -> int | None:
    """The first of these that is a whole number above 0, by the text model's configuration."""
    values = map(text_config(config).get, names)
    return next((v for v in values if type(v) is int and v > 0), None)


def experts_of(config: dict[str, Any]) -> int | None:
    """How many experts a layer has, by its configuration; None where there are none."""
    return size_of(config, "num_local_experts", "num_experts", "n_routed_experts")


def read_directory(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's safetensors, by its name there; all files are whole.

    Raises:
        ModelError: a file is missing, cut short or damaged, or is not what the index says, a
            download was interrupted, or there are no safetensors; the message has the remedy.
    """
    unfinished = _unfinished(folder)
    if unfinished is not None:
        raise ModelError(
            f"{unfinished} is left of an interrupted download; {DOWNLOAD}, or remove that file "
            "if all others are there"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in shards(folder):
        own = read_header(file)
        try:
            with safe_open(file, framework="pt"):  # whose reader knows more that may be wrong
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is no whole safetensors file: {error}; {DOWNLOAD}") from error
        twice = next(iter(own.keys() & tensors.keys()), None)
        if twice is not None:  # what reads them disagrees on which it is
            raise ModelError(
                f"{twice} is stored twice, in {tensors[twice].file.name} and {file.name} of "
                f"{folder}; load the model with transformers and save_pretrained it anew"
            )
        tensors |= own
    if not (folder / SINGLE).is_file():
        _check_index(folder, {name: t.file.name for name, t in tensors.items()})
    return tensors


def _check_index(folder: Path, found: dict[str, str]) -> None:
    """Whether the index names each tensor, and the file that it is in.

    Raises:
        ModelError: it names another one.
    """
    index = _weight_map(folder)
    for name in sorted(index.keys() | found.keys()):
        named, there = index.get(name), found.get(name)
        if named != there:
            says = "does not name it" if named is None else f"says that it is in {named}"
            is_in = "in no file" if there is None else f"in {there}"
            raise ModelError(
                f"{name} is {is_in}, and {folder / INDEX} {says}: that is of another model, or "
                f"damaged; {DOWNLOAD}, or load the model with transformers and save_pretrained "
                "it anew"
            )


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: in which file each tensor is.

    Raises:
        ModelError: it is damaged.
    """
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}; {DOWNLOAD}") from error


def _unfinished(folder: Path) -> Path | None:
    """Part of a file that was never downloaded as a whole.

    The Hub's client names a part by the file's etag, and notes the etag of what is whole in the
    second line of ``.metadata``. It begins anew after an interruption, so that parts of files that
    are whole by now stay where they are.
    """
    files = (path for path in folder.rglob("*.metadata") if path.is_file())
    # Others may have files of this name, in whatever form.
    notes = (path.read_text(encoding="utf-8", errors="replace").split("\n") for path in files)
    whole = {note[1] for note in notes if len(note) > 1}
    parts = sorted(folder.rglob("*.incomplete"))
    return next((part for part in parts if not whole & set(part.name.split("."))), None)


def shards(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as transformers takes them.

    The single one if there is one, else those that the index names.

    Raises:
        ModelError: there are none, or some are missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.exists():
        files = [folder / file for file in sorted(set(_weight_map(folder).values()))]
        if not files:
            raise ModelError(f"{folder} has no weights: {INDEX} names none; {DOWNLOAD}")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names, "
                f"{missing[0]} for one; {DOWNLOAD}"
            )
        return files
    for file in (folder / SINGLE, index):
        if os.path.lexists(file):
            raise ModelError(
                f"{file} is no file: a link to what is not there any more, or a directory; "
                f"{DOWNLOAD}"
            )
    other = next((f.name for p in WEIGHTS for f in sorted(folder.glob(p))), None)
    if other is None:
        raise ModelError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; {DOWNLOAD}")
    raise ModelError(
        f"{folder} has {other} but neither {SINGLE} nor {INDEX}: load it with transformers and "
        "save_pretrained it anew, which writes safetensors"
    )
