"""Seconds per stage and peak memory of magr_transform, beside one plain forward pass. Linux.

    python benchmarks/footprint.py [--model NAME] [--tokens 16384]

Both sides run in this process, on the same model and the same calibration batches. Peak memory is
the process's resident high-water mark, reset before each side, minus what the loaded model alone
held. Writes its table to benchmarks/footprint.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from resident import measured, resident

from magr_fx import magr_transform
from magr_fx.reporting.report import STAGES, MagRReport

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from language_model import bundled_model, load, token_batches  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Hub name or local directory (default: SmolLM2-135M)")
    parser.add_argument("--tokens", type=int, default=16384, help="default: %(default)s")
    args = parser.parse_args()
    name = args.model or bundled_model()
    model, tokenizer = load(name, device="cpu", dtype=torch.float32)
    calib = token_batches(
        tokenizer,
        ROOT / "examples/data/sotu_calibration.txt",
        tokens=args.tokens,
        length=512,
        device="cpu",
    )

    def forward() -> None:
        with torch.no_grad():
            for batch in calib:
                model(batch)

    with torch.no_grad():
        model(calib[0])  # warm-up: thread pools and the allocator's first pages
    bare = resident("VmRSS")
    _, plain = measured(forward)
    _, cost = measured(lambda: magr_transform(model, calib))
    report: MagRReport = model.magr_report  # type: ignore[assignment]
    sides = (("plain forward of the calibration", plain), ("magr_transform", cost))
    rows = [(side, f"{c.wall_seconds:.1f}", f"{c.peak - bare:.0f}") for side, c in sides]
    rows += [(f"- {stage}", f"{report.seconds[stage]:.1f}", "") for stage in STAGES[:-1]]
    label = args.model or Path(name).stem
    lines = [
        f"{label}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in float32; "
        f"{len(calib)} batches of {tuple(calib[0].shape)} tokens; {torch.get_num_threads()} CPU "
        f"threads, torch {torch.__version__}. The loaded model: {bare:.0f} MiB resident.",
        "",
        "| | seconds | peak memory above the loaded model, MiB |",
        "|---|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks/footprint.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
