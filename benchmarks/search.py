"""What does the search of alpha="auto" cost beside one solve with a single alpha?

    python benchmarks/search.py        # about 5 minutes on 2 CPU cores

For some layers of SmolLM2-135M, in this process, one after the other: the solve of the published
alpha to its default tolerance, and the search, of which the calls of the quantizer (torchao's own
rounding, or GPTQ on torchao's grids) are a part. Writes its table to benchmarks/search.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from layers import Layer, language_model_layers
from solver import align
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

from magr_fx import MagRConfig, solve_magr
from magr_fx.config import LEAST_DAMPING
from magr_fx.grams.gram import damped
from magr_fx.passes.handover.torchao_rounding import TorchaoRounding
from magr_fx.rounding.gptq import compensation
from magr_fx.rounding.rounding import Candidate, Nearest, OnGrid, Rounded, Rounding
from magr_fx.rounding.search import choose
from magr_fx.solver.row_scale import row_scale

LAYERS = (60, 61, 62, 63)  # of the middle block: q, k, v; o; gate, up; down


class Timed:
    """A rounding that counts its calls and their seconds."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        self.makes_codes, self.fits = rounding.makes_codes, rounding.fits
        self.shorter = rounding.shorter
        self.calls, self.seconds = 0, 0.0

    def __call__(self, rows: Tensor, clipped: Tensor) -> Rounded:
        start = time.process_time()
        rounded = self.rounding(rows, clipped)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.process_time() - start
        return rounded

    def on_grid_of(self, parts: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Rounded:
        return self.rounding.on_grid_of(parts, rows, dtype)

    def each(self, candidates: Iterable[Candidate]) -> Iterator[Rounded]:
        listed = list(candidates)
        start = time.process_time()
        rounded = list(self.rounding.each(listed))
        self.calls += len(listed)
        self.seconds += time.process_time() - start
        return iter(rounded)


class Cost(NamedTuple):
    """Seconds of one solve, of the search without the quantizer, and of the quantizer's calls."""

    once: float
    search: float
    quantizer: float
    calls: int

    def cells(self) -> list[str]:
        ratio = self.search / self.once
        numbers = [f"{n:.2f}" for n in (self.once, self.search)]
        return [*numbers, f"{ratio:.1f}", str(self.calls), f"{self.quantizer:.2f}"]


def cost(layer: Layer, group: int | None, gptq: bool) -> Cost:
    """What one layer's search takes."""
    target = IntxWeightOnlyConfig(
        weight_dtype=torch.int3,  # type: ignore[attr-defined]
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC,
    )
    config = MagRConfig(alpha="auto", group_size=group)
    single = MagRConfig(group_size=group)
    gram = damped(layer.gram, LEAST_DAMPING)
    torchao = TorchaoRounding(target, [len(layer.weight)])
    start = Rounded(torchao.values(layer.weight), (layer.weight,))

    once = time.process_time()
    scale = row_scale(layer.weight)
    solve_magr(layer.weight, gram, alpha=single.penalty, group_size=group, row_scale=scale)
    once = time.process_time() - once

    total = time.process_time()
    inner: Rounding = Nearest(torchao.values)
    if gptq:
        inner = OnGrid(torchao.grid, compensation(gram, by_activation=True))
        start = inner(layer.weight, layer.weight)
    rounding = Timed(inner)
    choose(
        layer.weight,
        gram,
        rounding,
        start,
        config,
        dtype=layer.weight.dtype,
    )
    total = time.process_time() - total
    return Cost(once, total - rounding.seconds, rounding.seconds, rounding.calls)


def main() -> None:
    layers = language_model_layers()
    header = [
        "layer [out, in]",
        "int3",
        "rounding",
        "one alpha, s",
        "search without the quantizer, s",
        "ratio",
        "quantizer calls",
        "their seconds",
    ]
    chosen = [layers[at] for at in LAYERS]
    cost(chosen[0], None, gptq=False)  # warm-up
    rows = []
    for gptq in (False, True):
        for group in (None, 64):
            how = [f"groups of {group}" if group else "per channel", "GPTQ" if gptq else "nearest"]
            costs = [cost(layer, group, gptq) for layer in chosen]
            for layer, one in zip(chosen, costs, strict=True):
                out, columns = layer.weight.shape
                rows.append([f"{layer.name} [{out}, {columns}]", *how, *one.cells()])
            together = Cost(*(sum(column) for column in zip(*costs, strict=True)))
            rows.append(["together", *how, *together.cells()])
    title = (
        f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, SmolLM2-135M; "
        "seconds of the processor."
    )
    table = f"{title}\n\n{align(header, rows)}\n"
    print(table)
    Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
