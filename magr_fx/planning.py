"""What a run costs, by formula: bytes of memory and disk, and floating-point operations.

Everything is counted for the weights ``[out, in]`` of a model, the calibration's tokens, and how
each site is solved. Bytes are bytes; operations are floating-point operations, a multiplication and
an addition being two. What is left out is small beside what is counted: norms, softmax, and
elementwise steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from magr_fx.row_pieces import cut, pieces

FLOAT = 4  # bytes: grams and solves are in float32

# alpha="auto" (magr_fx/search.py): four penalties solved for, and about how many roundings of all
# rows are compared: 5 sources by 3 clips, four around the best, and torchao alone.
PATH = 4
CANDIDATES = 21
# Groups then choose one by one (clips up and down by three steps, and five sources).
GROUP_SWEEPS = 11
# Steps that ADMM mostly takes (benchmarks/solver.md): to a gap of 1e-3, and of 0.1 along a path.
STEPS, STEPS_OF_PATH = 20, 8


@dataclass(frozen=True)
class Shape:
    """Weights that share one input: they are stacked, and solved as one problem.

    Attributes:
        rows: outputs of all of them together.
        inputs: of each.
        calls: how many tokens reach it for each token of the calibration: 1; of an expert, the
            share of the tokens that are sent to it.
        problems: how many such there are, one by one: 1; of a stack of experts, their number.
    """

    rows: int
    inputs: int
    calls: float = 1.0
    problems: int = 1

    @property
    def parameters(self) -> int:
        return self.problems * self.rows * self.inputs


@dataclass(frozen=True)
class Method:
    """How a run solves.

    Attributes:
        search: whether every row chooses its own alpha and clip (``alpha="auto"``).
        propagate: whether the quantized model is run beside the original one.
        groups: whether the target quantizes groups of inputs.
        gptq: whether rounding is GPTQ's.
        held: whether some tokens are held out, which takes a gram of their own.
    """

    search: bool = True
    propagate: bool = True
    groups: bool = False
    gptq: bool = False
    held: bool = True


def weight_bytes(shapes: Iterable[Shape], itemsize: int) -> int:
    """Bytes of the weights: ``out·in·itemsize`` each."""
    return sum(shape.parameters for shape in shapes) * itemsize


def gram_bytes(shapes: Iterable[Shape], method: Method) -> int:
    """Bytes of the grams that are alive together: ``4·in²`` for each distinct input, times ...

    ... one, and one more for the drift (``propagate``), and one for the tokens held out.
    """
    matrices = 1 + method.propagate + method.held
    return sum(shape.problems * FLOAT * shape.inputs**2 for shape in shapes) * matrices


def solver_bytes(shape: Shape, method: Method) -> int:
    """Bytes that solving one problem takes, at its peak, beside its weights and its grams.

    ``12·in²`` while the gram is damped and factorised; ``32·min(out, 2048)·in`` of the
    certificate in float64; and in float32, of ``out·in`` numbers each: 4 without a search (the best
    iterate, the direction of the dual, z + u, the result), 13 with one (the path's solutions, the
    best values and weights so far, the candidate, what was rounded, the aim, the steps). A search
    works on one piece of the rows at a time (:func:`magr_fx.row_pieces.pieces`, on a CPU), and has
    5 of the whole weight beside it, where that is more than a piece; 7 when the pieces are joined.
    """
    whole = shape.rows * shape.inputs
    piece = _piece(shape) if method.search else shape.rows
    copies = 13 if method.search else 4
    numbers = copies * piece * shape.inputs
    if piece < shape.rows:
        numbers = max(numbers + 5 * whole, 7 * whole)
    certificate = 32 * min(piece, 2048) * shape.inputs
    return 12 * shape.inputs**2 + certificate + FLOAT * numbers


def _piece(shape: Shape) -> int:
    """The most rows that a search works on together."""
    count = pieces(shape.rows, shape.inputs, torch.device("cpu"))
    most: int = max(piece.stop - piece.start for piece in cut(shape.rows, count))
    return most


def boundary_bytes(width: int, tokens: int, itemsize: int, method: Method) -> int:
    """Bytes of the activations between two blocks: ``tokens·width·itemsize``, of one run or two.

    Args:
        width: numbers per token: between layers the hidden size; with ``propagate``, which stops
            inside a layer, about the hidden size and the intermediate size.
        tokens: of the whole calibration.
        itemsize: bytes of an activation's number.
        method: whether two runs are alive.
    """
    return tokens * width * itemsize * (1 + method.propagate)


def disk_bytes(rewritten: int, model: int, boundary: int) -> int:
    """Bytes that are written: the checkpoint and the rewritten blocks, the result, two states.

    Args:
        rewritten: bytes of the weights that are rewritten.
        model: bytes of the whole model.
        boundary: bytes of the activations between blocks; the last state stays until the next is
            whole.
    """
    return 2 * rewritten + model + 2 * boundary


def forward_flops(shapes: Iterable[Shape], tokens: int) -> float:
    """Operations of the weights' products for the calibration: ``2·tokens·out·in``."""
    return sum(2.0 * tokens * s.calls * s.rows * s.inputs * s.problems for s in shapes)


def attention_flops(layers: int, width: int, tokens: int, length: int) -> float:
    """Operations of QKᵀ and AV: ``4·tokens·length·width`` a layer, masked parts counted.

    Args:
        layers: with attention.
        width: heads times the size of a head.
        tokens: of the whole calibration.
        length: of a window.
    """
    return 4.0 * layers * tokens * length * width


def passes(method: Method) -> int:
    """How often the calibration runs through the model: to check, to collect, and quantized."""
    return 2 + method.propagate


def gram_flops(shapes: Iterable[Shape], tokens: int, method: Method) -> float:
    """Operations of XᵀX, and of the drift X̂ᵀ(X - X̂): ``2·tokens·in²`` each."""
    products = 1 + method.propagate
    return sum(2.0 * tokens * s.calls * s.inputs**2 * s.problems for s in shapes) * products


def solve_flops(shapes: Iterable[Shape], method: Method) -> float:
    """Operations of the solves: one product ``2·out·in²`` a step, an evaluation, a candidate.

    And ``8/3·in³ + 2·in³`` for λmax's proof, the factorisation and the inverse, for each piece of
    the rows that a search works on. With a search:
    four solves of about 8 steps, 21 candidates (with GPTQ each costs ``out·in²`` more: an input's
    error reaches those after it), and to the nearest in groups 11 sweeps. Without: about 20 steps,
    two products in float64 (twice as dear) and the output error.
    """
    total = 0.0
    for shape in shapes:
        product = 2.0 * shape.rows * shape.inputs**2
        cube = float(shape.inputs) ** 3
        if method.search:
            products = PATH * (STEPS_OF_PATH + 1) + CANDIDATES * (1 + method.gptq / 2) + 4
            products += GROUP_SWEEPS * (method.groups and not method.gptq)
            times = pieces(shape.rows, shape.inputs, torch.device("cpu")) + method.gptq
            factors = (8 / 3 + 2) * cube * times
        else:
            products = STEPS + 2 * 2 + 1
            factors = (8 / 3 + 2) * cube
        total += shape.problems * (product * products + factors)
    return total


@dataclass(frozen=True)
class Rates:
    """What a machine does.

    Attributes:
        forward: operations per second of matrix products in the model's dtype.
        solve: the same in float32.
        disk: bytes per second that the weights are read with.
    """

    forward: float
    solve: float
    disk: float


@dataclass(frozen=True)
class Costs:
    """What a run costs.

    Attributes:
        forward: operations of one run of the calibration through the model.
        passes: how many such runs there are.
        gram: operations of all grams.
        solve: operations of all solves.
        model: bytes of the weights as they are stored.
        block: bytes of the weights of the largest block.
        grams: bytes of the grams of the dearest block.
        solver: bytes of the dearest solve.
        boundary: bytes of the activations between two blocks, at their most.
        disk: bytes that are written.
    """

    forward: float
    passes: int
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

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Predicted time by stage.

        The weights are read once to be looked at, once for the fingerprint, and in every pass.
        """
        return {
            "forward": self.passes * self.forward / rates.forward,
            "grams": self.gram / rates.solve,
            "solve": self.solve / rates.solve,
            "disk": ((2 + self.passes) * self.model + self.disk) / rates.disk,
        }


def readable(number: float, unit: str) -> str:
    """A number with a prefix of three digits: ``readable(2.1e12, "FLOP")`` is "2.10 TFLOP".

    Example:
        >>> readable(1536e6, "B"), readable(512, "B")
        ('1.54 GB', '512 B')
    """
    if number < 1000:
        return f"{number:.3g} {unit}"
    power = min(6, int(math.log10(number) / 3))
    return f"{number / 1000**power:.2f} {'kMGTPE'[power - 1]}{unit}"
