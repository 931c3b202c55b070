"""Measure this machine's FLOP/s in a product with a weight, and in a step of the solver."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from magr_fx.costs.planning import Shape
from magr_fx.iterations.admm import LEAST_ROWS, tile_size
from magr_fx.iterations.relaxed_step import relaxed_step

MOST = 2048  # rows and inputs; with more the rates hardly change, but measuring takes seconds
TOKENS = 512  # in the product
REPEATS = 3


def measured_rates(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s on the CPU of a product with a weight in ``dtype``, and of a solver's step in float32.

    Each rate is the best of three measurements with a weight ``[rows, inputs]`` (at most 2048
    each). The product has 512 tokens. The step is one of ADMM, on as many rows as the solver
    processes together; only its matrix product is counted, but its elementwise part takes time too.

    Args:
        shape: the shape of the weight.
        dtype: the dtype of the product with the tokens.
    """
    inputs, rows = min(shape.inputs, MOST), min(shape.rows, MOST)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(TOKENS, inputs, generator=draw).to(dtype)
    weight = torch.rand(rows, inputs, generator=draw)
    in_dtype = weight.to(dtype)
    product = _best(lambda: functional.linear(x, in_dtype))
    tile = weight[: max(LEAST_ROWS, tile_size(weight.device) // inputs)]
    gram, rho = torch.rand(inputs, inputs, generator=draw), torch.ones(1, inputs)
    level = torch.full((len(tile), 1), 0.9)
    shifted, source, scratch = tile.clone(), torch.zeros_like(tile), torch.zeros_like(tile)

    def step() -> None:
        shifted.copy_(tile)
        given = {"rho": rho, "alpha": 0.1, "relaxation": 1.0}
        relaxed_step(shifted, tile, level, source, scratch, **given)  # type: ignore[arg-type]
        shifted.addmm_(source, gram)

    return (2 * x.numel() * rows / product, 2 * tile.numel() * inputs / _best(step))


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest run, after a first run that starts the threads."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
