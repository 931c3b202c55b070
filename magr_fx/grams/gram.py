"""The gram G = XᵀX of a site's calibration inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from magr_fx.machine.matmul_precision import full_float32
from magr_fx.machine.memory import is_out_of_memory

# Up to this size every eigenvalue is computed, which is exact and takes a few steps' time; beyond
# it the largest one is iterated for and bounded.
EXACT_UP_TO = 1024
# How far the result may lie below λmax, relatively, for it to be accepted.
SLACK = 1e-3
_ITERATIONS = 40
# From here on, up or down, the products of a gram and two weights may leave float32.
_FAR = 2.0**40


@torch.no_grad()
def largest_eigenvalue(gram: Tensor) -> Tensor:
    """λmax of each symmetric positive semidefinite gram: ``[..., in, in]`` to ``[...]``.

    Small grams are diagonalised. For large ones LOBPCG gives an estimate λ ≤ λmax, and a Cholesky
    factorisation of (1 + 10⁻³)λI - G, which exists only if λmax is at most that, proves that it
    is not too low; where it is, the gram is diagonalised after all. The step 1/λ of projected
    gradient descent, which must stay below 2/λmax, is thus at most 1.001/λmax. A gram of zeros
    has λmax = 0, and rounding never makes the result negative. Float64 stays float64, everything
    else is computed in float32. The same gram gives the same bits, and one that is a power of two
    times as large that times them.

    Raises:
        LinAlgError: the eigenvalues of a gram do not converge, in float64 neither.

    Example:
        >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 4.0])))
        tensor(4.)
    """
    gram = gram if gram.dtype == torch.float64 else gram.to(torch.float32)
    if gram.dim() > 2:
        flat = [largest_eigenvalue(one) for one in gram.flatten(0, -3)]
        return torch.stack(flat).view(gram.shape[:-2])
    unit = unit_of(gram)
    scaled = gram / unit  # iterations have limits of their own for what is small
    found = _bounded_estimate(scaled) if len(gram) > EXACT_UP_TO else None
    if found is None:
        try:
            found = torch.linalg.eigvalsh(scaled)[-1]  # ascending
        except LinAlgError:
            found = torch.linalg.eigvalsh(scaled.to(torch.float64))[-1].to(gram.dtype)
    return (found * unit).clamp(min=0)


def unit_of(gram: Tensor) -> float:
    """The power of two below the largest diagonal entry; 1 where that is 0 or not finite."""
    return _power_of_two(float(gram.diagonal().amax()))


def _power_of_two(value: float) -> float:
    return 2.0 ** (math.frexp(value)[1] - 1) if 0 < value < math.inf else 1.0


def within_range(gram: Tensor) -> Tensor:
    """The gram, ``[in, in]``, divided by a power of two where its products could leave float32.

    What is chosen with it is the same, since all it decides is relative.
    """
    unit = unit_of(gram)
    return gram if 1 / _FAR < unit < _FAR else gram / unit


def _bounded_estimate(gram: Tensor) -> Tensor | None:
    """λ with λ ≤ λmax ≤ (1 + SLACK)λ, both but for rounding; None if that cannot be shown."""
    if not bool(gram.diagonal().amax() > 0):
        return None
    # A generator of its own, and on the CPU: the same start on every device and in every run.
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), 1, generator=draw, dtype=torch.float32, device="cpu")
    start = gram @ start.to(gram)  # a first power step: most of the way where one input dominates
    try:
        with full_float32():
            values, _ = torch.lobpcg(gram, X=start, niter=_ITERATIONS, largest=True)
    except (RuntimeError, ArithmeticError) as error:  # it divides by the norms of what it found
        if is_out_of_memory(error):
            raise
        return None
    estimate: Tensor = values[0]
    shifted = -gram
    shifted.diagonal().add_((1 + SLACK) * estimate)
    _, info = torch.linalg.cholesky_ex(shifted)
    return estimate if int(info) == 0 else None


# Rows that are converted to float32 at a time: bounds the copy, and is long enough for the product.
_CHUNK = 8192
# Grams of at least this many inputs are summed in so many block rows: 5/8 of the operations, and
# 0.7 to 0.75 of the time on a CPU. More of them are hardly faster.
SPLIT_FROM, _PARTS = 256, 4


@torch.no_grad()
def add_to_gram(gram: Tensor, tokens: Tensor, rows: Tensor | None = None) -> None:
    """Add XᵀX to ``gram`` in place, in float32 whatever the activation's dtype.

    On CUDA float16 and bfloat16 are multiplied as they are, which tensor cores do: a product of two
    of them is exact in float32, in which the sums are taken.

    Args:
        gram: ``[in, in]`` float32.
        tokens: X, ``[tokens, in]``, any floating dtype, any device.
        rows: ``[rows]`` int64, the indices of the rows that belong to it; only those are read and
            multiplied. None takes all.
    """
    for part in _chunks(tokens, rows):
        taken = tokens[part].to(gram.device)
        with full_float32():
            _add_square(gram, taken if _multiplies_into_float32(taken) else taken.float())


def _add_square(gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX, block row by block row from the diagonal on: what lies below is its mirror image."""
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
    """Whether torch multiplies such numbers as they are and sums them up in float32."""
    return rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)


@torch.no_grad()
def add_to_drift(
    drift: Tensor, tokens: Tensor, original: Tensor, rows: Tensor | None = None
) -> None:
    """Add X̂ᵀ(X - X̂) to ``drift`` in place: how the inputs X̂ of a quantized model miss X.

    Args:
        drift: ``[in, in]`` float32.
        tokens: X̂, ``[tokens, in]``, any floating dtype, any device.
        original: X, the same tokens in the original model.
        rows: as for :func:`add_to_gram`.
    """
    for part in _chunks(tokens, rows):
        taken = tokens[part].to(drift.device).float()
        missing = original[part].to(drift.device).float().sub(taken)
        with full_float32():
            drift.addmm_(taken.T, missing)


def _chunks(tokens: Tensor, rows: Tensor | None) -> list[slice] | list[Tensor]:
    """Of ``tokens``, or of those in ``rows``, what is multiplied at a time."""
    if rows is not None:
        return list(torch.split(rows, _CHUNK)) if len(rows) else []
    return [slice(i, i + _CHUNK) for i in range(0, tokens.shape[0], _CHUNK)]


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + s·mean(diag G)·I for s = ``damping``; ``gram`` itself where s is 0."""
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
        The relative error (dimensionless): 0 where XΔᵀ is 0, else inf where XWᵀ is 0.
    """
    return relative_error(output_energy(change, gram), output_energy(weight, gram))


def output_energy(matrix: Tensor, gram: Tensor) -> float:
    """‖XMᵀ‖²_F = tr(MGMᵀ) of a matrix ``[out, in]``, also where float32 would not hold it."""
    rows = matrix.to(gram.device, torch.float32)
    scaled = within_range(gram)
    product = rows @ scaled
    units = [_power_of_two(float(factor.abs().amax())) for factor in (rows, product)]
    for unit in units:
        product.div_(unit)
    energy = float(product.mul_(rows).sum(dtype=torch.float64).clamp(min=0))
    return energy * units[0] * units[1] * (unit_of(gram) / unit_of(scaled))


def relative_error(error: float, energy: float) -> float:
    """sqrt(error / energy): 0 where the error is, else inf where the energy is 0."""
    if error == 0:
        return 0.0
    return math.sqrt(error / energy) if energy > 0 else math.inf
