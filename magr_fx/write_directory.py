"""Rewritten weights → a directory like the one that they came from."""

from __future__ import annotations

import fnmatch
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from magr_fx.errors import ModelError
from magr_fx.model_directory import (
    CONFIG,
    INDEX,
    WEIGHTS,
    StoredTensor,
    largest_layer,
    read_directory,
)

# The least size of a shard where transformers writes them, each of which it has in memory.
SHARD = 512 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Origin:
    """Where each weight of a model that is offloaded to disk came from.

    To be made before the model is changed.

    Args:
        model: as ``from_pretrained(folder, device_map={"": "disk"})`` loads it.
        weights: accelerate's OffloadedWeightsLoader, which all of its modules share.
        tensors: what ``folder`` holds, see :func:`magr_fx.model_directory.read_directory`.
    """

    def __init__(self, model: Any, weights: Any, tensors: dict[str, StoredTensor]) -> None:
        self.model, self.tensors = model, tensors
        self._weights = weights
        self._entries = dict(weights.index)

    def changed(self) -> dict[str, str | None]:
        """The model's weights that are others now, with their names in the directory.

        None where it has no such tensor: transformers made the weight of several.
        """
        found: dict[str, str | None] = {}
        for name, entry in self._entries.items():
            if self._weights.index[name] is not entry:
                key = entry.get("weight_name")
                stored = None if key is None else self.tensors.get(key)
                same = stored is not None and str(stored.file) == str(entry["safetensors_file"])
                found[name] = key if same else None
        return found

    def write(self, folder: Path) -> None:
        """Write the weights as they are now.

        Shards, names, dtypes and metadata are those of the origin, and every byte of a weight that
        did not change; one weight is in memory at a time. Where transformers made weights of
        several tensors (fused experts), it writes them itself, in shards of 512 MiB, or as large
        as the largest layer, one of which is in memory at a time.

        Raises:
            OSError: there is no space, or no permission.
        """
        changed = self.changed()
        if None in changed.values():
            size = max(SHARD, largest_layer(self.tensors))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Attempting to save a model with offloaded")
                self.model.save_pretrained(folder, max_shard_size=size)
            return
        copies: dict[Path, Path] = {}
        for file in dict.fromkeys(tensor.file for tensor in self.tensors.values()):
            copies[file] = folder / file.name
            shutil.copyfile(file, copies[file])
        index = next(iter(self.tensors.values())).file.parent / INDEX
        if index.exists():
            shutil.copyfile(index, folder / INDEX)
        for name, key in changed.items():
            stored = self.tensors[key or name]
            _overwrite(copies[stored.file], stored, self._weights[name])


def copy_rest(source: Path, folder: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Copy everything but weights: configuration, tokenizer, generation, licence.

    Args:
        source: a model's directory.
        folder: where its weights have been written.
        keep: files of ``folder`` that stay.
    """
    for path in sorted(source.iterdir()):
        weights = any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHTS)
        if (
            weights
            or path.name.startswith(".")
            or (path.name in keep and (folder / path.name).exists())
        ):
            continue
        if path.is_dir():
            ignored = shutil.ignore_patterns(*WEIGHTS, ".*")
            shutil.copytree(path, folder / path.name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def publish(folder: Path, out: Path) -> None:
    """Give a directory that is whole its name, at once and for good.

    Raises:
        ModelError: it is not whole.
        OSError: ``out`` is there and is not empty, or the file system fails.
    """
    if not (folder / CONFIG).exists():
        raise ModelError(f"{folder} has no {CONFIG}; this is an error of magr-fx")
    if (folder / CONFIG).read_bytes().find(b"quantization_config") < 0:
        read_directory(folder)
    for path in (*_files(folder), folder):
        _flush(path)
    folder.replace(out)
    _flush(out.absolute().parent)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _overwrite(file: Path, stored: StoredTensor, weight: torch.Tensor) -> None:
    plain = weight.to(_DTYPES[stored.dtype]).contiguous().flatten()
    with file.open("r+b") as opened:
        opened.seek(stored.start)
        opened.write(plain.view(torch.uint8).numpy().data)
