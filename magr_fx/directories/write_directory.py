"""Rewritten weights → a directory like the one that they came from."""

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

# Tensors by the model's names → what is stored for them, by the names in the files.
Parts = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
_LEFT = (*WEIGHTS, ".*")  # files that are not copied
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Shards:
    """A directory's weights in the making: each is written as soon as it is finished.

    The shards have their names, headers and full sizes from the start, so that a disk without
    room for them is noticed before there is anything to lose. Names, dtypes and metadata are those
    of the origin, and so is every byte of what is not rewritten.

    Args:
        tensors: what the origin holds, see :func:`read_directory`.
        folder: where to write.

    Raises:
        OSError: there is no space, or no permission.
    """

    def __init__(self, tensors: dict[str, StoredTensor], folder: Path) -> None:
        self.tensors, self.folder = tensors, folder
        self._written: set[StoredTensor] = set()
        self._copies: dict[Path, Path] = {}
        source = next(iter(tensors.values())).file.parent
        for file in shards(source):
            self._copies[file] = folder / file.name
            _laid_out(file, folder / file.name)
        if folder / SINGLE not in self._copies.values():
            shutil.copyfile(source / INDEX, folder / INDEX)

    def write(self, name: str, weight: torch.Tensor) -> Path:
        """Write a tensor of the origin anew, in the dtype it has there; the shard that has it."""
        stored = self.tensors[name]
        overwrite(self._copies[stored.file], stored, weight)
        self._written.add(stored)
        return self._copies[stored.file]

    def finish(self) -> None:
        """Copy what was not written."""
        for file, made in self._copies.items():
            with file.open("rb") as origin, made.open("r+b") as own:
                for stored in read_header(file).values():
                    if stored not in self._written:
                        copy_bytes(origin, own, stored.start, stored.stop)


class StoredWeights(Mapping[str, torch.Tensor]):
    """The weights of a model that is offloaded to disk: read where they are, never written.

    Takes the place of accelerate's OffloadedWeightsLoader, whose ``index`` says where the values of
    each weight are.

    Args:
        weights: accelerate's loader.
    """

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        # What is known of accelerate's loader elsewhere.
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
        """Let go of a weight that changed: another rank writes it."""


class RewrittenWeights(StoredWeights):
    """The same, written to shards when they change.

    Those of a weight that transformers made of several stored tensors (fused experts) are in a file
    that it wrote itself; that file is overwritten too.

    Args:
        weights: accelerate's loader.
        shards: where weights are written to when they change.
        parts: takes weights apart into what is stored for them.
    """

    def __init__(self, weights: Any, shards: Shards, parts: Parts) -> None:
        super().__init__(weights)
        self._shards, self._parts = shards, parts
        self._stored = {name: stored_as(name, self.index, shards.tensors) for name in self.index}

    def check(self, name: str, like: torch.Tensor) -> None:
        """Whether a weight can be written as it was stored.

        Raises:
            ModelError: transformers cannot take it apart.
        """
        if self._stored[name] is not None:
            return
        file = Path(self.index[name].get("safetensors_file") or "")
        if not (self.save_folder and file.is_relative_to(self.save_folder)):
            raise ModelError(
                f"transformers reads {name} from {file}, which is not where the files' names and "
                "headers say; load the model with transformers, save_pretrained it anew, and give "
                "that directory"
            )
        try:
            parts = {key: part.shape for key, part in self._parts({name: like}).items()}
            wrong = [
                key for key, shape in parts.items() if self._shards.tensors[key].shape != shape
            ]
        except Exception as error:  # whatever a conversion raises of what it does not have
            wrong, parts = [f"{type(error).__name__}: {error}"], {}
        if wrong or not parts:
            raise ModelError(
                f"{name} {tuple(like.shape)} is made of several stored tensors, and transformers "
                f"cannot take it apart by itself ({', '.join(wrong)}). Load the model with "
                "transformers, save it with save_pretrained(folder, save_original_format=False), "
                "and give that directory"
            )

    def store(self, name: str, weight: torch.Tensor) -> None:
        """Write a weight that changed to the shards; from now on it is read there."""
        key = self._stored[name]
        if key is not None:
            file = self._shards.write(key, weight)
            self.index[name] = {**self.index[name], "safetensors_file": str(file)}
            return
        for key, part in self._parts({name: weight}).items():
            self._shards.write(key, part)
        own = Path(self.index[name]["safetensors_file"])  # transformers', as check has made sure
        overwrite(own, read_header(own)[self.index[name]["weight_name"]], weight)


def stored_as(
    name: str, index: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> str | None:
    """The one tensor of a directory that a weight is; None where it is made of several.

    Args:
        name: the model's.
        index: of accelerate's OffloadedWeightsLoader.
        tensors: what the directory holds.
    """
    key: str = index[name].get("weight_name", name)
    file = index[name].get("safetensors_file")
    return key if key in tensors and str(tensors[key].file) == str(file) else None


def copy_rest(source: Path, folder: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Copy everything but weights: configuration, tokenizer, generation, licence.

    Args:
        source: a model's directory.
        folder: where its weights have been written.
        keep: files of ``folder`` that stay.
    """
    for path in _rest(source):
        if path.name in keep and (folder / path.name).exists():
            continue
        if path.is_dir():
            ignored = shutil.ignore_patterns(*_LEFT)
            shutil.copytree(path, folder / path.name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def check_rest(source: Path) -> None:
    """Whether :func:`copy_rest` could read all that it copies.

    Raises:
        ModelError: it could not; the message names the file.
    """
    pending = _rest(source)
    while pending:
        path = pending.pop()
        try:
            if path.is_dir():
                pending += _rest(path)
            elif path.exists() and not path.is_file():
                raise OSError("it is no regular file")
            else:
                path.open("rb").close()
        except OSError as error:
            raise ModelError(
                f"{path}, which is copied into OUT, cannot be read: {error.strerror or error}; "
                "mend or remove it"
            ) from error


def _rest(folder: Path) -> list[Path]:
    """What a directory holds beside weights and what is hidden."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in _LEFT)
    ]


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
    for path in (*folder.rglob("*"), folder):  # of directories the names in them
        fsync_path(path)
    folder.replace(out)
    fsync_path(out.absolute().parent)


def overwrite(file: Path, stored: StoredTensor, weight: torch.Tensor) -> None:
    """Write a tensor in its place in a file of safetensors, in the dtype that it has there."""
    plain = weight.to(_DTYPES[stored.dtype]).contiguous().flatten()
    with file.open("r+b") as opened:
        opened.seek(stored.start)
        opened.write(plain.view(torch.uint8).numpy().data)


def _laid_out(file: Path, copy: Path) -> None:
    """Make a file with the header of another one, and room for all of its tensors."""
    with file.open("rb") as origin, copy.open("wb") as made:
        length = int.from_bytes(origin.read(8), "little")
        copy_bytes(origin, made, 0, 8 + length)
        made.flush()
        preallocate(made, file.stat().st_size)
