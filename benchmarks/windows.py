"""Does a quantized model lose a little everywhere, or everything in a few windows of the text?

    python benchmarks/windows.py            # int2, groups of 64, GPTQ: 6 minutes on a core
    python benchmarks/windows.py --bits 3 --group 0

For each window of 512 tokens of the two evaluation texts: the loss of SmolLM2-135M before and
after magr_quantize, and how large the hidden state of the first token is after some blocks, which
all other tokens attend to. Writes its table to benchmarks/windows.md.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from quality import Run, language_model_subject, ours
from solver import align
from torch import Tensor, nn
from torch.nn import functional

# After these the original's first token is: ordinary again; massive; so to the end.
BLOCKS = (10, 11, 20)


@torch.no_grad()
def windows(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each window in nats per token, and the norm of its first token after BLOCKS."""
    norms: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        hidden = output[0] if isinstance(output, tuple) else output
        norms.append(hidden[:, 0].norm(dim=-1))

    layers: Any = model.get_submodule("model.layers")
    handles = [layers[block].register_forward_hook(keep) for block in BLOCKS]
    logits = model(tokens).logits[:, :-1].transpose(1, 2)
    for handle in handles:
        handle.remove()
    return functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1), torch.stack(
        norms
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64, help="0: per channel")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = language_model_subject()
    run = Run(subject, args.bits, args.group, 0, [], [])
    models = {"original": subject.model, "quantized": ours(run, rounding="gptq")}
    rows = []
    for text, batches in subject.texts.items():
        tokens = torch.cat(batches)
        found = [windows(model, tokens) for model in models.values()]
        for at in range(len(tokens)):
            losses = [f"{loss[at]:.2f}" for loss, _ in found]
            first = [f"{norm[block, at]:,.0f}" for block in range(len(BLOCKS)) for _, norm in found]
            rows.append([f"{text}, {at + 1}", *losses, *first])
    header = ["window", *(f"{name}, loss" for name in models)]
    header += [f"{name}, first token after block {b}" for b in BLOCKS for name in models]
    granularity = f"groups of {args.group}" if args.group else "per channel"
    title = f"SmolLM2-135M, int{args.bits}, {granularity}, GPTQ, torch {torch.__version__}."
    table = f"{title}\n\n{align(header, rows)}\n"
    print(table)
    Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
