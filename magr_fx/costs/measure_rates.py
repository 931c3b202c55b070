"""What this machine does in a second, of each kind of operation that a plan counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magr_fx.costs.planning import Rates, Shape
from magr_fx.iterations.admm import LEAST_ROWS, tile_size

# The largest matrices that are multiplied and factorised: beyond, the rates hardly change, and the
# measurement would take longer than a second.
MOST = 2048
REPEATS = 3
DISK = 1e9  # bytes per second that a disk is taken to read and write


def measured_rates(
    shape: Shape,
    dtype: torch.dtype,
    tokens: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """The rates of this machine's CPU, with the threads that torch is set to; the disk's is taken.

    Each is the best of a few runs, at the sizes of a model's largest layer (its first 2048 inputs
    and rows): ``tokens`` through it in the model's dtype; one step's product, of the rows that the
    solver works on together (:func:`tile_size`); the factorisation of its gram; and
    six elementwise operations on those rows, of which two make a new matrix: the share that does
    so in a search.

    Args:
        shape: rows and inputs of the layer.
        dtype: of the model.
        tokens: of a batch.
        clock: :func:`time.process_time` for seconds of the processor.
    """
    device = torch.device("cpu")
    inputs, rows = min(shape.inputs, MOST), min(shape.rows, MOST)
    draw = torch.Generator().manual_seed(0)
    exact: Any = {"dtype": torch.float32, "device": device}
    x = torch.rand(min(tokens, MOST), inputs, generator=draw, **exact).to(dtype)
    weight = torch.rand(rows, inputs, generator=draw, **exact).to(dtype)
    forward = _best(lambda: functional.linear(x, weight), clock)

    together = min(shape.rows, max(LEAST_ROWS, tile_size(device) // shape.inputs))
    tile = torch.rand(together, inputs, generator=draw, **exact)
    gram = torch.rand(inputs, inputs, generator=draw, **exact)
    gram = gram + gram.T
    gram.diagonal().add_(2 * inputs)  # more than the others in its row: positive definite
    step = torch.zeros_like(tile)
    solve = _best(lambda: step.addmm_(tile, gram), clock)
    factor = _best(lambda: torch.linalg.cholesky_ex(gram), clock)
    level = torch.rand(together, 1, generator=draw, **exact)
    elementwise = _best(lambda: _six(tile, level, gram[0]), clock)
    return Rates(
        forward=2 * x.numel() * rows / forward,
        solve=2 * tile.numel() * inputs / solve,
        factors=inputs**3 / 3 / factor,
        elementwise=6 * tile.numel() / elementwise,
        disk=DISK,
    )


def _six(rows: Tensor, level: Tensor, prices: Tensor) -> Tensor:
    """Six elementwise operations, of which two make a new matrix."""
    excess = torch.sub(rows, level)
    excess.clamp_(min=0).mul_(prices)
    clamped = torch.clamp(rows, -level, level)
    return clamped.sub_(excess).sum(-1)


def _best(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the fastest run, after one that wakes the threads up."""
    run()
    best = math.inf
    for _ in range(REPEATS):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best
