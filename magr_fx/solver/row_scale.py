"""How large the rows of a weight are: what makes one penalty mean the same for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_scale(weight: Tensor, units: Sequence[int] | None = None) -> Tensor:
    """The root mean square of each row, ``[..., out, in]`` to ``[..., out]`` float32.

    ½δᵀGδ scales with the square of a weight, alpha·λmax·‖ŵ‖∞ with the weight. With the penalty
    alpha·λmax·r·‖ŵ‖∞, r being this, c·w has the solution c·ŵ; for a power of two c it has the same
    bits. A row of zeros has the scale 1: any penalty leaves it as it is.

    Args:
        weight: any floating dtype.
        units: numbers of rows that share one scale, such as those of whole tensors; None is one
            for each row.

    Example:
        >>> row_scale(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        tensor([3.5355, 1.0000])
    """
    if units is not None:
        parts = torch.split(weight, list(units))
        return torch.cat([row_scale(part.reshape(1, -1)).expand(len(part)) for part in parts])
    rows = weight.to(torch.float32)
    # By the largest magnitude first: squares of small numbers would vanish.
    largest = rows.abs().amax(-1)
    largest = torch.where(largest > 0, largest, 1)
    scale = largest * (rows / largest.unsqueeze(-1)).square().mean(-1).sqrt()
    return torch.where(scale > 0, scale, 1)
