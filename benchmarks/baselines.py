"""Other solvers of the same problem: the published iteration as published, and brevitas's."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

STEPS = 200
INSTALL_BREVITAS = "pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd"


def published(weight: Tensor, inputs: Tensor, alpha: float) -> Tensor:
    """MagR as its authors' code does it, written from the paper and that code's description.

    A singular value decomposition of the inputs gives the step, and 200 steps follow, each with a
    product with XᵀX and a projection onto the l1 ball by sorting. Whole rows.

    Args:
        weight: ``[out, in]``.
        inputs: X, ``[tokens, in]``.
        alpha: relative to λmax(XᵀX).
    """
    _, singular, right = torch.linalg.svd(inputs, full_matrices=False)
    scaled = (right.T * (singular / singular[0]).square()) @ right
    current = weight.clone()
    counts = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    for _ in range(STEPS):
        forward = current - (current - weight) @ scaled
        magnitude = forward.abs()
        falling = magnitude.sort(dim=1, descending=True).values
        sums = falling.cumsum(1) - alpha
        support = (falling * counts > sums).sum(1, keepdim=True)
        level = (sums.gather(1, support - 1) / support).clamp(min=0)
        inside = magnitude.sum(1, keepdim=True) <= alpha
        projection = forward.sign() * (magnitude - level).clamp(min=0)
        current = forward - torch.where(inside, forward, projection)
    return current


def brevitas(weight: Tensor, gram: Tensor, alpha: float) -> Tensor:
    """MagR of brevitas 0.13.4 with 200 steps, its penalty converted to a share of λmax."""
    try:
        from brevitas.graph.magr import MagR
    except ImportError:
        sys.exit(f"the benchmark compares with brevitas: run `{INSTALL_BREVITAS}`")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight.data.copy_(weight)
    # Its prox has the scale alpha·λ/‖G‖₁, λ being its power iteration's estimate of λmax.
    share = alpha * float(torch.linalg.norm(gram, ord=1) / torch.linalg.matrix_norm(gram, 2))
    update = MagR(layer, "layer", 1, create_weight_orig=False, alpha=share)
    update.H = gram.unsqueeze(0).clone()
    update.single_layer_update()
    return layer.weight.data
