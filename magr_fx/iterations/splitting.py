"""The ρ of each input in ADMM, and the matrix of ADMM's linear step, from one gram."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.iterations.certificate import Problem

# The energy of an input is G_jj/λmax. Smaller energies than this share of the typical energy are
# raised to it.
LEAST_ENERGY = 1e-6
# The typical energy is the median, but at least this. A few massive activations can make λmax, and
# with it the penalty, so large that the median says nothing about the problem.
LEAST_TYPICAL = 1e-4
# If the factorisation fails, ρ is raised by the factor RAISE, but not where it is above ROUNDING
# already: float32 sums round zero eigenvalues to below zero by less than this share of λmax.
RAISE = 10.0
ROUNDING = 1e-4


class Splitting(NamedTuple):
    """ρ and (G/λmax + diag ρ)⁻¹ of ADMM. In a batch of problems all have a dimension in front."""

    strength: Tensor  # [...]: κ, the common factor of ρ: ρ = κ · unit_rho
    rho: Tensor  # [..., in]: ρ, one for each input, in units where λmax(G) = 1
    step: Tensor  # [..., in, in]: diag(ρ) (G/λmax + diag ρ)⁻¹, to multiply rows with


def unit_rho(problem: Problem) -> Tensor:
    """ρ of each input j up to a common factor: sqrt(g_j · typical g), ``[..., in]``.

    Here g = diag(G)/λmax, and the typical g is the median. Along an eigenvector of G, ADMM's x-step
    converges at once if the eigenvalue is far above ρ, and hardly moves if it is far below. The
    prox step is faster with a larger ρ. One ρ for all inputs is therefore wrong if their
    energies g_j differ by orders of magnitude, as those of activations do. The optimal ρ for
    curvatures between m and L is sqrt(m·L) (Ghadimi et al., IEEE Trans. Automat. Contr. 60,
    2015). This takes the geometric mean of the input's own curvature and the typical one.
    Residual balancing finds the common factor.
    """
    energy = problem.gram.diagonal(dim1=-2, dim2=-1) / problem.peak.unsqueeze(-1)
    alive = torch.where(energy > 0, energy, torch.nan)
    # Not nanmedian, which is not deterministic on CUDA. NaN if all energies are 0.
    typical = alive.nanquantile(0.5, -1, keepdim=True, interpolation="lower")
    typical = typical.nan_to_num_(0).clamp_(min=LEAST_TYPICAL)
    # The product of the roots, because the root of the product may underflow.
    return torch.maximum(energy, LEAST_ENERGY * typical).sqrt_().mul_(typical.sqrt())


def split(problem: Problem, unit: Tensor, strength: Tensor) -> Splitting:
    """Factorise G/λmax + diag ρ for ρ = strength·unit.

    Needs three matrices of the gram's size besides it, and returns one of them.

    Args:
        problem: its gram and λmax are used.
        unit: from :func:`unit_rho`, ``[..., in]``.
        strength: κ, ``[...]``, positive; raised if the factorisation fails.

    Raises:
        CalibrationError: the gram has negative eigenvalues that rounding cannot explain.
    """
    while True:
        rho = unit * strength.unsqueeze(-1)
        root = rho.sqrt()
        # Factorise diag(ρ)^-½ (G/λmax) diag(ρ)^-½ + I: it is symmetric, has no eigenvalue below 1,
        # and its entries are of similar size, on which the accuracy of a Cholesky factor depends.
        scaled = problem.gram / problem.peak[..., None, None]
        scaled.div_(root.unsqueeze(-1)).div_(root.unsqueeze(-2))
        scaled.diagonal(dim1=-2, dim2=-1).add_(1)
        factor, info = torch.linalg.cholesky_ex(scaled)
        if not bool(info.any()):
            del scaled
            step = torch.cholesky_inverse(factor)
            step.mul_(root.unsqueeze(-1)).div_(root.unsqueeze(-2))
            return Splitting(strength, rho, step)
        del scaled, factor
        failed = info > 0  # zero eigenvalues of a rank-deficient gram were rounded to below -ρ
        beyond = ~((rho.amin(-1) > 0) & (rho.amin(-1) <= ROUNDING))
        if bool((failed & beyond).any()):
            raise CalibrationError(
                "gram is not positive semidefinite, by more than rounding can explain; "
                "pass XᵀX, summed in float32 or wider"
            )
        strength = torch.where(failed, RAISE * strength, strength)
