"""A tiny Llama with a tokenizer as a directory of transformers, and a text that it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from magr_fx.machine.safetensors_header import StoredTensor

WORDS = [f"w{at}" for at in range(VOCABULARY - 1)]


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: at for at, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def save_model(folder: Path, model: Any = None, **options: Any) -> Path:
    """Save a model, by default :func:`tiny_llama`, with a tokenizer."""
    model = tiny_llama(num_hidden_layers=2) if model is None else model
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def save_text(file: Path, tokens: int = 400) -> Path:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, len(WORDS), (tokens,), generator=generator).tolist()
    file.write_text(" ".join(WORDS[i] for i in ids), encoding="utf-8")
    return file


def largest_layer(tensors: dict[str, StoredTensor]) -> int:
    """Bytes of the largest part that is worked on at once: a numbered layer, or a tensor outside.

    Layers go by the first number in a name: ``model.layers.3.mlp.up_proj.weight`` is in layer 3.
    """
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
        layer = ".".join(parts[: number + 1])
        sizes[layer] = sizes.get(layer, 0) + tensor.nbytes
    return max(sizes.values(), default=0)
