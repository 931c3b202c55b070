"""Quantize a language model with and without MagR, and compare both with the original.

    python examples/quickstart.py                                 # SmolLM2-135M, 3 bits
    python examples/quickstart.py --bits 2 3 4 --rounding gptq    # a few minutes for each
    python examples/quickstart.py --bits 2.5 --rounding gptq      # an average: a Budget
    python examples/quickstart.py --model Qwen/Qwen3-0.6B --bits 4 --device cuda --dtype bfloat16

For each bit width the same layers are quantized by torchao alone and by ``magr_quantize`` with its
default options. A table and the reports go to ``--out``: perplexity, the mean divergence
KL(original ‖ quantized) of the next token in nats, and how often the most probable token stays.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from language_model import bundled_model, load, token_batches, with_short_windows
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, quantize_

from magr_fx import Budget, compare, magr_quantize

DATA = Path(__file__).parent / "data"

CAVEAT = (
    "SmolLM2's weights come from a Q4_1 GGUF (groups of 32); per-channel figures are meaningful, "
    "group-32 4-bit ones would not be."
)


def say(text: str) -> None:
    """Print one line of progress at once, even into a pipe."""
    print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="a Hub name, a local directory or a .gguf file (default: SmolLM2-135M)")
    add(
        "--calib",
        type=Path,
        default=DATA / "sotu_calibration.txt",
        metavar="FILE",
        help="the text to calibrate on (default: speeches)",
    )
    add(
        "--eval",
        type=Path,
        nargs="+",
        default=[DATA / "sotu_heldout.txt", DATA / "moby_dick.txt"],
        metavar="FILE",
        help="the texts to evaluate (default: other speeches, and a novel)",
    )
    add(
        "--bits",
        type=bits,
        nargs="+",
        default=[3],
        help="for each weight, from 2 to 8, or an average such as 2.5 that each weight has its own "
        "share of (default: 3)",
    )
    add("--rounding", choices=("nearest", "gptq"), default="nearest", help="default: nearest")
    add("--tokens", type=int, default=8192, help="to calibrate on (default: %(default)s)")
    add("--eval-tokens", type=int, default=4096, help="of each text (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens per window (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", help="default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    return parser.parse_args()


def bits(text: str) -> float:
    """A number from 2 to 8; whole ones are ints."""
    value = float(text)
    if not 2 <= value <= 8:
        raise argparse.ArgumentTypeError(f"{text} is not from 2 to 8")
    return int(value) if value.is_integer() else value


def quantizable(module: nn.Module, name: str) -> bool:
    """Every linear layer but the head, which many models share with their embedding."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def per_channel(bits: int) -> IntxWeightOnlyConfig:
    """Integers with one step and one zero point for each output channel."""
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC,
    )


def align(rows: list[list[str]]) -> str:
    """Lay out ``rows``, the header first, as a Markdown table with numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    rule = " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    try:
        name = args.model or bundled_model()
        say(f"loading {name}")
        model, tokenizer = load(name, device=args.device, dtype=getattr(torch, args.dtype))

        def batches(file: Path, tokens: int) -> list[Tensor]:
            return token_batches(
                tokenizer, file, tokens=tokens, length=args.length, device=args.device
            )

        calib = with_short_windows(batches(args.calib, args.tokens))
        texts = {file.stem: batches(file, args.eval_tokens) for file in args.eval}
        args.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:  # no model, no text, too short a text
        sys.exit(f"quickstart: {error}")

    columns = [[f"perplexity, {text}", "KL", "same top"] for text in texts]
    rows = [["weights", *(column for of_text in columns for column in of_text)]]

    def measure(label: str, candidate: nn.Module) -> None:
        found: list[Any] = [compare(model, candidate, text).text for text in texts.values()]
        if len(rows) == 1:
            before = [[f"{text.perplexity_original.value:,.2f}", "0", "100%"] for text in found]
            rows.append([f"original, {args.dtype}", *(cell for cells in before for cell in cells)])
        cells = []
        for text in found:
            cells += [f"{text.perplexity.value:,.2f}", f"{text.divergence.value:.3f}"]
            cells.append(f"{text.same_top.value:.1%}")
        rows.append([label, *cells])
        say(f"[{time.perf_counter() - started:5.0f} s] {label}: {', '.join(cells)}")

    totals = []
    for wanted in args.bits:
        target: Any = None
        if isinstance(wanted, int):
            label, target = f"int{wanted}", per_channel(wanted)
            candidate: Any = copy.deepcopy(model)  # one copy at a time is held
            quantize_(candidate, target, filter_fn=quantizable)
            measure(f"{label}, torchao alone", candidate)
        else:
            choices = [per_channel(each) for each in range(2, 9)]
            label, target = f"{wanted} bits", Budget(wanted, choices=choices)
        candidate = copy.deepcopy(model)
        magr_quantize(candidate, calib, target, rounding=args.rounding, filter_fn=quantizable)
        measure(f"{label}, magr_quantize", candidate)
        report = candidate.magr_report
        totals.append(report.totals())
        file = label.replace(" ", "-")
        report.to_json(args.out / f"{file}.json")
        if importlib.util.find_spec("matplotlib"):
            report.plot(args.out / f"{file}.png")
            if report.bits is not None:
                report.bits.plot(args.out / f"{file}-plan.png")

    caveat = [] if args.model else [CAVEAT]
    summary = "\n\n".join([align(rows), *caveat, *totals])
    (args.out / "quickstart.txt").write_text(summary + "\n", encoding="utf-8")
    say(f"\n{summary}\n\nwritten to {args.out}/: quickstart.txt and the reports")


if __name__ == "__main__":
    main()
