"""What a run costs, by formula: bytes of memory, matrix products, and the rate of one product.

The formulas take the shapes of the weights, the number of tokens, and how each site is solved. The
numbers of steps and checks depend on the data; the constants are typical (benchmarks/solver.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from magr_fx.rounding.rounding import CPU_ROWS
from magr_fx.rounding.row_pieces import cut, pieces
from magr_fx.rounding.search import ALPHAS, CLIPS, FINER, FINER_GROUPS

FLOAT = 4  # bytes: grams and solves are in float32
STEPS, CHECKS = 20, 3  # of one solve to a gap of 1e-3
PATH_PRODUCTS = 8 + 1.5 + 1  # steps, checks and certificate of each penalty of a search's path
MOST_CANDIDATES = (1 + len(ALPHAS)) * 2 * len(CLIPS)  # every alpha and clip, even and leaning
SOURCES = 2.5  # alphas that are tried with all rows; and all with a sample of the rows
CANDIDATES = SOURCES * (len(CLIPS) + 1)  # and on a grid that is fitted, or that leans
REFITS = 9  # two fits of a grid to its codes, each with two passes of coordinate descent
SWEEPS = 2 * len(FINER_GROUPS) + 1 + len(ALPHAS)  # of groups, by their clips and sources
# Elementwise work takes as long as products with so many further inputs. Measured on a CPU: solves
# of 256, 512 and 1024 inputs take 2.5, 16.5 and 93 s, and are predicted to take 3.3, 16 and 76 s.
ELEMENTWISE = 2048


@dataclass(frozen=True)
class Shape:
    """Weights that share an input, solved together: ``[rows, inputs]``.

    ``calls`` is the number of tokens that reach them for each calibration token: 1, or of an
    expert the share of the tokens that is sent to it.
    """

    rows: int
    inputs: int
    calls: float = 1.0


@dataclass(frozen=True)
class Method:
    """How a run solves: with ``search`` every row chooses its own alpha and clip, the quantized
    model runs beside the original one, and tokens are held out.
    """

    search: bool = True
    groups: bool = False
    gptq: bool = False


def gram_bytes(shapes: Iterable[Shape], method: Method) -> int:
    """``4·in²`` for each input; with a search again for the drift and for the held-out tokens."""
    return sum(FLOAT * shape.inputs**2 for shape in shapes) * (3 if method.search else 1)


def solver_bytes(shape: Shape, method: Method) -> int:
    """Bytes that one solve takes at its peak on a CPU, beside its weights and its grams.

    ``12·in²`` while the gram is factorised; ``32·min(out, 2048)·in`` for the certificate, in
    float64; and matrices ``[out, in]`` in float32: 4, or with a search 13 for the rows in work and
    5 for all (7 while they are joined). GPTQ holds one more matrix ``[in, in]``, or later ``7·in``
    bytes for each row of the candidates that it rounds together.
    """
    whole, piece, copies = shape.rows * shape.inputs, shape.rows, 4
    if method.search:
        count = pieces(shape.rows, shape.inputs, torch.device("cpu"))
        piece, copies = max(part.stop - part.start for part in cut(shape.rows, count)), 13
    numbers = copies * piece * shape.inputs
    if piece < shape.rows:
        numbers = max(numbers + 5 * whole, 7 * whole)
    solving = 12 * shape.inputs**2 + 32 * min(piece, 2048) * shape.inputs + FLOAT * numbers
    if not method.gptq:
        return solving
    together = piece * min(MOST_CANDIDATES, max(1, CPU_ROWS // piece)) if method.search else piece
    rounding = 8 * shape.inputs**2 + FLOAT * numbers + 7 * together * shape.inputs
    return max(solving + FLOAT * shape.inputs**2, rounding)


def calibration_flops(shapes: Iterable[Shape], tokens: int, method: Method) -> float:
    """``2·tokens·in`` times ``out`` for each pass, and times ``in`` for the gram, and again for
    the drift. Attention is not counted. A search has three passes, of the check, the original and
    the quantized model; with GPTQ, which checks on the way, two.
    """
    grams = 2 if method.search else 1
    passes = 3 if method.search and not method.gptq else 2
    return sum(2.0 * tokens * s.calls * s.inputs * (passes * s.rows + grams * s.inputs)
               for s in shapes)  # fmt: skip


def solve_flops(shapes: Iterable[Shape], method: Method) -> float:
    """``2·out·in·(in + 2048)`` for a product of a weight and its gram with its elementwise work.

    One for each step, check and certificate, and for the error of each candidate; GPTQ costs half
    of one more for each candidate.
    """
    products: float = STEPS + CHECKS + 6  # 6: two in float64, which count twice, and the report's
    if method.search:
        sweeps = SWEEPS + 2 if method.groups and not method.gptq else 0
        rounded = CANDIDATES + (0 if sweeps else 2 * len(FINER))
        products = SOURCES * PATH_PRODUCTS + rounded + sweeps
        products += 12 + (rounded / 2 + REFITS) * method.gptq  # 12: for the drift, and the report
    return products * sum(2.0 * s.rows * s.inputs * (s.inputs + ELEMENTWISE) for s in shapes)


def measured_rate() -> float:
    """FLOP/s of a product in float32 on this machine's CPU: the best of four."""
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x, weight = torch.ones(512, 1024, **exact), torch.ones(1024, 1024, **exact)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * 512 * 1024**2 / min(seconds)


def readable(number: float, unit: str) -> str:
    """A number with three digits and a metric prefix: ``readable(1536e6, "B")`` is '1.54 GB'."""
    if number < 1000:
        return f"{number:.3g} {unit}"
    power = min(6, int(math.log10(number) / 3))
    return f"{number / 1000**power:.2f} {'kMGTPE'[power - 1]}{unit}"
