"""The gram G = XᵀX of a site's calibration inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def largest_eigenvalue(gram: Tensor) -> Tensor:
    """λmax of a symmetric positive semidefinite gram ``[in, in]``, as a 0-dim float32 tensor.

    Only the lower triangle is read. A gram of zeros has λmax = 0; rounding never makes the
    result negative.

    Example:
        >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 4.0])))
        tensor(4.)
    """
    # An exact eigensolver, although power iteration would be cheaper: 1/λmax is the step of the
    # iteration, and power iteration only ever gives a lower bound of λmax, hence too long a step.
    # It is also slowest where the leading eigenvalues lie close together, and nothing in it says
    # how far off it still is.
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram.to(torch.float32))  # ascending
    return eigenvalues[-1].clamp(min=0)


# Rows that are converted to float32 at a time: bounds the copy, and is long enough for the product.
_CHUNK = 8192


@torch.no_grad()
def add_to_gram(gram: Tensor, tokens: Tensor, keep: Tensor | None = None) -> None:
    """Add XᵀX to ``gram`` in place, in float32 whatever the activation's dtype.

    Args:
        gram: ``[in, in]`` float32.
        tokens: X, ``[tokens, in]``, any floating dtype, any device.
        keep: ``[tokens]`` bool; False leaves a row out, whatever it holds (NaN included).
    """
    for start in range(0, tokens.shape[0], _CHUNK):
        rows = tokens[start : start + _CHUNK].to(gram.device, torch.float32)
        if keep is not None:
            kept = keep[start : start + _CHUNK].to(gram.device)
            # A select, not a product: 0 · NaN is NaN. And no boolean index: its size is a sync.
            rows = torch.where(kept[:, None], rows, 0)
        gram.addmm_(rows.T, rows)


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + s·mean(diag G)·I for s = ``damping``; ``gram`` itself where s is 0."""
    if damping == 0:
        return gram
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


def output_error(change: Tensor, weight: Tensor, gram: Tensor) -> float:
    """‖X(Ŵ−W)ᵀ‖_F / ‖XWᵀ‖_F from the gram: sqrt(tr(ΔGΔᵀ) / tr(WGWᵀ)).

    Args:
        change: Δ = Ŵ−W, ``[out, in]``.
        weight: W, ``[out, in]``.
        gram: ``[in, in]`` float32.

    Returns:
        The relative error (dimensionless): 0 where XΔᵀ is 0, else inf where XWᵀ is 0.
    """

    def energy(matrix: Tensor) -> float:
        rows = matrix.to(gram.device, torch.float32)
        return float((rows @ gram).mul_(rows).sum(dtype=torch.float64).clamp(min=0))

    above, below = energy(change), energy(weight)
    if above == 0:
        return 0.0
    return (above / below) ** 0.5 if below > 0 else math.inf
