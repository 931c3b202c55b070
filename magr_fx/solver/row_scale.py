"""The scale of a weight's rows, relative to which one penalty weight fits all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_scale(weight: Tensor, units: Sequence[int] | None = None) -> Tensor:
    """The root mean square of each row, ``[..., out, in]`` to ``[..., out]`` float32.

    ½δᵀGδ scales with the square of a weight, but alpha·λmax·‖ŵ‖∞ with the weight itself. With the
    penalty alpha·λmax·r·‖ŵ‖∞, where r is this root mean square, c·w has the solution c·ŵ; if c is a
    power of two, bit for bit. A row of zeros has the scale 1, since no penalty changes it.

    Args:
        weight: ``[..., out, in]``, any floating dtype; ``[out, in]`` with ``units``.
        units: the numbers of consecutive rows that share one scale, such as those of whole tensors;
            None gives each row its own.

    Example:
        >>> row_scale(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        tensor([3.5355, 1.0000])
    """
    if units is not None:
        parts = torch.split(weight, list(units))
        return torch.cat([row_scale(part.reshape(1, -1)).expand(len(part)) for part in parts])
    rows = weight.to(torch.float32)
    # Divided by the largest magnitude first, because squares of small numbers would underflow.
    largest = rows.abs().amax(-1)
    largest = torch.where(largest > 0, largest, 1)
    scale = largest * (rows / largest.unsqueeze(-1)).square().mean(-1).sqrt()
    return torch.where(scale > 0, scale, 1)
