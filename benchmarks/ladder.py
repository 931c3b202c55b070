"""int8, int4, int3, int2 of a model, as ``magr-fx quantize`` makes and ``evaluate`` judges them.

    python benchmarks/ladder.py                   # SmolLM2-135M: half an hour on 2 CPU cores

Runs the commands that a user would run, on a directory of transformers, and puts the table into
README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from layers import language_model
from readme import put_table
from solver import align
from texts import DATA, TEXT

RESULTS = Path(__file__).with_suffix(".json")
TARGETS = ("int8", "int4-group-64", "int3-group-64", "int2-group-64")


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "magr_fx", *map(str, arguments)], check=True)


def measure(folder: Path, target: str, rounding: str) -> dict[str, Any]:
    """The figures of ``magr-fx evaluate --json`` of one target."""
    out, found = folder / target, folder / f"{target}.json"
    run(
        *("quantize", folder / "model", out, "--calib", TEXT),
        *("--target", target, "--rounding", rounding),
    )
    run(
        *("evaluate", out, "--against", folder / "model"),
        *("--text", DATA / "sotu_heldout.txt", "--json", found),
    )
    figures = dict(json.loads(found.read_text(encoding="utf-8")))
    figures["text"].pop("windows")
    return figures


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for target in TARGETS:
        if target in results:
            text, size = results[target]["text"], results[target]["size"]
            (divergence, error), (ratio, of_ratio) = text["divergence"], text["ratio"]
            rows.append([
                target,
                f"{divergence:.4f} ± {error:.4f}",
                f"{text['median']:.4f}",
                f"{text['percentile_99']:.3f}",
                f"{text['largest']:.2f}",
                f"{text['same_top'][0]:.1%}",
                f"{ratio:.3f} ± {of_ratio:.3f}",
                f"{size['disk'] / 1e6:.0f}",
            ])  # fmt: skip
    header = ["", "KL", "median", "99%", "largest", "same top", "perplexity, times", "MB"]
    return align(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--rounding", default="gptq")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, tokenizer = language_model()
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        tokenizer.save_pretrained(folder / "model")
        for target in args.targets:
            results[target] = measure(folder, target, args.rounding)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    put_table("ladder", table(results))


if __name__ == "__main__":
    main()
