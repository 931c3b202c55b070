"""What do zero points that are not rounded gain on real layers? Writes zero_points.md.

    python benchmarks/zero_points.py

16 matrices of SmolLM2-135M (q, o, gate and down of four blocks), each on its original inputs, with
the alpha, clip and damping that magr_quantize takes. The error is squared and relative, on held-out
tokens, and a mean over the matrices. Whole zero points are torchao's. About 6 minutes on one core.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import mean

import torch
from layers import language_model, real_layers
from quality import config
from solver import align
from texts import DATA, TEXT, random_windows
from torch import Tensor

from magr_fx import MagRConfig
from magr_fx.config import QuantizeOptions
from magr_fx.grams.gram import damped, output_error, within_range
from magr_fx.passes.handover.target import Target
from magr_fx.passes.handover.torchao_rounding import TorchaoRounding
from magr_fx.passes.rewriting.quantized_weights import choose_rows
from magr_fx.rounding.gptq import compensation

from language_model import token_batches  # isort: skip

BLOCKS = (2, 9, 17, 26)
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
CELLS = [(2, 0), (2, 64), (3, 0), (3, 64), (4, 0)]
DAMPING = 0.1


def matrices() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weight, gram of the calibration and gram of the held-out tokens."""
    model, tokenizer = language_model()
    texts = (
        random_windows(tokenizer, TEXT, count=32, seed=0),
        token_batches(tokenizer, DATA / "sotu_heldout.txt", tokens=8192, length=512, device="cpu"),
    )
    parameters = dict(model.named_parameters())
    names = [f"model.layers.{block}.{part}.weight" for block in BLOCKS for part in PARTS]
    grams = [
        {
            name: layer.gram
            for layer in real_layers(copy.deepcopy(model), batches)
            for name in layer.names
        }
        for batches in texts
    ]
    return [(parameters[name].detach(), grams[0][name], grams[1][name]) for name in names]


def measure(
    layers: list[tuple[Tensor, Tensor, Tensor]], bits: int, group: int, rounding: str, *, free: bool
) -> tuple[float, float]:
    """The mean squared error on held-out tokens, and seconds."""
    target = Target(config(bits, group), QuantizeOptions(rounding), free)
    solving = MagRConfig(alpha="auto", group_size=group or None)
    errors, start = [], time.process_time()
    for weight, gram, held in layers:
        damped_gram = within_range(damped(gram, DAMPING))
        factor = compensation(damped_gram, by_activation=True) if rounding == "gptq" else None
        torchao = TorchaoRounding(target.config, [len(weight)])
        _, choice = choose_rows(weight, weight, damped_gram, torchao, solving, target, factor)
        errors.append(output_error(choice.rounded.values - weight, weight, held) ** 2)
    return mean(errors), time.process_time() - start


def main() -> None:
    layers = matrices()
    rows = []
    for rounding in ("nearest", "gptq"):
        for bits, group in CELLS:
            whole, before = measure(layers, bits, group, rounding, free=False)
            free, after = measure(layers, bits, group, rounding, free=True)
            where = f"groups of {group}" if group else "per channel"
            rows.append([
                f"{rounding}, int{bits}, {where}", f"{whole:.5f}", f"{free:.5f}",
                f"{free / whole - 1:+.0%}", f"{before:.0f}", f"{after:.0f}",
            ])  # fmt: skip
            print(rows[-1], flush=True)
    header = ["", "whole", "free", "change", "seconds, whole", "seconds, free"]
    text = (
        "Squared relative output error on held-out tokens, mean over 16 matrices of SmolLM2-135M; "
        f"seconds of the processor for all of them. torch {torch.__version__}.\n\n"
    )
    text += align(header, rows) + "\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
