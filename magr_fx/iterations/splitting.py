"""What ADMM fixes per gram: the price of each input, and the matrix of its linear step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.iterations.certificate import Problem

# Inputs with less energy than this part of the typical are priced as if they had that much.
LEAST_ENERGY = 1e-6
# The typical energy is the median, but no less than this part of λmax: where a few massive
# activations own λmax, of which alpha is a share, the median says nothing about the problem.
LEAST_TYPICAL = 1e-4
# Where the factorisation fails, ρ is raised by this factor, but not beyond this size: a float32 sum
# rounds zero eigenvalues to below zero by less than this part of λmax.
RAISE = 10.0
ROUNDING = 1e-4


class Splitting(NamedTuple):
    """ρ and (G/λmax + diag ρ)⁻¹ of ADMM. A batch of problems has a dimension in front."""

    strength: Tensor  # [...]: kappa, the factor of the unit prices
    prices: Tensor  # [..., in]: ρ, one for each input, in units where λmax(G) = 1
    step: Tensor  # [..., in, in]: diag(ρ) (G/λmax + diag ρ)⁻¹, to multiply rows with


def unit_prices(problem: Problem) -> Tensor:
    """sqrt(g_j · typical g) for each input j, where g = diag(G)/λmax; ``[..., in]``.

    ADMM's x-step moves along an eigenvector of G in one step where its eigenvalue is above ρ,
    and hardly where it is below; its prox step is the faster the larger ρ is. One ρ for all
    inputs is therefore wrong wherever their energies g_j lie orders of magnitude apart, as
    activations' do. The optimal step of ADMM for curvatures between m and L is sqrt(m·L)
    (Ghadimi et al., IEEE Trans. Automat. Contr. 60, 2015): here a geometric mean of the input's
    own curvature and the typical one. The overall factor is left to residual balancing.
    """
    energy = problem.gram.diagonal(dim1=-2, dim2=-1) / problem.peak.unsqueeze(-1)
    alive = torch.where(energy > 0, energy, torch.nan)
    # Not nanmedian, which is not deterministic on CUDA. NaN where no input is alive.
    typical = alive.nanquantile(0.5, -1, keepdim=True, interpolation="lower")
    typical = typical.nan_to_num_(0).clamp_(min=LEAST_TYPICAL)
    # The product of the roots, not the root of the product, which may underflow.
    return torch.maximum(energy, LEAST_ENERGY * typical).sqrt_().mul_(typical.sqrt())


def split(problem: Problem, unit: Tensor, strength: Tensor) -> Splitting:
    """Factorise G/λmax + diag ρ for ρ = strength·unit.

    Holds three matrices of the gram's size beside it while it works, and keeps one.

    Args:
        problem: the gram.
        unit: :func:`unit_prices`.
        strength: kappa, ``[...]``: positive.

    Raises:
        CalibrationError: the gram is not positive semidefinite, by far more than rounding.
    """
    while True:
        prices = unit * strength.unsqueeze(-1)
        root = prices.sqrt()
        # Scaled to diag(ρ)^-½ (G/λmax) diag(ρ)^-½ + I: symmetric, no eigenvalue below 1, and its
        # entries of similar size, which is what the accuracy of a Cholesky factor depends on.
        scaled = problem.gram / problem.peak[..., None, None]
        scaled.div_(root.unsqueeze(-1)).div_(root.unsqueeze(-2))
        scaled.diagonal(dim1=-2, dim2=-1).add_(1)
        factor, info = torch.linalg.cholesky_ex(scaled)
        if not bool(info.any()):
            del scaled
            step = torch.cholesky_inverse(factor)
            step.mul_(root.unsqueeze(-1)).div_(root.unsqueeze(-2))
            return Splitting(strength, prices, step)
        del scaled, factor
        failed = info > 0  # zero eigenvalues of a rank-deficient gram were rounded to below -ρ
        beyond = ~((prices.amin(-1) > 0) & (prices.amin(-1) <= ROUNDING))
        if bool((failed & beyond).any()):
            raise CalibrationError(
                "gram is not positive semidefinite, by more than rounding can explain; "
                "pass XᵀX, summed in float32 or wider"
            )
        strength = torch.where(failed, RAISE * strength, strength)
