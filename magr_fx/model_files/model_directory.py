"""Read which tensors a model's directory holds, from safetensors headers; no weight is read."""

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
# Files with weights in any format, and their indices.
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.index.json")


def find_model(name: str, *, weights: bool = True) -> Path:
    """The directory of a model; a model on the Hub is downloaded into the cache first.

    Args:
        name: a directory, or a name such as ``"HuggingFaceTB/SmolLM2-135M"``.
        weights: whether to download the weights as well as the other files.

    Raises:
        ModelError: it is no directory and cannot be downloaded; the message has the remedy.
    """
    folder = Path(name)
    try:
        if name and folder.is_dir():
            return folder
        exists = not name or folder.exists()
    except OSError as error:  # the name is too long, or a parent directory may not be read
        raise ModelError(
            f"{name} is not a directory: {error.strerror}; give a directory, or a model's name on "
            "the Hub"
        ) from error
    if exists or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(
            f"{name or 'MODEL, which is empty,'} is not a directory; give a directory, or a "
            "model's name on the Hub"
        )
    ignored = [pattern for pattern in WEIGHTS if weights is False or pattern not in _WANTED]
    return download(name, [*ignored, "original/*", "onnx/*"])


_WANTED = ("*.safetensors", "*.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a model's ``config.json``.

    Raises:
        ModelError: the file is missing or damaged, or says that the model is already quantized.
    """
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no {CONFIG}; give a directory that was downloaded, or was made by "
            "transformers' save_pretrained"
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
    """The part of a configuration that describes the text model."""
    text: dict[str, Any] = config.get("text_config") or config
    return text


def size_of(config: dict[str, Any], *names: str) -> int | None:
    """The first of these entries of the text model's configuration that is an int above 0."""
    values = map(text_config(config).get, names)
    return next((v for v in values if type(v) is int and v > 0), None)


def experts_of(config: dict[str, Any]) -> int | None:
    """The number of experts in a layer, by the configuration; None if there are none."""
    return size_of(config, "num_local_experts", "num_experts", "n_routed_experts")


def read_directory(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's safetensors files, by its name there.

    Raises:
        ModelError: there are no safetensors files, a file is missing, incomplete or damaged, the
            index does not match the files, or a download was interrupted. The message has the
            remedy.
    """
    unfinished = _unfinished(folder)
    if unfinished is not None:
        raise ModelError(
            f"{unfinished} is left over from an interrupted download; {DOWNLOAD}, or remove that "
            "file if all others are complete"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in shards(folder):
        own = read_header(file)
        try:
            with safe_open(file, framework="pt"):  # safetensors' own reader checks more
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} is not a valid safetensors file: {error}; {DOWNLOAD}"
            ) from error
        twice = next(iter(own.keys() & tensors.keys()), None)
        if twice is not None:  # readers disagree on which of the two is used
            raise ModelError(
                f"{twice} is stored twice, in {tensors[twice].file.name} and {file.name} of "
                f"{folder}; load the model with transformers, and save it again with "
                "save_pretrained"
            )
        tensors |= own
    if not (folder / SINGLE).is_file():
        _check_index(folder, {name: t.file.name for name, t in tensors.items()})
    return tensors


def _check_index(folder: Path, found: dict[str, str]) -> None:
    """Check that the index names exactly the tensors found, each with the file that holds it.

    Raises:
        ModelError: the index and the files differ; the message names the first such tensor.
    """
    index = _weight_map(folder)
    for name in sorted(index.keys() | found.keys()):
        named, there = index.get(name), found.get(name)
        if named != there:
            says = "does not name it" if named is None else f"says that it is in {named}"
            is_in = "in no file" if there is None else f"in {there}"
            raise ModelError(
                f"{name} is {is_in}, but {folder / INDEX} {says}: the index belongs to another "
                f"model, or is damaged; {DOWNLOAD}, or load the model with transformers, and save "
                "it again with save_pretrained"
            )


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's map: name of a tensor → name of the file that holds it.

    Raises:
        ModelError: the index cannot be read.
    """
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}; {DOWNLOAD}") from error


def _unfinished(folder: Path) -> Path | None:
    """The part of an unfinished download, if there is one.

    The Hub's client puts a file's etag into the name of its ``.incomplete`` part, and into the
    second line of a ``.metadata`` file once the download is complete. It starts from the beginning
    after an interruption, so that old parts of files that are complete by now may be left over.
    """
    files = (path for path in folder.rglob("*.metadata") if path.is_file())
    # Other programs may write .metadata files too, in any format.
    notes = (path.read_text(encoding="utf-8", errors="replace").split("\n") for path in files)
    whole = {note[1] for note in notes if len(note) > 1}
    parts = sorted(folder.rglob("*.incomplete"))
    return next((part for part in parts if not whole & set(part.name.split("."))), None)


def shards(folder: Path) -> list[Path]:
    """The safetensors files with a model's weights, chosen as transformers chooses them.

    These are ``model.safetensors`` if it exists, and otherwise the files that the index names.

    Raises:
        ModelError: there are no such files, or some are missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.exists():
        files = [folder / file for file in sorted(set(_weight_map(folder).values()))]
        if not files:
            raise ModelError(f"{folder} has no weights: {INDEX} names no file; {DOWNLOAD}")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names, "
                f"such as {missing[0]}; {DOWNLOAD}"
            )
        return files
    for file in (folder / SINGLE, index):
        if os.path.lexists(file):
            raise ModelError(
                f"{file} is not a file: it is a broken link or a directory; {DOWNLOAD}"
            )
    other = next((f.name for p in WEIGHTS for f in sorted(folder.glob(p))), None)
    if other is None:
        raise ModelError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; {DOWNLOAD}")
    raise ModelError(
        f"{folder} has {other} but neither {SINGLE} nor {INDEX}: load it with transformers, and "
        "save it again with save_pretrained, which writes safetensors"
    )
