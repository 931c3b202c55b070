"""Write a model with quantized weights into a directory that transformers loads.

The format is that of transformers' own ``save_pretrained`` with a ``TorchAoConfig``: torchao
splits each of its tensors into plain ones, and the metadata of every file says how to join them;
or that of compressed-tensors. Unlike with ``save_pretrained``, only one shard at a time is in
memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from magr_fx.machine.safetensors_header import StoredTensor
from magr_fx.model_files.model_directory import CONFIG, INDEX
from magr_fx.passes.graphs.torchao_private import flatten_tensor_state_dict

# Bytes of original weights in one shard, unless one weight is larger. A shard is in memory.
SHARD = 512 * 2**20


# Tensors by name, quantized or not → plain tensors, and metadata for the file.
Flatten = Callable[[dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, str]]]


def write_quantized(
    tensors: dict[str, StoredTensor],
    quantized: Mapping[str, list[str]],
    value: Callable[[str], torch.Tensor],
    stored_as: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    folder: Path,
    *,
    flatten: Flatten = flatten_tensor_state_dict,
    progress: bool | None = None,
) -> set[str]:
    """Write every tensor of a model, some of them quantized.

    Args:
        tensors: the tensors of the model's directory, see
            :func:`magr_fx.model_files.model_directory.read_directory`.
        quantized: the weights to quantize: name in the directory → the model's names for it.
        value: the model's name for a weight → torchao's tensor, or the weight itself if torchao
            does not quantize it.
        stored_as: tensors by the model's names → the same tensors by their names in the files.
        folder: the directory to write into.
        flatten: makes plain tensors of quantized ones; by default in torchao's format.
        progress: whether to show a bar; None shows it on a terminal.

    Returns:
        The model's names of the weights that torchao has quantized.

    Raises:
        OSError, SafetensorError: the disk is full, or the directory may not be written.
    """
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda stored: stored.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
    ).filename_to_tensors
    metadata: dict[str, str] = {}
    files: dict[str, str] = {}
    done: set[str] = set()
    names: list[str] = []
    hidden = None if progress is None else not progress
    for file, shard in tqdm(shards.items(), "MagR save", unit="shard", disable=hidden):
        flat: dict[str, torch.Tensor] = {}
        for key in shard:
            own = {name: value(name).detach() for name in quantized.get(key, ())}
            flat_own, described = flatten(own or {key: _plain(tensors[key], key)})
            names += json.loads(described.pop("tensor_names", "[]"))
            metadata |= described
            done |= {name for name, one in own.items() if type(one) is not torch.Tensor}
            flat |= stored_as(flat_own) if own else flat_own
        save_file(flat, folder / file)
        files |= dict.fromkeys(flat, file)
    # The metadata of every file must list the names of all files, as a reader may use only one.
    metadata |= {"tensor_names": json.dumps(names)} if names else {}
    metadata["format"] = "pt"
    for file in dict.fromkeys(files.values()):
        _describe(folder / file, metadata)
    if len(shards) > 1:
        size = sum((folder / file).stat().st_size for file in dict.fromkeys(files.values()))
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return done


def write_quantized_config(source: Path, folder: Path, quantization: dict[str, Any]) -> None:
    """Write the model's ``config.json`` with its ``quantization_config`` added."""
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(stored: StoredTensor, key: str) -> torch.Tensor:
    with safe_open(stored.file, framework="pt") as opened:
        value: torch.Tensor = opened.get_tensor(key)
    return value


def _describe(file: Path, metadata: dict[str, str]) -> None:
    """Replace the metadata of a safetensors file."""
    described = file.with_name(f"{file.name}.described")
    with file.open("rb") as plain, described.open("wb") as made:
        header = json.loads(plain.read(int.from_bytes(plain.read(8), "little")))
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        text += b" " * (-len(text) % 8)  # the tensors must begin at a multiple of eight bytes
        made.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(plain, made)
    described.replace(file)
