"""Judge what run.py left in out/peers as quality.py judges its own; adds it to quality.json.

    python benchmarks/peers/judge.py

Tables: `python benchmarks/quality.py --methods` makes them anew without measuring anything.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from quality import RESULTS, add_result, language_model_subject  # noqa: E402


def main() -> None:
    subject = language_model_subject()
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for path in sorted((ROOT / "out/peers").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            figures = dict(file.metadata())
            key = figures.pop("key")
            if key in known:
                continue
            model = copy.deepcopy(subject.model)
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    parameters[name].copy_(file.get_tensor(name))
        costs = {name: float(value) for name, value in figures.items()}
        add_result(key, {**subject.scores(model), **costs})


if __name__ == "__main__":
    main()
