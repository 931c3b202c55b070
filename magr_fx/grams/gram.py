"""The gram G = XᵀX of a site's calibration inputs: its sums, its λmax and the output errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from magr_fx.machine.matmul_precision import full_float32
from magr_fx.machine.memory import is_out_of_memory

# Up to this size all eigenvalues are computed, which is exact and takes as long as a few steps of
# the solver. For larger grams λmax is estimated by an iteration, and the estimate is verified.
EXACT_UP_TO = 1024
# The estimate may lie below λmax by this relative error.
SLACK = 1e-3
_ITERATIONS = 40
# With a gram larger than this, or smaller than its inverse, the products of the gram and two
# weights may leave the range of float32.
_FAR = 2.0**40


@torch.no_grad()
def largest_eigenvalue(gram: Tensor) -> Tensor:
    """λmax of each symmetric positive semidefinite gram: ``[..., in, in]`` to ``[...]``.

    Small grams are diagonalised. For large ones LOBPCG gives an estimate λ ≤ λmax. A Cholesky
    factorisation of (1 + 10⁻³)λI - G exists only if λmax ≤ (1 + 10⁻³)λ, so it proves that the
    estimate is not too low; if it fails, the gram is diagonalised after all. The step 1/λ of
    projected gradient descent, which must stay below 2/λmax, is thus at most 1.001/λmax. A gram
    of zeros has λmax = 0, and the result is never negative. The computation is in float64 for
    float64, in float32 otherwise. The same gram gives the same bits; a gram scaled by a power of
    two gives the scaled result, bit for bit.

    Raises:
        LinAlgError: the eigenvalues do not converge, not even in float64.

    Example:
        >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 4.0])))
        tensor(4.)
    """
    gram = gram if gram.dtype == torch.float64 else gram.to(torch.float32)
    if gram.dim() > 2:
        flat = [largest_eigenvalue(one) for one in gram.flatten(0, -3)]
        return torch.stack(flat).view(gram.shape[:-2])
    unit = unit_of(gram)
    scaled = gram / unit  # LOBPCG and eigvalsh have absolute thresholds for small numbers
    found = _bounded_estimate(scaled) if len(gram) > EXACT_UP_TO else None
    if found is None:
        try:
            found = torch.linalg.eigvalsh(scaled)[-1]  # ascending
        except LinAlgError:
            found = torch.linalg.eigvalsh(scaled.to(torch.float64))[-1].to(gram.dtype)
    return (found * unit).clamp(min=0)


def unit_of(gram: Tensor) -> float:
    """The largest power of two that is at most the largest diagonal entry.

    1 if that entry is 0 or not finite.
    """
    return _power_of_two(float(gram.diagonal().amax()))


def _power_of_two(value: float) -> float:
    return 2.0 ** (math.frexp(value)[1] - 1) if 0 < value < math.inf else 1.0


def within_range(gram: Tensor) -> Tensor:
    """The gram, ``[in, in]``, divided by a power of two if its products could leave float32.

    The scale does not change what is chosen with the gram, because errors are only compared.
    """
    unit = unit_of(gram)
    return gram if 1 / _FAR < unit < _FAR else gram / unit


def _bounded_estimate(gram: Tensor) -> Tensor | None:
    """λ with λ ≤ λmax ≤ (1 + SLACK)λ up to rounding; None if that cannot be proved."""
    if not bool(gram.diagonal().amax() > 0):
        return None
    # Its own generator, on the CPU: every device and every run has the same start.
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), 1, generator=draw, dtype=torch.float32, device="cpu")
    start = gram @ start.to(gram)  # a power step, which nearly suffices if one input dominates
    try:
        with full_float32():
            values, _ = torch.lobpcg(gram, X=start, niter=_ITERATIONS, largest=True)
    except (RuntimeError, ArithmeticError) as error:  # LOBPCG divides by norms that can be 0
        if is_out_of_memory(error):
            raise
        return None
    estimate: Tensor = values[0]
    shifted = -gram
    shifted.diagonal().add_((1 + SLACK) * estimate)
    _, info = torch.linalg.cholesky_ex(shifted)
    return estimate if int(info) == 0 else None


# Rows that are converted to float32 at a time: bounds the copy, and keeps the product efficient.
_CHUNK = 8192
# Grams with at least SPLIT_FROM inputs are summed in _PARTS block rows, of which only the upper
# triangle is computed: 5/8 of the operations, and 0.7 to 0.75 of the time on a CPU. More parts are
# hardly faster.
SPLIT_FROM, _PARTS = 256, 4


@torch.no_grad()
def add_to_gram(gram: Tensor, tokens: Tensor, rows: Tensor | None = None) -> None:
    """Add XᵀX to ``gram`` in place, in float32 whatever the activation's dtype.

    On CUDA float16 and bfloat16 are multiplied by tensor cores without a conversion: the product
    of two such numbers is exact in float32, and the sums are in float32.

    Args:
        gram: ``[in, in]`` float32.
        tokens: X, ``[tokens, in]``, any floating dtype, any device.
        rows: ``[rows]`` int64, the indices of the tokens to sum; the others are not read. None
            takes all tokens.
    """
    for part in _chunks(tokens, rows):
        taken = tokens[part].to(gram.device)
        with full_float32():
            _add_square(gram, taken if _multiplies_into_float32(taken) else taken.float())


def _add_square(gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX by block rows: computes the upper triangle, and mirrors it to the lower one."""
    size = len(gram) if len(gram) < SPLIT_FROM else -(-len(gram) // _PARTS)
    for start in range(0, len(gram), size):
        end = min(start + size, len(gram))
        left, right, sums = rows[:, start:end].T, rows[:, start:], gram[start:end, start:]
        if rows.dtype == torch.float32:
            sums.addmm_(left, right)
        else:
            sums.add_(torch.mm(left, right, out_dtype=torch.float32))
        gram[end:, start:end] = gram[start:end, end:].T


def _multiplies_into_float32(rows: Tensor) -> bool:
    """Whether torch can multiply these rows without a conversion and sum in float32."""
    return rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)


@torch.no_grad()
def add_to_drift(
    drift: Tensor, tokens: Tensor, original: Tensor, rows: Tensor | None = None
) -> None:
    """Add X̂ᵀ(X - X̂) to ``drift`` in place: the input error X - X̂ of a quantized model.

    Args:
        drift: ``[in, in]`` float32.
        tokens: X̂, ``[tokens, in]``, any floating dtype, any device.
        original: X, ``[tokens, in]``: the same tokens in the original model.
        rows: as for :func:`add_to_gram`.
    """
    for part in _chunks(tokens, rows):
        taken = tokens[part].to(drift.device).float()
        missing = original[part].to(drift.device).float().sub(taken)
        with full_float32():
            drift.addmm_(taken.T, missing)


def _chunks(tokens: Tensor, rows: Tensor | None) -> list[slice] | list[Tensor]:
    """The slices of ``tokens``, or the parts of ``rows``, that are multiplied at a time."""
    if rows is not None:
        return list(torch.split(rows, _CHUNK)) if len(rows) else []
    return [slice(i, i + _CHUNK) for i in range(0, tokens.shape[0], _CHUNK)]


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + s·mean(diag G)·I for s = ``damping``, in a copy; ``gram`` itself if s is 0."""
    if damping == 0:
        return gram
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


def row_errors(change: Tensor, gram: Tensor) -> Tensor:
    """δᵀGδ of each row δ of ``change`` ``[out, in]``; float32 ``[out]``."""
    return (change @ gram).mul_(change).sum(-1)


def output_error(change: Tensor, weight: Tensor, gram: Tensor) -> float:
    """‖X(Ŵ−W)ᵀ‖_F / ‖XWᵀ‖_F from the gram: sqrt(tr(ΔGΔᵀ) / tr(WGWᵀ)).

    Args:
        change: Δ = Ŵ−W, ``[out, in]``.
        weight: W, ``[out, in]``.
        gram: ``[in, in]`` float32.

    Returns:
        The relative error (dimensionless): 0 if XΔᵀ is 0, otherwise inf if XWᵀ is 0.
    """
    return relative_error(output_energy(change, gram), output_energy(weight, gram))


def output_energy(matrix: Tensor, gram: Tensor) -> float:
    """‖XMᵀ‖²_F = tr(MGMᵀ) of a matrix ``[out, in]``, also beyond the range of float32."""
    rows = matrix.to(gram.device, torch.float32)
    scaled = within_range(gram)
    product = rows @ scaled
    units = [_power_of_two(float(factor.abs().amax())) for factor in (rows, product)]
    for unit in units:
        product.div_(unit)
    energy = float(product.mul_(rows).sum(dtype=torch.float64).clamp(min=0))
    return energy * units[0] * units[1] * (unit_of(gram) / unit_of(scaled))


def relative_error(error: float, energy: float) -> float:
    """sqrt(error / energy): 0 if the error is 0, otherwise inf if the energy is 0."""
    if error == 0:
        return 0.0
    return math.sqrt(error / energy) if energy > 0 else math.inf
