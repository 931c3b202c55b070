"""Another processor on this one: its products, sums and factorisations, and inputs off by 1e-6.

``pytest --perturb SEED`` replaces torch's own CPU kernels for the whole process, whoever calls
them. A seed stands for a processor: how far a number moves is made from the seed and its mantissa
alone. So the same computation gives the same bits wherever and however often it is done, as on a
real processor, and what is promised to the bit (rows that are independent, runs that go on) has to
hold. A symmetric matrix stays symmetric, and a factor that is a power of two, or -1, changes
nothing but the exponent or the sign.

- What is drawn at random, hence nearly every input of a test, moves by up to 1e-6 of itself.
- The operands of a product of k terms, and of a factorisation of k inputs, move by up to √k
  roundings (1e-6 of themselves at the most), which is what another order of summation does. The
  results of sums likewise. One result in 64 in half precision moves to its neighbour.
- What is exact on every processor stays: a number that needs no more than half of its bits (3, or
  0.5), a product with a diagonal matrix, a sum of two terms. Factorisations divide and take roots,
  and move the former too.

Not reached: processes that a test starts, devices other than the CPU, and what NumPy and SciPy do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The most that a number moves, as a share of itself.
MOST = 1e-6

_PRODUCTS = (
    *("mm", "mm.out", "addmm", "addmm_", "addmm.out", "bmm", "bmm.out"),
    *("baddbmm", "baddbmm_", "baddbmm.out", "addmv", "addmv_", "addmv.out", "dot", "vdot"),
)
_FACTORISATIONS = (
    *("linalg_cholesky_ex", "linalg_cholesky_ex.L", "cholesky_inverse", "cholesky_inverse.out"),
    *("_linalg_eigh", "_linalg_eigh.eigenvalues", "_linalg_svd", "_linalg_svd.U"),
    *("_linalg_solve_ex", "_linalg_solve_ex.result", "linalg_inv_ex", "linalg_inv_ex.inverse"),
    *("linalg_solve_triangular", "linalg_solve_triangular.out", "linalg_qr", "linalg_qr.out"),
)
_SUMS = (
    *("sum.dim_IntList", "sum.IntList_out", "mean.dim", "mean.out"),
    *("linalg_vector_norm", "linalg_vector_norm.out"),
)
_DRAWS = ("normal_", "uniform_")

# The integer that holds such a number, and how many of its bits are the mantissa.
_MANTISSA = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}
_ODD = (0x45D9F3B, 0x2C1B3C6D, 0x297A2D39)
_32_BITS = (1 << 32) - 1

_in_force: list[torch.library.Library] = []  # ends with its last reference

Kernel = Callable[..., Any]


def perturb(seed: int) -> None:
    """Round otherwise from now on, in this process, to its end."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _in_force.append(library)
    wrapped = [
        *((name, _product) for name in _PRODUCTS),
        *((name, _factorisation) for name in _FACTORISATIONS),
        *((name, _sum) for name in _SUMS),
        *((name, _draw) for name in _DRAWS),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its kernels are overridden
        for name, wrap in wrapped:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
            library.impl(name, wrap(kernel, seed), "CPU", with_keyset=True)  # type: ignore[no-untyped-call]


def _product(kernel: Kernel, seed: int) -> Kernel:
    def product(keys: Any, *args: Any, **options: Any) -> Any:
        # The last two are multiplied; what stands before them is added to.
        at = [at for at, value in enumerate(args) if isinstance(value, Tensor)][-2:]
        terms = min(_most_in_a_row(args[at[0]]), _most_in_a_column(args[at[1]]))
        inputs = list(args)
        for factor in at:
            inputs[factor] = rounded_otherwise(args[factor], terms, seed)
        return _written(kernel(keys, *inputs, **options), terms, seed)

    return product


def _factorisation(kernel: Kernel, seed: int) -> Kernel:
    def factorise(keys: Any, *args: Any, **options: Any) -> Any:
        matrix = args[0]
        terms = _most_in_a_row(matrix)
        moved = rounded_otherwise(matrix, terms, seed, exact_too=True)
        return _written(kernel(keys, moved, *args[1:], **options), terms, seed)

    return factorise


def _sum(kernel: Kernel, seed: int) -> Kernel:
    def add_up(keys: Any, *args: Any, **options: Any) -> Any:
        result = kernel(keys, *args, **options)
        terms = args[0].numel() // max(1, result.numel())
        return _written(result, terms if terms > 2 else 1, seed)

    return add_up


def _draw(kernel: Kernel, seed: int) -> Kernel:
    def draw(keys: Any, *args: Any, **options: Any) -> Any:
        drawn = kernel(keys, *args, **options)
        return drawn.copy_(_moved(drawn, MOST, seed))

    return draw


def _most_in_a_row(matrix: Tensor) -> int:
    """The most numbers other than 0 in a row: a diagonal matrix has one."""
    return int((matrix != 0).sum(-1).amax()) if matrix.numel() else 0


def _most_in_a_column(matrix: Tensor) -> int:
    return _most_in_a_row(matrix.mT if matrix.dim() > 1 else matrix)


def _written(results: Any, terms: int, seed: int) -> Any:
    """The results, in their own memory: that may be the caller's (``out=``)."""
    for result in results if isinstance(results, tuple) else (results,):
        result.copy_(rounded_otherwise(result, terms, seed))
    return results


def rounded_otherwise(numbers: Tensor, terms: int, seed: int, *, exact_too: bool = False) -> Tensor:
    """Each number as another order of so many terms may leave it."""
    if terms < 2:
        return numbers
    if numbers.dtype in (torch.float16, torch.bfloat16):
        return _to_neighbours(numbers, seed)
    if numbers.dtype not in _MANTISSA:
        return numbers
    rounding = torch.finfo(numbers.dtype).eps / 2
    return _moved(numbers, min(MOST, math.sqrt(terms) * rounding), seed, exact_too=exact_too)


def _moved(numbers: Tensor, share: float, seed: int, *, exact_too: bool = False) -> Tensor:
    """Each number x as x·(1 + share·ε), ε in [-1, 1) made from the seed and the mantissa of x."""
    if numbers.dtype not in _MANTISSA:
        return numbers
    integer, length = _MANTISSA[numbers.dtype]
    mantissa = numbers.contiguous().view(integer).long() & ((1 << length) - 1)
    epsilon = _mixed(mantissa, seed).double() / 2**31 - 1
    result = (numbers.double() * (1 + share * epsilon)).to(numbers.dtype)
    stays = ~(numbers.isfinite() & result.isfinite())
    if not exact_too:
        stays |= mantissa & ((1 << (length + 1) // 2) - 1) == 0
    return torch.where(stays, numbers, result)


def _to_neighbours(numbers: Tensor, seed: int) -> Tensor:
    """One number in 64 to the next one away from 0; those of few bits stay."""
    bits = numbers.contiguous().view(torch.int16)
    mantissa = bits.long() & (127 if numbers.dtype == torch.bfloat16 else 1023)
    neighbours = (bits + 1).view(numbers.dtype)
    moves = (_mixed(mantissa, seed) % 64 == 0) & (mantissa & 15 != 0) & neighbours.isfinite()
    return torch.where(moves, neighbours, numbers)


def _mixed(numbers: Tensor, seed: int) -> Tensor:
    """32 bits that look random, of each whole number and the seed."""
    mixed = (numbers ^ (numbers >> 32)) & _32_BITS
    for odd in _ODD:
        mixed = ((mixed ^ (mixed >> 16)) * odd + seed) & _32_BITS
    return mixed ^ (mixed >> 16)
