"""Formulas for the cost of a run: bytes of memory and disk, and FLOPs of matrix products.

Costs follow from the shapes of the weights, the number of calibration tokens, and the method of
each solve. The number of steps and checks in a solve depends on the data; the constants here are
typical numbers (benchmarks/solver.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from magr_fx.rounding.rounding import CPU_ROWS
from magr_fx.rounding.row_pieces import cut, pieces
from magr_fx.rounding.search import ALPHAS, CLIPS, FINER, FINER_GROUPS

FLOAT = 4  # bytes of a number: grams and solves are in float32
STEPS, CHECKS = 20, 3  # steps of one solve to a relative dual gap of 1e-3, and checks of the gap
STEPS_OF_PATH, CHECKS_OF_PATH = 8, 1.5  # the same for each alpha of a search, to a gap of 0.1
CANDIDATES = (1 + len(ALPHAS)) * len(CLIPS)  # roundings: each alpha, and 0, with each clip
REFINED = 2 * len(FINER)  # roundings that refine each row's best clip, up and down
SWEEPS = 2 * len(FINER_GROUPS) + 1 + len(ALPHAS)  # sweeps over groups, for their clips and alphas


@dataclass(frozen=True)
class Shape:
    """The weights that share one input: they are stacked ``[rows, inputs]`` and solved together.

    Attributes:
        rows: the number of outputs of all these weights.
        inputs: the number of inputs of each of these weights.
        calls: the share of the calibration tokens that reach the weights: 1, or less for an expert.
    """

    rows: int
    inputs: int
    calls: float = 1.0


@dataclass(frozen=True)
class Method:
    """How a run solves each site.

    Attributes:
        search: whether alpha and clip are chosen for every row (``alpha="auto"``). The quantized
            model then runs beside the original one, and some tokens are held out.
        groups: whether the target quantizes groups of inputs.
        gptq: whether weights are rounded by GPTQ.
    """

    search: bool = True
    groups: bool = False
    gptq: bool = False

    @property
    def runs(self) -> int:
        """Models whose activations are in memory: the original, and with a search the quantized."""
        return 1 + self.search

    @property
    def passes(self) -> int:
        """Passes of the calibration through a model: one to check, and one for each model run."""
        return 1 + self.runs


def gram_bytes(shapes: Iterable[Shape], method: Method) -> int:
    """Bytes of the grams: ``4·in²`` for each input, three times that with a search.

    A search also needs the drift and the gram of the held-out tokens.
    """
    return sum(FLOAT * shape.inputs**2 for shape in shapes) * (3 if method.search else 1)


def solver_bytes(shape: Shape, method: Method) -> int:
    """Bytes that one solve takes at its peak on a CPU, without its weights and its grams.

    It is the sum of ``12·in²`` while the gram is factorised, ``32·min(out, 2048)·in`` for the
    certificate in float64, and matrices ``[out, in]`` in float32. There are 4 of these matrices; a
    search has 13 for the piece of rows that it works on, and 5 for all rows (7 while the pieces are
    joined). GPTQ adds one matrix ``[in, in]``. After the certificate is freed, it needs ``8·in²``
    and ``7·in`` bytes for each row of the candidates that it rounds together instead.
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
    """FLOPs of the forward passes: ``2·tokens·out·in`` per weight and pass, without attention."""
    return sum(2.0 * tokens * s.calls * s.rows * s.inputs for s in shapes) * method.passes


def gram_flops(shapes: Iterable[Shape], tokens: int, method: Method) -> float:
    """FLOPs of the grams: ``2·tokens·in²`` for each input; a search has the drift X̂ᵀ(X - X̂) too."""
    return sum(2.0 * tokens * s.calls * s.inputs**2 for s in shapes) * method.runs


def solve_flops(shapes: Iterable[Shape], method: Method) -> float:
    """FLOPs of the solves: ``2·out·in²`` for every product of a weight and its gram.

    There is one product for each step and each check of a solve, for its certificate, and for the
    error of each candidate. GPTQ costs half a product more for each candidate.
    """
    if method.search:
        sweeps = SWEEPS + 2 if method.groups and not method.gptq else 0
        rounded = CANDIDATES + (0 if sweeps else REFINED)
        products = len(ALPHAS) * (STEPS_OF_PATH + CHECKS_OF_PATH + 1) + rounded + sweeps
        products += 12 + rounded / 2 * method.gptq  # 12: for the drift and the report
    else:
        products = STEPS + CHECKS + 6  # 6: two in float64 count twice, and two are the report's
    return products * sum(2.0 * s.rows * s.inputs**2 for s in shapes)


@dataclass(frozen=True)
class Costs:
    """The cost of a run.

    Attributes:
        forward: FLOPs of the products with weights, in all passes of the calibration.
        gram: FLOPs of collecting all grams.
        solve: FLOPs of all solves.
        model: bytes of the weights as they are stored.
        block: bytes of the weights of the largest block.
        grams: bytes of the grams that are in memory together, at most.
        solver: bytes of one solve, at most.
        boundary: bytes of the activations between two blocks, at most.
        disk: bytes that the run needs on the disk, at most, without the original model.
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
        """Peak bytes of memory, without Python and its libraries (0.5 GB)."""
        return self.block + self.grams + self.solver + self.boundary

    def seconds(self, product: float, step: float) -> float:
        """Seconds of calibration and solves.

        Args:
            product: FLOP/s of a product with a weight, for the calibration.
            step: FLOP/s of a solver's step, for the solves.
        """
        return (self.forward + self.gram) / product + self.solve / step


def readable(number: float, unit: str) -> str:
    """A number with three digits and a metric prefix.

    Example:
        >>> readable(1536e6, "B"), readable(512, "B")
        ('1.54 GB', '512 B')
    """
    if number < 1000:
        return f"{number:.3g} {unit}"
    power = min(6, int(math.log10(number) / 3))
    return f"{number / 1000**power:.2f} {'kMGTPE'[power - 1]}{unit}"
