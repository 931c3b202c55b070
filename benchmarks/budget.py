"""What is it worth to give each weight its own share of the bits, and by which measure?

    python benchmarks/budget.py                          # everything: hours on 2 CPU cores
    python benchmarks/budget.py --bits 2.5 --ways "by the loss" --seeds 0

SmolLM2-135M, GPTQ, int2, int3 and int4 in groups of 64; the average is of the codes alone, as
scales and zero points are the same for all. Ways to spend it:

- uniform: the same for all weights.
- by the loss: ``Budget`` as it is: output errors times the gradients of the outputs, in nats.
- by the loss, apart: the same with ``apart=True``, a choice for each of q, k and v, gate and up.
- by the output error: relative squared errors of the weights' outputs.
- by trial: the divergence of the model with one unit quantized alone, on 768 tokens.
- ends first: int4 for the first and the last blocks, in turn, until the budget is spent.
- at random: one bit more for a unit at random, until the budget is spent.

Judged by the divergence KL(original ‖ quantized) on the windows of quality.py. Figures are added to
benchmarks/budget.json as they are measured, and what is there is not measured again; the table is
also put into README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
from collections import OrderedDict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from quality import Subject, config, language_model_subject
from readme import put_table
from solver import align
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from magr_fx import Budget, MagRConfig, magr_quantize
from magr_fx.costs.allocate import Option, allocate
from magr_fx.machine.ranks import ALONE
from magr_fx.passes.budgeting.make_plan import key_for
from magr_fx.passes.budgeting.measure import costs_of
from magr_fx.passes.budgeting.units import Unit
from magr_fx.passes.entries.plan_bits import tried
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.execution import Execution
from magr_fx.passes.rewriting.request import Request

RESULTS = Path(__file__).with_suffix(".json")
BITS = (2, 3, 4)
GROUP = 64
TRIAL = (2, 384)  # windows and tokens of each
LOSS, OUTPUT, TRIALS = "by the loss", "by the output error", "by trial"
APART = "by the loss, apart"
WAYS = ("uniform", LOSS, APART, OUTPUT, TRIALS, "ends first", "at random")


class Planned(NamedTuple):
    """The choices, what they cost by each measure, and the seconds of the processor for that."""

    together: list[Unit]
    apart: list[Unit]
    costs: dict[str, list[list[float]]]
    seconds: dict[str, float]

    def units(self, way: str) -> list[Unit]:
        """What has one choice."""
        return self.apart if way == APART else self.together


def plan(subject: Subject, seed: int, ways: list[str]) -> Planned:
    model: Any = subject.model
    calib = subject.calib(seed)
    budget = Budget(bits=3, choices=[config(bits, GROUP) for bits in BITS])
    request = Request(MagRConfig(), filter_fn=subject.quantizable, progress=False)
    started = time.process_time()
    found = tried(model, read_calib(calib, model), budget, request, 0.1, Execution(ALONE))
    seconds = {LOSS: time.process_time() - started}
    seconds[OUTPUT] = seconds[APART] = seconds[LOSS]  # the gradients are a small part
    nothing = {name: torch.zeros_like(gradient) for name, gradient in found.gradients.items()}
    apart = [Unit(unit.choices, [weight]) for unit in found.units for weight in unit.weights]
    by_loss = costs_of(found.errors, found.gradients)
    costs = {
        LOSS: _of_units(found.units, by_loss),
        APART: _of_units(apart, by_loss),
        OUTPUT: _of_units(found.units, costs_of(found.errors, nothing)),
    }
    if TRIALS in ways:
        started = time.process_time()
        tokens = torch.cat(calib[:4])[::8, : TRIAL[1]][: TRIAL[0]]
        costs[TRIALS] = _by_trial(model, tokens, found.units)
        seconds[TRIALS] = time.process_time() - started
    return Planned(found.units, apart, costs, seconds)


def _of_units(units: list[Unit], costs: dict[str, list[float]]) -> list[list[float]]:
    return [
        [sum(costs[weight.name][at] for weight in unit.weights) for at in range(len(BITS))]
        for unit in units
    ]


@torch.no_grad()
def _by_trial(model: nn.Module, tokens: torch.Tensor, units: list[Unit]) -> list[list[float]]:
    """KL(original ‖ quantized) with the weights of one unit rounded to nearest by torchao."""
    before = model(tokens).logits.log_softmax(-1)
    rows = []
    for unit in units:
        names = {key_for(weight.name) for weight in unit.weights}
        row = []
        for bits in BITS:
            kept = {name: model.get_submodule(name).weight for name in names}
            quantize_(model, config(bits, GROUP), lambda _, name, names=names: name in names)
            after = model(tokens).logits.log_softmax(-1)
            row.append(float((before.exp() * (before - after)).sum(-1).mean()))
            for name, weight in kept.items():
                model.get_submodule(name).weight = weight
        rows.append(row)
    return rows


def chosen(way: str, average: float, seed: int, planned: Planned) -> list[int]:
    """For each unit the index of its bits."""
    units = planned.units(way)
    numbers = [sum(weight.weight.numel() for weight in unit.weights) for unit in units]
    limit = int(average * sum(numbers))
    if way == "uniform":
        return [BITS.index(int(average))] * len(units)
    if way in planned.costs:
        options = [
            [Option(cost, bits * count) for cost, bits in zip(row, BITS, strict=True)]
            for row, count in zip(planned.costs[way], numbers, strict=True)
        ]
        return allocate(options, limit).chosen
    found, left = [0] * len(units), limit - BITS[0] * sum(numbers)
    if way == "ends first":
        blocks = [int(unit.name.split(".")[2]) for unit in units]
        from_ends = sorted(range(len(units)), key=lambda at: min(blocks[at], 29 - blocks[at]))
        steps = [(at, 2) for at in from_ends]
    else:
        steps = [(at, 1) for at in range(len(units))] * 2
        random.Random(seed).shuffle(steps)
    for at, more in steps:
        if more * numbers[at] <= left:
            found[at] += more
            left -= more * numbers[at]
    return found


def measure(subject: Subject, way: str, average: float, seed: int, planned: Planned) -> Any:
    picked = chosen(way, average, seed, planned)
    target = FqnToConfig(
        OrderedDict(
            (key_for(weight.name), config(BITS[at], GROUP))
            for unit, at in zip(planned.units(way), picked, strict=True)
            for weight in unit.weights
        )
    )
    started = time.process_time()
    model = magr_quantize(
        copy.deepcopy(subject.model),
        subject.calib(seed),
        target,
        rounding="gptq",
        filter_fn=subject.quantizable,
        progress=False,
    )
    seconds = time.process_time() - started
    numbers = [sum(weight.weight.numel() for weight in unit.weights) for unit in planned.units(way)]
    used = sum(BITS[at] * n for at, n in zip(picked, numbers, strict=True)) / sum(numbers)
    return {
        **subject.scores(model),
        "codes' bits": used,
        "CPU seconds": round(seconds, 1),
        "CPU seconds of the plan": round(planned.seconds.get(way, 0.0), 1),
    }


def read() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def table(results: dict[str, Any]) -> str:
    """A row for each way and average."""
    cells: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for key, row in results.items():
        bits, way, _ = key.split("|")
        cells.setdefault((float(bits), way), []).append(row)
    header = ["bits of the codes", "spent", "MB packed", "KL, speeches", "KL, novel",
              "same top, speeches", "same top, novel", "collapsed", "seeds"]  # fmt: skip
    rows = []
    for (average, way), runs in sorted(cells.items(), key=lambda c: (c[0][0], mean(
        run["KL, sotu_heldout"] for run in c[1]
    ))):  # fmt: skip
        # 106 M weights; a scale and a zero point of 16 bits for each group
        megabytes = 106_168_320 * (float(runs[0]["codes' bits"]) + 32 / GROUP) / 8e6
        rows.append([
            f"{average:g}", way, f"{megabytes:.1f}",
            *(spread([run[f"KL, {text}"] for run in runs]) for text in TEXTS),
            *(f"{1 - mean(run[f'1 - same top, {text}'] for run in runs):.1%}" for text in TEXTS),
            f"{sum(run[f'collapsed, {text}'] for run in runs for text in TEXTS):.0f}",
            str(len(runs)),
        ])  # fmt: skip
    return align(header, rows)


TEXTS = ("sotu_heldout", "moby_dick")


def spread(values: list[float]) -> str:
    text = f"{mean(values):.3f}"
    return f"{text} ± {stdev(values):.3f}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", nargs="+", type=float, default=[2, 2.25, 2.5, 3, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = language_model_subject()
    for seed in args.seeds:
        planned: Planned | None = None
        for average in args.bits:
            for way in args.ways:
                key = f"{average:g}|{way}|{seed}"
                even = average == int(average)
                if key in read() or (way == "uniform" and not even) or (
                    way != "uniform" and average in (BITS[0], BITS[-1])
                ):  # fmt: skip
                    continue
                if planned is None:
                    planned = plan(subject, seed, args.ways)
                found = measure(subject, way, average, seed, planned)
                RESULTS.write_text(
                    json.dumps({**read(), key: found}, indent=1) + "\n", encoding="utf-8"
                )
                print(key, {n: x for n, x in found.items() if "windows" not in n}, flush=True)
    put_table("budget", table(read()))


if __name__ == "__main__":
    main()
