"""What runs on large models would cost by the formulas of magr_fx/costs/planning.py.

    python benchmarks/planning.py

Models of two and of three layers of the published sizes are traced without weights, as `magr-fx
plan` does; every further layer costs as much again. Writes its table into README.md. The rates are
assumed; README.md says which.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, fields

from readme import put_table
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from magr_fx.command_line.named_targets import named_target
from magr_fx.command_line.plan_directory import plan_directory
from magr_fx.costs.planning import (
    FLOAT,
    Costs,
    Method,
    Rates,
    Shape,
    Work,
    gram_bytes,
    solve_work,
    solver_bytes,
)

TOKENS, LENGTH, TARGET = 262_144, 2048, "int3-per-channel"
METHOD = Method()
RANKS = (1, 8, 64)
# Elementwise operations move 12 bytes a number: 4 TB/s, and 300 GB/s.
GPU = Rates(forward=400e12, solve=45e12, factors=20e12, elementwise=4e12 / 12, disk=1e9)
CPU = Rates(forward=2e12, solve=2e12, factors=0.7e12, elementwise=300e9 / 12, disk=1e9)
LINK = {id(GPU): 25e9, id(CPU): 2.5e9}  # bytes per second between two devices


@dataclass(frozen=True)
class Model:
    """Published sizes; ``shapes`` are the problems of one layer."""

    name: str
    layers: int
    config: PretrainedConfig
    shapes: tuple[Shape, ...]


def llama(name: str, layers: int, width: int, inner: int, heads: int) -> Model:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128_256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    key_value = 8 * width // heads
    shapes = (
        Shape(width + 2 * key_value, width),
        Shape(width, width),
        Shape(2 * inner, width),
        Shape(width, inner),
    )
    return Model(name, layers, config, shapes)


def qwen3_coder() -> Model:
    width, heads, inner, experts, chosen = 6144, 96 * 128, 2560, 160, 8
    config = Qwen3MoeConfig(
        hidden_size=width,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=inner,
        vocab_size=151_936,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    share = chosen / experts
    shapes = (
        Shape(heads + 2 * 8 * 128, width),
        Shape(width, heads),
        Shape(experts, width),
        Shape(2 * inner, width, share, experts),
        Shape(width, inner, share, experts),
    )
    return Model("Qwen3-Coder-480B-A35B", 62, config, shapes)


def costs_of(model: Model) -> Costs:
    """Of all layers: what two cost, and what the third adds, for each of the others."""
    found = []
    for layers in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            model.config.num_hidden_layers = layers
            model.config.save_pretrained(folder)
            plan = plan_directory(folder, named_target(TARGET), tokens=TOKENS, length=LENGTH)
            found.append(plan.plan.costs)
    two, three = found
    own = {f.name: (getattr(two, f.name), getattr(three, f.name)) for f in fields(Costs)}
    more = model.layers - 2
    whole = Costs(**{name: a * (1 - more) + b * more for name, (a, b) in own.items()})
    by_hand = model.layers * solve_work(model.shapes, METHOD).flops
    if abs(whole.solve.flops - by_hand) > 0.01 * by_hand:
        sys.exit(f"{model.name}: the trace has other shapes than this file")
    return whole


def solve_of_a_rank(model: Model, ranks: int) -> Work:
    """Rows are split, each gram is factorised by all; experts are spread as wholes."""
    total = Work()
    for shape in model.shapes:
        one = Shape(shape.rows, shape.inputs)
        if shape.problems > 1:
            total += solve_work([one], METHOD) * -(-shape.problems // ranks)
        else:
            total += solve_work([Shape(-(-shape.rows // ranks), shape.inputs)], METHOD)
    return total * model.layers


def memory_of_a_rank(model: Model, costs: Costs, ranks: int) -> float:
    """Bytes beside the weights that are not worked on: grams are whole on every rank."""
    solver = 0
    for shape in model.shapes:
        split = ranks > 1 and shape.problems == 1
        rows = -(-shape.rows // ranks) if split else shape.rows
        kept = 5 * FLOAT * shape.rows * shape.inputs if split else 0  # everybody's, in the end
        solver = max(solver, solver_bytes(Shape(rows, shape.inputs), METHOD) + kept)
    return costs.block + costs.grams + solver + costs.boundary / ranks


def hours(model: Model, costs: Costs, ranks: int, rates: Rates) -> float:
    """The calibration divided, the solves spread, and grams and weights sent to all."""
    seconds = costs.seconds(rates)
    total = (seconds["forward"] + seconds["grams"]) / ranks + seconds["disk"]
    total += solve_of_a_rank(model, ranks).seconds(rates, products=rates.solve)
    if ranks > 1:
        grams = model.layers * gram_bytes(model.shapes, METHOD)
        weights = 2 * model.layers * sum(shape.parameters for shape in model.shapes)
        total += (2 * grams + weights) / LINK[id(rates)]
    return total / 3600


def main() -> None:
    models = (
        llama("Llama-3-8B", 32, 4096, 14_336, 32),
        llama("Llama-3-70B", 80, 8192, 28_672, 64),
        qwen3_coder(),
    )
    header = [
        "model", "weights", "devices", "block, grams, solve, activations", "together",
        "hours on GPUs", "hours on CPU servers",
    ]  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    for model in models:
        costs = costs_of(model)
        for ranks in RANKS:
            memory = memory_of_a_rank(model, costs, ranks)
            boundary = costs.boundary / ranks
            parts = (costs.block, costs.grams, memory - costs.block - costs.grams - boundary)
            cells = [
                model.name if ranks == 1 else "",
                f"{costs.model / 1e9:.0f}" if ranks == 1 else "",
                str(ranks),
                " + ".join(f"{part / 1e9:.1f}" for part in (*parts, boundary)),
                f"{memory / 1e9:.0f}",
                *(f"{hours(model, costs, ranks, rates):.1f}" for rates in (GPU, CPU)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    put_table("planning", table)


if __name__ == "__main__":
    main()
