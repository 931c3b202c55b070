"""Write rewritten weights into a directory with the same files as the original model's."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from magr_fx.errors import ModelError
from magr_fx.machine.disk import copy_bytes, fsync_path, preallocate
from magr_fx.machine.safetensors_header import StoredTensor, read_header
from magr_fx.model_files.model_directory import (
    CONFIG,
    INDEX,
    SINGLE,
    WEIGHTS,
    read_directory,
    shards,
)

# Tensors by the model's names → the tensors stored for them, by their names in the files.
Parts = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
_NOT_COPIED = (*WEIGHTS, ".*")  # patterns of the files that are not copied
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Shards:
    """New shards for a model's weights; each weight is written as soon as it is rewritten.

    The shards get their headers and full sizes at the start, so that a full disk is noticed before
    any work is done. Files, names, dtypes and metadata are those of the original model, and every
    tensor that is not rewritten is copied byte for byte.

    Args:
        tensors: the original model's tensors, see :func:`read_directory`.
        folder: the directory to write the shards into.

    Raises:
        OSError: the disk is full, or the directory may not be written.
    """

    def __init__(self, tensors: dict[str, StoredTensor], folder: Path) -> None:
        self.tensors, self.folder = tensors, folder
        self._written: set[StoredTensor] = set()
        self._copies: dict[Path, Path] = {}
        source = next(iter(tensors.values())).file.parent
        for file in shards(source):
            self._copies[file] = folder / file.name
            _preallocated_copy(file, folder / file.name)
        if folder / SINGLE not in self._copies.values():
            shutil.copyfile(source / INDEX, folder / INDEX)

    def write(self, name: str, weight: torch.Tensor) -> Path:
        """Write a tensor's new values in its stored dtype, and return the shard that holds it."""
        stored = self.tensors[name]
        overwrite(self._copies[stored.file], stored, weight)
        self._written.add(stored)
        return self._copies[stored.file]

    def finish(self) -> None:
        """Copy the tensors that were not rewritten."""
        for file, made in self._copies.items():
            with file.open("rb") as origin, made.open("r+b") as own:
                for stored in read_header(file).values():
                    if stored not in self._written:
                        copy_bytes(origin, own, stored.start, stored.stop)


class StoredWeights(Mapping[str, torch.Tensor]):
    """The weights of a model that is offloaded to disk, read only.

    It replaces accelerate's OffloadedWeightsLoader, whose ``index`` says which file holds the
    values of each weight.

    Args:
        weights: accelerate's loader.
    """

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        # The attributes of accelerate's loader that other modules read.
        self.index: dict[str, dict[str, Any]] = weights.index
        self.state_dict, self.save_folder = weights.state_dict, weights.save_folder

    def __getitem__(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._weights[name]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def store(self, name: str, weight: torch.Tensor) -> None:
        """Discard a rewritten weight: another rank writes it."""


class RewrittenWeights(StoredWeights):
    """The weights of a model that is offloaded to disk; rewritten ones go to the new shards.

    A weight that transformers made of several stored tensors (fused experts) is also in a file of
    its offload folder, and is overwritten there too.

    Args:
        weights: accelerate's loader.
        shards: the shards that rewritten weights are written to.
        parts: splits weights into the tensors that are stored for them.
    """

    def __init__(self, weights: Any, shards: Shards, parts: Parts) -> None:
        super().__init__(weights)
        self._shards, self._parts = shards, parts
        self._stored = {name: stored_as(name, self.index, shards.tensors) for name in self.index}

    def check(self, name: str, like: torch.Tensor) -> None:
        """Check that a weight can be written in the form in which it is stored.

        Args:
            name: the model's name for the weight.
            like: a tensor of its shape and dtype; it may be on the meta device.

        Raises:
            ModelError: transformers cannot split it into the stored tensors.
        """
        if self._stored[name] is not None:
            return
        file = Path(self.index[name].get("safetensors_file") or "")
        if not (self.save_folder and file.is_relative_to(self.save_folder)):
            raise ModelError(
                f"transformers reads {name} from {file}, but by the headers of the model's files "
                "it is not stored there. Load the model with transformers, save it again with "
                "save_pretrained, and give that directory"
            )
        try:
            parts = {key: part.shape for key, part in self._parts({name: like}).items()}
            wrong = [
                key for key, shape in parts.items() if self._shards.tensors[key].shape != shape
            ]
        except Exception as error:  # a conversion can raise anything if a tensor is missing
            wrong, parts = [f"{type(error).__name__}: {error}"], {}
        if wrong or not parts:
            raise ModelError(
                f"{name} {tuple(like.shape)} is made of several stored tensors, and transformers "
                f"cannot split it into these ({', '.join(wrong)}). Load the model with "
                "transformers, save it with save_pretrained(folder, save_original_format=False), "
                "and give that directory"
            )

    def store(self, name: str, weight: torch.Tensor) -> None:
        """Write a rewritten weight to the shards; from now on it is read from there."""
        key = self._stored[name]
        if key is not None:
            file = self._shards.write(key, weight)
            self.index[name] = {**self.index[name], "safetensors_file": str(file)}
            return
        for key, part in self._parts({name: weight}).items():
            self._shards.write(key, part)
        own = Path(self.index[name]["safetensors_file"])  # in the offload folder, see check
        overwrite(own, read_header(own)[self.index[name]["weight_name"]], weight)


def stored_as(
    name: str, index: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> str | None:
    """The name of the stored tensor that a weight is read from; None if it is made of several.

    Args:
        name: the model's name for the weight.
        index: the index of accelerate's OffloadedWeightsLoader.
        tensors: the directory's tensors.
    """
    key: str = index[name].get("weight_name", name)
    file = index[name].get("safetensors_file")
    return key if key in tensors and str(tensors[key].file) == str(file) else None


def copy_rest(source: Path, folder: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Copy everything except weights and hidden files: configuration, tokenizer, licence, ...

    Args:
        source: the model's directory.
        folder: the directory that its new weights are in.
        keep: names of files that are not copied if ``folder`` has them.
    """
    for path in _rest(source):
        if path.name in keep and (folder / path.name).exists():
            continue
        if path.is_dir():
            ignored = shutil.ignore_patterns(*_NOT_COPIED)
            shutil.copytree(path, folder / path.name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def check_rest(source: Path) -> None:
    """Check that :func:`copy_rest` can read every file that it copies.

    Raises:
        ModelError: a file cannot be read; the message names it.
    """
    pending = _rest(source)
    while pending:
        path = pending.pop()
        try:
            if path.is_dir():
                pending += _rest(path)
            elif path.exists() and not path.is_file():
                raise OSError("it is not a regular file")
            else:
                path.open("rb").close()
        except OSError as error:
            raise ModelError(
                f"{path}, which would be copied into OUT, cannot be read: "
                f"{error.strerror or error}; repair or remove it"
            ) from error


def _rest(folder: Path) -> list[Path]:
    """The files and folders in a directory, without weights and hidden files."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_COPIED)
    ]


def publish(folder: Path, out: Path) -> None:
    """Move a complete directory to ``out``, atomically and durably.

    Raises:
        ModelError: the directory is not complete.
        OSError: ``out`` exists and is not empty, or the file system fails.
    """
    if not (folder / CONFIG).exists():
        raise ModelError(f"{folder} has no {CONFIG}; this is a bug in magr-fx, please report it")
    if (folder / CONFIG).read_bytes().find(b"quantization_config") < 0:
        read_directory(folder)
    for path in (*folder.rglob("*"), folder):  # fsync of a directory stores the names in it
        fsync_path(path)
    folder.replace(out)
    fsync_path(out.absolute().parent)


def overwrite(file: Path, stored: StoredTensor, weight: torch.Tensor) -> None:
    """Overwrite a tensor's values in a safetensors file, in the dtype that it has there."""
    plain = weight.to(_DTYPES[stored.dtype]).contiguous().flatten()
    with file.open("r+b") as opened:
        opened.seek(stored.start)
        opened.write(plain.view(torch.uint8).numpy().data)


def _preallocated_copy(file: Path, copy: Path) -> None:
    """Make a safetensors file with the header and the size of another one."""
    with file.open("rb") as origin, copy.open("wb") as made:
        length = int.from_bytes(origin.read(8), "little")
        copy_bytes(origin, made, 0, 8 + length)
        made.flush()
        preallocate(made, file.stat().st_size)
