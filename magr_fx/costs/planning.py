"""What a run costs, by formula: bytes of memory and disk, and operations of three kinds.

Everything is counted for the weights ``[out, in]`` of a model, the calibration's tokens, and how
each site is solved. Bytes are bytes. Time is operations by rate, kind by kind (:class:`Work`,
:class:`Rates`): matrix products, factorisations, and elementwise operations, which the memory's
speed limits. What is left out is small beside what is counted: starting Python, tracing, softmax,
and the interpreter's own time for each operation, which tells where matrices are tiny.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from magr_fx.grams.gram import EXACT_UP_TO, SPLIT_FROM
from magr_fx.machine.disk import BETWEEN_STATES
from magr_fx.rounding.gptq import BLOCK
from magr_fx.rounding.rounding import CPU_ROWS
from magr_fx.rounding.row_pieces import cut, pieces
from magr_fx.rounding.search import ALPHAS, CLIPS, FINER, FINER_GROUPS

FLOAT = 4  # bytes: grams and solves are in float32

# How many steps, looks and Newton passes there are is the data's to say; these are what they mostly
# come to (benchmarks/solver.md): to a gap of 1e-3, and of 0.1 along a path.
STEPS, STEPS_OF_PATH = 20, 8
LOOKS, LOOKS_OF_PATH = 3, 1.5  # after 10, 15 and 20 steps; along a path after 5 or 10, or both
NEWTON = (
    4  # passes of iterations/prox.py from the level of the step before; the last sees no change
)
SPLITS = 2  # factorisations of a solve to 1e-3: the first, and one when ρ is balanced

# alpha="auto" (rounding/search.py): penalties that are solved for; roundings of every source with
# every clip, and of each row's best up and down; sweeps of groups by their clips and sources.
PATH = len(ALPHAS)
EACH = (1 + PATH) * len(CLIPS)
AROUND = 2 * len(FINER)
SWEEPS = 2 * len(FINER_GROUPS) + 1 + PATH
SETTLED = 2  # the limit, and all rows rounded at once
REPORTED = 3  # errors: of the aim, of the quantizer alone, of the result; again on tokens held out
JUDGED = 2  # the output error of what is written, and what it is relative to

# Elementwise operations on each number of the rows, counted in the code: so many tensors that size
# are read through by a sum, a clamp, a comparison, a copy.
NEWTON_OPS = 7  # threshold: difference, clamp, price, sum, sign, price, sum
STEP_OPS = (
    7 + NEWTON * NEWTON_OPS
)  # relaxed_step: |v|, its largest, the clamp, and four for y and v
LOOK_OPS = 62 + NEWTON * NEWTON_OPS + 9  # Tile._look; and rows gathered and kept by admm
SOLVE_OPS = 5 + 16 + 11  # admm's start, certify, _assess
EXACT_OPS = 2 * 12 + 2 * 19 - 16  # a bound and the certificate in float64: twice the bytes
QUANTIZE_OPS = 8 + 4  # torchao chooses steps and rounds; and dequantizes
ROUNDING_OPS = 3 + QUANTIZE_OPS + 3 + 2  # clip, quantize, the error, keep what is better
SWEEP_OPS = 3 + QUANTIZE_OPS + 10  # of groups, whose gains take the place of the error
GPTQ_OPS = 24 + BLOCK // 2  # one input after the other; its error reaches half of its block
SEARCH_OPS = 8 + 6 + 16 + 7 + 8  # _of_source, the drift, the report, checks, stacked and joined
WRITE_OPS = 15  # output error and largest magnitudes of what is written
DEQUANTIZE_OPS = 4  # of torchao's tensor, for each batch that meets it

# Operations of a factorisation, by in³: Cholesky, the inverse from it, and all eigenvalues.
CHOLESKY, INVERSE, EIGENVALUES = 1 / 3, 2 / 3, 4 / 3


@dataclass(frozen=True)
class Work:
    """Operations, by what limits their rate.

    Attributes:
        products: of matrix products; a multiplication and an addition are two.
        factors: of Cholesky factorisations, the inverses from them, and eigenvalues.
        elementwise: one for each number that a sum, a clamp, a comparison, ... goes through.
    """

    products: float = 0.0
    factors: float = 0.0
    elementwise: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.factors + other.factors,
            self.elementwise + other.elementwise,
        )

    def __mul__(self, times: float) -> Work:
        return Work(times * self.products, times * self.factors, times * self.elementwise)

    @property
    def flops(self) -> float:
        """Floating-point operations of products and factorisations."""
        return self.products + self.factors

    def seconds(self, rates: Rates, *, products: float) -> float:
        """Each kind by its rate; that of products, which the dtype decides, is given.

        Example:
            >>> rates = Rates(forward=9.0, solve=4.0, factors=2.0, elementwise=10.0, disk=1.0)
            >>> Work(products=8.0, factors=2.0, elementwise=5.0).seconds(rates, products=4.0)
            3.5
        """
        return (
            self.products / products
            + self.factors / rates.factors
            + self.elementwise / rates.elementwise
        )


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
    works on one piece of the rows at a time (:func:`pieces`, on a CPU), and has
    5 of the whole weight beside it, where that is more than a piece; 7 when the pieces are joined.

    GPTQ keeps a factor of the gram, ``4·in²`` more. It rounds many candidates at once
    (:mod:`rounding`), which takes ``7·in`` bytes for each of their rows: what is left to
    round in float32, and three copies of the codes. By then the certificate is gone, and of the
    matrices ``[in, in]`` only two are left.
    """
    whole = shape.rows * shape.inputs
    piece = _piece(shape) if method.search else shape.rows
    copies = 13 if method.search else 4
    numbers = copies * piece * shape.inputs
    if piece < shape.rows:
        numbers = max(numbers + 5 * whole, 7 * whole)
    certificate = 32 * min(piece, 2048) * shape.inputs
    solving = 12 * shape.inputs**2 + certificate + FLOAT * numbers
    if not method.gptq:
        return solving
    together = piece * min(EACH, max(1, CPU_ROWS // piece)) if method.search else piece
    rounding = 8 * shape.inputs**2 + FLOAT * numbers + 7 * together * shape.inputs
    return max(solving + FLOAT * shape.inputs**2, rounding)


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


def disk_bytes(model: int, copies: int, boundary: int) -> int:
    """Bytes that the disk holds at most beside the model: copies of its weights, and two states.

    Args:
        model: bytes of the whole model.
        copies: 2, what is saved to go on from and the result; 3 to quantize; one more where
            transformers fuses experts, which it writes anew.
        boundary: bytes of the activations between blocks; the last state stays until the next is
            whole.
    """
    return copies * model + 2 * boundary


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


def gram_work(shapes: Iterable[Shape], tokens: int, method: Method, *, batches: int = 1) -> Work:
    """Collecting the grams, beside running the model.

    Products: XᵀX, ``2·tokens·in²``, of which only 5/8 are computed from 256 inputs on, and
    the whole of the drift X̂ᵀ(X - X̂). Elementwise: every activation is looked at once
    (``tokens·in``), X - X̂ is another; and the quantized run dequantizes every weight for each
    batch.
    """
    work = Work()
    for s in shapes:
        reached = tokens * s.calls * s.problems
        gram = 5 / 8 if s.inputs >= SPLIT_FROM else 1.0
        work += Work(
            products=2.0 * reached * s.inputs**2 * (gram + method.propagate),
            elementwise=reached * s.inputs * (1 + method.propagate)
            + DEQUANTIZE_OPS * batches * s.parameters * method.propagate,
        )
    return work


def solve_work(shapes: Iterable[Shape], method: Method) -> Work:
    """Solving and rounding the rows of all shapes, and judging and writing what was found.

    Products of ``2·out·in²``: one a step and one a look, one a certificate, one for the error of
    each candidate. With a search: four solves of about 8 steps, 19 candidates (with GPTQ each
    costs half a product more: an input's error reaches those after it; to the nearest in groups
    15 and 11 sweeps), one for the drift, and one to solve with its factor. Without one: about 20
    steps, and two products in float64, which are twice as dear.

    Factorisations, ``in³`` each times: λmax's proof 1/3 (up to 1024 inputs its eigenvalues,
    4/3), ρ's 1/3 and its inverse 2/3; again for each piece of the rows that a search works on. The
    drift's 1/3, and GPTQ's two and an inverse, are once for all rows.

    Elementwise: the operations of a step, of a look, of a rounding, ... on ``out·in`` numbers
    each, as counted at the top of this file.
    """
    work = Work()
    for shape in shapes:
        one = _search_work(shape, method) if method.search else _single_work(shape)
        work += one * shape.problems
    return work


def _search_work(shape: Shape, method: Method) -> Work:
    by_group = method.groups and not method.gptq
    around = 0 if by_group else AROUND
    last = 1 if method.gptq else SETTLED  # with GPTQ the aim on the chosen grids
    sweeps = SWEEPS if by_group else 0
    rounded = EACH + around + (1 if method.gptq else 0)

    products = PATH * (STEPS_OF_PATH + LOOKS_OF_PATH + 1)
    products += 1 + EACH + around + last  # errors, with the quantizer's alone
    products += (sweeps + 2) * by_group  # each keeps the slope, from the first on; and the error
    products += rounded / 2 * method.gptq
    products += 2 * method.propagate + REPORTED * (1 + method.held) + JUDGED * (not method.gptq)

    own = PATH * (STEPS_OF_PATH * STEP_OPS + LOOKS_OF_PATH * LOOK_OPS + SOLVE_OPS)
    own += (rounded + 3) * ROUNDING_OPS  # and the quantizer alone, all at once, and the result
    own += sweeps * SWEEP_OPS + rounded * GPTQ_OPS * method.gptq + SEARCH_OPS + WRITE_OPS

    times = pieces(shape.rows, shape.inputs, torch.device("cpu"))
    factors = times * (_largest_eigenvalue(shape.inputs) + CHOLESKY + INVERSE)
    factors += CHOLESKY * method.propagate + (2 * CHOLESKY + INVERSE) * method.gptq
    return _work(shape, products, factors, own)


def _single_work(shape: Shape) -> Work:
    products = STEPS + LOOKS + 2 * 2 + JUDGED
    own = STEPS * STEP_OPS + LOOKS * LOOK_OPS + SOLVE_OPS + EXACT_OPS + WRITE_OPS
    factors = _largest_eigenvalue(shape.inputs) + SPLITS * (CHOLESKY + INVERSE)
    return _work(shape, products, factors, own)


def _work(shape: Shape, products: float, factors: float, elementwise: float) -> Work:
    """Of one problem: numbers of products, of in³, and of operations on each number."""
    numbers = shape.rows * shape.inputs
    return Work(
        products=products * 2.0 * numbers * shape.inputs,
        factors=factors * float(shape.inputs) ** 3,
        elementwise=elementwise * numbers,
    )


def _largest_eigenvalue(inputs: int) -> float:
    return EIGENVALUES if inputs <= EXACT_UP_TO else CHOLESKY


@dataclass(frozen=True)
class Rates:
    """What a machine does; `magr-fx plan` measures it (:mod:`magr_fx.costs.measure_rates`).

    Attributes:
        forward: operations per second of matrix products in the model's dtype.
        solve: the same in float32, of some rows with a gram's size.
        factors: operations per second of a Cholesky factorisation in float32.
        elementwise: numbers in float32 per second that one elementwise operation goes through;
            about the memory's bytes per second by 12, two numbers being read and one written.
        disk: bytes per second that the weights are read with.
    """

    forward: float
    solve: float
    factors: float
    elementwise: float
    disk: float

    def with_products(self, rate: float) -> Rates:
        """Those of a machine that has this rate of products, in any dtype, and the same balance.

        Example:
            >>> here = Rates(forward=9.0, solve=4.0, factors=2.0, elementwise=1.0, disk=1.0)
            >>> here.with_products(8.0)
            Rates(forward=8.0, solve=8.0, factors=4.0, elementwise=2.0, disk=1.0)
        """
        times = rate / self.solve
        return Rates(rate, rate, times * self.factors, times * self.elementwise, self.disk)


@dataclass(frozen=True)
class Costs:
    """What a run costs.

    Attributes:
        forward: one run of the calibration through the model.
        passes: how many such runs there are.
        gram: collecting all grams.
        solve: all solves.
        model: bytes of the weights as they are stored.
        block: bytes of the weights of the largest block.
        grams: bytes of the grams of the dearest block.
        solver: bytes of the dearest solve.
        boundary: bytes of the activations between two blocks, at their most.
        disk: bytes that are on the disk at most.
        steps: how many there are, after each of which a checkpoint may write a state.
        state: bytes of one, in the mean over the steps: of the activations between two blocks
            what is not alike in both runs. The disk holds two.
    """

    forward: Work
    passes: int
    gram: Work
    solve: Work
    model: int
    block: int
    grams: int
    solver: int
    boundary: int
    disk: int
    steps: int
    state: int

    @property
    def memory(self) -> int:
        """Bytes at the peak, beside what the interpreter and its libraries take (0.5 GB)."""
        return self.block + self.grams + self.solver + self.boundary

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Predicted time by stage.

        The weights are read once to be looked at, once for the fingerprint, and in every pass; the
        states are a checkpoint's, which the command line always writes.
        """
        return {**self._work(rates), "states": self.states(rates) / rates.disk}

    def states(self, rates: Rates) -> float:
        """Bytes of all states that a checkpoint writes.

        One for every :data:`BETWEEN_STATES` seconds of work, but no more than there
        are steps; and the last one, which holds no activations.
        """
        work = sum(self._work(rates).values())
        return min(float(self.steps - 1), work / BETWEEN_STATES) * self.state

    def _work(self, rates: Rates) -> dict[str, float]:
        return {
            "forward": self.passes * self.forward.seconds(rates, products=rates.forward),
            "grams": self.gram.seconds(rates, products=rates.solve),
            "solve": self.solve.seconds(rates, products=rates.solve),
            "disk": ((2 + self.passes) * self.model + self.disk - 2 * self.boundary) / rates.disk,
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
