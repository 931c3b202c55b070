"""What a quantized model's earlier layers lose, a later layer's weight can make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.matmul_precision import full_float32


@full_float32()
def made_up_for(weight: Tensor, gram: Tensor, drift: Tensor) -> Tensor:
    """The weight that on the quantized model's inputs gives the original outputs, nearly.

    Where X are the inputs in the original model and X̂ those in the quantized one, the minimiser
    over A of ‖X̂Aᵀ - XWᵀ‖² + s‖A - W‖², which is A = W + W·DᵀG⁻¹ with D = X̂ᵀ(X - X̂) and
    G = X̂ᵀX̂ + s·I. For any Ŵ then ‖X̂Ŵᵀ - XWᵀ‖² + s‖Ŵ - W‖² is tr((Ŵ - A)G(Ŵ - A)ᵀ) and a
    constant, so everything that works with the output error does so with A in the place of W.

    Args:
        weight: W, ``[out, in]``, any floating dtype.
        gram: G, ``[in, in]`` float32, positive definite.
        drift: D, ``[in, in]`` float32.

    Returns:
        A, ``[out, in]`` float32.

    Raises:
        CalibrationError: G is not positive definite.
    """
    weight = weight.to(torch.float32)
    lower, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        raise CalibrationError(
            "the gram is singular, so what the earlier layers lost cannot be made up for: raise "
            "damping above 0, or calibrate with propagate=False"
        )
    return weight + torch.cholesky_solve(drift @ weight.T, lower).T
