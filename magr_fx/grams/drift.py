"""Changing a weight so that it compensates the error of the quantized layers before it."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.grams.gram import unit_of, within_range
from magr_fx.machine.matmul_precision import full_float32

# The share of the gram's mean diagonal that keeps the weight in directions that the inputs hardly
# reach. It is smaller than the search's damping, which would leave the error in all directions with
# small eigenvalues uncompensated (benchmarks/README.md). If the gram is too singular, the share is
# raised by the factor RAISE, to at least LEAST.
DAMPING, LEAST, RAISE = 0.05, 1e-6, 10.0


@full_float32()
def compensate_input_error(
    weight: Tensor, gram: Tensor, drift: Tensor, *, damping: float = DAMPING
) -> Tensor:
    """The weight that nearly gives the original outputs on the quantized model's inputs.

    With the inputs X in the original model and X̂ in the quantized one, this is the minimiser over
    A of ‖X̂Aᵀ - XWᵀ‖² + s‖A - W‖², which is A = W + W·Dᵀ(G + s·I)⁻¹ with D = X̂ᵀ(X - X̂),
    G = X̂ᵀX̂ and s = damping·mean(diag G). For any Ŵ, ‖X̂Ŵᵀ - XWᵀ‖² + s‖Ŵ - W‖² equals
    tr((Ŵ - A)(G + s·I)(Ŵ - A)ᵀ) plus a constant. All later steps can therefore use A in place of
    W in the output error.

    Args:
        weight: W, ``[out, in]``, any floating dtype.
        gram: G, ``[in, in]`` float32, positive semidefinite.
        drift: D, ``[in, in]`` float32.
        damping: the smallest share of mean(diag G) that is added to the diagonal.

    Returns:
        A, ``[out, in]`` float32; W itself if D or G is zero, or if no damping makes G invertible.
    """
    weight = weight.to(torch.float32)
    unit = unit_of(within_range(gram)) / unit_of(gram)  # 1, or brings it into float32's range
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
    return weight  # the numbers are too small for float32
