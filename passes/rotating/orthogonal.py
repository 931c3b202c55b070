"""Orthogonal matrices to rotate by."""

from __future__ import annotations

import torch
from torch import Tensor


def random_orthogonal(size: int, generator: torch.Generator, *, keeps_mean: bool = False) -> Tensor:
    """A random orthogonal matrix ``[size, size]``, float64, uniform over all of them (Haar).

    It is Q of the QR decomposition of a Gaussian matrix, with the signs that make R's diagonal
    positive (Mezzadri, Notices of the AMS 54, 2007).

    Args:
        size: at least 1; with ``keeps_mean`` at least 2.
        generator: of the device "cpu".
        keeps_mean: leave the vector of ones as it is: Q·1 = 1. A rotated vector then has the mean
            of the original, which LayerNorm subtracts.
    """
    if not keeps_mean:
        gaussian = torch.randn(size, size, dtype=torch.float64, device="cpu", generator=generator)
        q, r = torch.linalg.qr(gaussian)
        signed: Tensor = q * r.diagonal().sign()
        return signed
    ones = torch.ones(size, 1, dtype=torch.float64, device="cpu")
    others = torch.eye(size, size - 1, dtype=torch.float64, device="cpu")
    basis, _ = torch.linalg.qr(torch.cat([ones, others], 1))  # its first column is parallel to 1
    rest = basis[:, 1:]
    inner = random_orthogonal(size - 1, generator)
    rotated: Tensor = ones @ ones.T / size + rest @ inner @ rest.T
    return rotated
