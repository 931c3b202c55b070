"""What a run costs, by formula: bytes of memory and disk, and operations of matrix products.

Everything is counted from the shapes of the weights, the calibration's tokens, and how each site is
solved. How many steps and checks a solve takes depends on the data; the constants here are what
they mostly come to (benchmarks/solver.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from magr_fx.rounding.rounding import CPU_ROWS
from magr_fx.rounding.row_pieces import cut, pieces
from magr_fx.rounding.search import ALPHAS, CLIPS, FINER, FINER_GROUPS

FLOAT = 4  # bytes: grams and solves are in float32
STEPS, LOOKS = 20, 3  # of one solve to a gap of 1e-3, and how often it looks at the gap
STEPS_OF_PATH, LOOKS_OF_PATH = 8, 1.5  # along a search's path of penalties, to a gap of 0.1
CANDIDATES = (1 + len(ALPHAS)) * len(CLIPS)  # roundings of every source with every clip
REFINED = 2 * len(FINER)  # each row's best clip, up and down
SWEEPS = 2 * len(FINER_GROUPS) + 1 + len(ALPHAS)  # of groups, by their clips and sources


@dataclass(frozen=True)
class Shape:
    """Weights that share one input: they are stacked ``[rows, inputs]`` and solved together.

    Attributes:
        rows: outputs of all of them together.
        inputs: of each.
        calls: tokens that reach it, for each token of the calibration. 1, or of an expert the
            share of the tokens that is sent to it.
    """

    rows: int
    inputs: int
    calls: float = 1.0


@dataclass(frozen=True)
class Method:
    """How a run solves.

    Attributes:
        search: whether every row chooses its own alpha and clip (``alpha="auto"``); the quantized
            model then runs beside the original one, and some tokens are held out.
        groups: whether the target quantizes groups of inputs.
        gptq: whether rounding is GPTQ's.
    """

    search: bool = True
    groups: bool = False
    gptq: bool = False

    @property
    def runs(self) -> int:
        """Models whose activations are alive together: the original, and the quantized one."""
        return 1 + self.search

    @property
    def passes(self) -> int:
        """How often the calibration runs through a model: to check, to collect, and quantized."""
        return 1 + self.runs


def gram_bytes(shapes: Iterable[Shape], method: Method) -> int:
    """``4·in²`` for each input; with a search again for the drift and for the held-out tokens."""
    return sum(FLOAT * shape.inputs**2 for shape in shapes) * (3 if method.search else 1)


def solver_bytes(shape: Shape, method: Method) -> int:
    """Bytes that one solve takes at its peak on a CPU, beside its weights and its grams.

    ``12·in²`` while the gram is factorised; ``32·min(out, 2048)·in`` for the certificate in
    float64; and matrices ``[out, in]`` in float32: 4, or with a search 13 for the piece of the
    rows that it works on and 5 for all rows (7 while the pieces are joined). GPTQ holds one more
    matrix ``[in, in]``, or, by when the certificate is gone, ``7·in`` bytes for each row of the
    candidates that it rounds together.
    """
    whole, piece, copies = shape.rows * shape.inputs, shape.rows, 4
    if method.search:
        count = pieces(shape.rows, shape.inputs, torch.device("cpu"))
        piece, copies = max(part.stop - part.start for part in cut(shape.rows, count)), 13
    numbers = copies * piece * shape.inputs
    if piece < shape.rows:
        numbers = max(numbers + 5 * whole, 7 * whole)
    certificate = 32 * min(piece, 2048) * shape.inputs
    solving = 12 * shape.inputs**2 + certificate + FLOAT * numbers
    if not method.gptq:
        return solving
    together = piece * min(CANDIDATES, max(1, CPU_ROWS // piece)) if method.search else piece
    rounding = 8 * shape.inputs**2 + FLOAT * numbers + 7 * together * shape.inputs
    return max(solving + FLOAT * shape.inputs**2, rounding)


def forward_flops(shapes: Iterable[Shape], tokens: int, method: Method) -> float:
    """``2·tokens·out·in`` for each weight and each pass; attention is not counted."""
    return sum(2.0 * tokens * s.calls * s.rows * s.inputs for s in shapes) * method.passes


def gram_flops(shapes: Iterable[Shape], tokens: int, method: Method) -> float:
    """``2·tokens·in²`` for each input, and as much for the drift X̂ᵀ(X - X̂)."""
    return sum(2.0 * tokens * s.calls * s.inputs**2 for s in shapes) * method.runs


def solve_flops(shapes: Iterable[Shape], method: Method) -> float:
    """``2·out·in²`` for every product of a weight and its gram: steps, checks, and errors.

    One for each step and each check of a solve, for its certificate, and for the error of each
    candidate. GPTQ costs half of one more for each candidate.
    """
    if method.search:
        sweeps = SWEEPS + 2 if method.groups and not method.gptq else 0
        rounded = CANDIDATES + (0 if sweeps else REFINED)
        products = len(ALPHAS) * (STEPS_OF_PATH + LOOKS_OF_PATH + 1) + rounded + sweeps
        products += 12 + rounded / 2 * method.gptq  # 12: the drift's, and what the report says
    else:
        products = STEPS + LOOKS + 6  # 6: two in float64, which count twice, and the report's
    return products * sum(2.0 * s.rows * s.inputs**2 for s in shapes)


@dataclass(frozen=True)
class Costs:
    """What a run costs.

    Attributes:
        forward: operations of the products with weights, in all passes of the calibration.
        gram, solve: operations of collecting all grams, and of all solves.
        model: bytes of the weights as they are stored.
        block, grams, solver, boundary: bytes at their most of one block's weights, of its grams, of
            one solve, and of the activations between two blocks.
        disk: bytes that the disk holds at most, beside the model.
    """

    forward: float
    gram: float
    solve: float
    model: int
    block: int
    grams: int
    solver: int
    boundary: int
    disk: int

    @property
    def memory(self) -> int:
        """Bytes at the peak, beside what the interpreter and its libraries take (0.5 GB)."""
        return self.block + self.grams + self.solver + self.boundary

    def seconds(self, product: float, step: float) -> float:
        """Calibration by the rate of a product, solves by that of a step, in FLOP/s."""
        return (self.forward + self.gram) / product + self.solve / step


def readable(number: float, unit: str) -> str:
    """A number of three digits with a metric prefix.

    Example:
        >>> readable(1536e6, "B"), readable(512, "B")
        ('1.54 GB', '512 B')
    """
    if number < 1000:
        return f"{number:.3g} {unit}"
    power = min(6, int(math.log10(number) / 3))
    return f"{number / 1000**power:.2f} {'kMGTPE'[power - 1]}{unit}"
