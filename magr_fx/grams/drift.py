"""What a quantized model's earlier layers lose, a later layer's weight can make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.grams.gram import unit_of, within_range
from magr_fx.machine.matmul_precision import full_float32

# The share of the gram's mean diagonal that holds the weight where the inputs hardly reach: less
# than the search's own damping, or what was lost in all the small directions stays lost
# (benchmarks/README.md). Where the gram is too singular for it, more: at least LEAST, by a factor.
DAMPING, LEAST, RAISE = 0.05, 1e-6, 10.0


@full_float32()
def compensate_input_error(
    weight: Tensor, gram: Tensor, drift: Tensor, *, damping: float = DAMPING
) -> Tensor:
    """The weight that on the quantized model's inputs gives the original outputs, nearly.

    Where X are the inputs in the original model and X̂ those in the quantized one, the minimiser
    over A of ‖X̂Aᵀ - XWᵀ‖² + s‖A - W‖², which is A = W + W·Dᵀ(G + s·I)⁻¹ with D = X̂ᵀ(X - X̂),
    G = X̂ᵀX̂ and s = damping·mean(diag G). For any Ŵ then ‖X̂Ŵᵀ - XWᵀ‖² + s‖Ŵ - W‖² is
    tr((Ŵ - A)(G + s·I)(Ŵ - A)ᵀ) and a constant, so everything that works with the output error
    does so with A in the place of W.

    Args:
        weight: W, ``[out, in]``, any floating dtype.
        gram: G, ``[in, in]`` float32, positive semidefinite.
        drift: D, ``[in, in]`` float32.
        damping: the least share of mean(diag G) that is added.

    Returns:
        A, ``[out, in]`` float32; W itself where nothing was lost, or nothing reaches the weight.
    """
    weight = weight.to(torch.float32)
    unit = unit_of(within_range(gram)) / unit_of(gram)  # 1, or what brings it into float32's range
    if unit != 1:
        gram, drift = gram * unit, drift * unit
    mean = gram.diagonal().mean()
    if not bool(drift.any() & (mean > 0)):
        return weight
    lost = drift @ weight.T
    most = max(1.0, damping)
    while damping <= most:
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            found = weight + torch.cholesky_solve(lost, lower).T
            if bool(found.isfinite().all()):
                return found
        damping = max(LEAST, RAISE * damping)
    return weight  # numbers too small for float32
