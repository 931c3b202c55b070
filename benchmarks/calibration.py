"""What does collecting grams cost beside a plain forward of the same tokens, and where does it go?

    python benchmarks/calibration.py [--model NAME] [--tokens 8192]

In this process, on the same model and batches, in turns, in seconds of the processor: the model's
own forward, and the collection, of one run and of two (propagation), with the sums of products
apart. What no site reads is not run: the head. The least of the rounds counts. Writes its table to
benchmarks/calibration.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from solver import align

from magr_fx.passes.collecting import shared_gram
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from language_model import bundled_model, load, token_batches  # noqa: E402

OUT = Path(__file__).with_suffix(".md")
ROUNDS = 2


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def summing(within: dict[str, float]) -> None:
    """Count the time that sums of products take, from now on."""

    def timed(name: str, whole: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            within[name] += seconds(lambda: whole(*args, **kwargs))

        return call

    shared: Any = shared_gram
    for name in ("add_to_gram", "add_to_drift"):
        setattr(shared, name, timed(name, getattr(shared, name)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Hub name or local directory (default: SmolLM2-135M)")
    parser.add_argument("--tokens", type=int, default=8192, help="default: %(default)s")
    args = parser.parse_args()
    name = args.model or bundled_model()
    model, tokenizer = load(name, device="cpu", dtype=torch.float32)
    text = ROOT / "examples/data/sotu_calibration.txt"
    calib = token_batches(tokenizer, text, tokens=args.tokens, length=512, device="cpu")
    within: dict[str, float] = defaultdict(float)
    summing(within)
    found: dict[str, list[float]] = defaultdict(list)
    with calibration_mode(model):
        traced = trace_or_read(model, read_calib(calib, model), Tracing("auto", False))
        sites = find_linears(dict.fromkeys(b.trace for b in traced), model, None).sites

        def collect(propagate: bool, held: float) -> None:
            run = CalibrationRun(traced, sites, propagate=propagate, holdout=held)
            for _ in run.collect(progress=False):
                pass

        def plain() -> None:
            for batch in calib:
                model(batch)

        for _ in range(ROUNDS):
            found["plain forward"].append(seconds(plain))
            for label, propagate in (("one run", False), ("two runs", True)):
                within.clear()
                spent = seconds(partial(collect, propagate, 0.1 * propagate))
                found[label].append(spent)
                for part, own in within.items():
                    found[f"{label}: {part}"].append(own)
                found[f"{label}: the graph's nodes"].append(spent - sum(within.values()))
    least = {label: min(values) for label, values in found.items()}
    rows = [[label, f"{s:.1f}", f"{s / least['plain forward']:.2f}"] for label, s in least.items()]
    header = ["", "seconds of the processor", "plain forwards"]
    table = (
        f"{args.model or Path(name).stem}, {len(calib)} batches of {tuple(calib[0].shape)} tokens, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; the least of {ROUNDS} "
        f"rounds.\n\n{align(header, rows)}\n"
    )
    OUT.write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
