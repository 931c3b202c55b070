"""What runs on large models would cost by the formulas of magr_fx/costs/planning.py.

    python benchmarks/planning.py

Models of two and of three layers of the published sizes are traced without weights, as `magr-fx
plan` does; every further layer costs as much again. Writes its table into README.md. The rates are
assumed; README.md says which.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from readme import put_table
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from magr_fx.command_line.named_targets import named_target
from magr_fx.command_line.plan_directory import plan_directory
from magr_fx.costs.planning import (
    FLOAT,
    Method,
    Shape,
    gram_bytes,
    solve_flops,
    solver_bytes,
)
from magr_fx.passes.entries.plan import Plan

TOKENS, LENGTH, TARGET = 262_144, 2048, "int3-per-channel"
METHOD = Method()
RANKS = (1, 8, 64)


class Device(NamedTuple):
    """What one is assumed to do in a second.

    Attributes:
        product: FLOP/s of a product in bfloat16.
        step: FLOP/s of a product in float32.
        link: bytes between two of them.
        disk: bytes that are read or written.
    """

    product: float
    step: float
    link: float
    disk: float


GPU = Device(product=400e12, step=45e12, link=25e9, disk=1e9)
CPU = Device(product=2e12, step=2e12, link=2.5e9, disk=1e9)


@dataclass(frozen=True)
class Model:
    """Published sizes; ``shapes`` are the problems of one layer, and how many there are of each."""

    name: str
    layers: int
    config: PretrainedConfig
    shapes: dict[Shape, int]


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
    shapes = {
        Shape(width + 2 * key_value, width): 1,
        Shape(width, width): 1,
        Shape(2 * inner, width): 1,
        Shape(width, inner): 1,
    }
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
    shapes = {
        Shape(heads + 2 * 8 * 128, width): 1,
        Shape(width, heads): 1,
        Shape(experts, width): 1,
        Shape(2 * inner, width, share): experts,
        Shape(width, inner, share): experts,
    }
    return Model("Qwen3-Coder-480B-A35B", 62, config, shapes)


def plan_of(model: Model) -> Plan:
    """Of all layers: what two cost, and what the third adds, for each of the others."""
    found = []
    for layers in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            model.config.num_hidden_layers = layers
            model.config.save_pretrained(folder)
            plan, _ = plan_directory(folder, named_target(TARGET), tokens=TOKENS, length=LENGTH)
            found.append(plan)
    two, three = found
    more = model.layers - 2
    own = {f.name: (getattr(two, f.name), getattr(three, f.name)) for f in fields(Plan)}
    own.pop("found")
    numbers = {name: a * (1 - more) + b * more for name, (a, b) in own.items()}
    whole = Plan(two.found, **numbers)
    by_hand = model.layers * sum(
        times * solve_flops([shape], METHOD) for shape, times in model.shapes.items()
    )
    if abs(whole.solve - by_hand) > 0.01 * by_hand:
        sys.exit(f"{model.name}: the trace has other shapes than this file")
    return whole


def solve_of_a_rank(model: Model, ranks: int) -> float:
    """Rows are split; experts are spread as wholes."""
    total = 0.0
    for shape, times in model.shapes.items():
        if times > 1:
            total += solve_flops([shape], METHOD) * -(-times // ranks)
        else:
            rows = -(-shape.rows // ranks)
            total += solve_flops([replace(shape, rows=rows)], METHOD)
    return total * model.layers


def memory_of_a_rank(model: Model, costs: Plan, ranks: int) -> float:
    """Bytes beside the weights that are not worked on: grams are whole on every rank."""
    solver = 0
    for shape, times in model.shapes.items():
        split = ranks > 1 and times == 1
        rows = -(-shape.rows // ranks) if split else shape.rows
        kept = 5 * FLOAT * shape.rows * shape.inputs if split else 0  # everybody's, in the end
        solver = max(solver, solver_bytes(replace(shape, rows=rows), METHOD) + kept)
    return costs.block + costs.grams + solver + costs.boundary / ranks


def hours(model: Model, costs: Plan, ranks: int, device: Device) -> float:
    """The calibration divided, the solves spread, and grams and weights sent to all.

    The disk reads the weights once to be looked at, once for their fingerprint and in each of three
    passes, and writes them twice.
    """
    total = costs.calibration / device.product / ranks
    total += solve_of_a_rank(model, ranks) / device.step
    total += 7 * costs.model / device.disk
    if ranks > 1:
        grams = weights = 0
        for shape, times in model.shapes.items():
            grams += model.layers * times * gram_bytes([shape], METHOD)
            weights += 2 * model.layers * times * shape.rows * shape.inputs
        total += (2 * grams + weights) / device.link
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
        costs = plan_of(model)
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
                *(f"{hours(model, costs, ranks, device):.1f}" for device in (GPU, CPU)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    put_table("planning", table)


if __name__ == "__main__":
    main()
