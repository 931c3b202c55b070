"""One step of ADMM apart from its matrix product: the prox, and what the product is taken of."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from magr_fx.iterations.prox import threshold

# Newton passes where a host check would stall the device's queue. Warm-started by the step before.
FIXED_PASSES = 3

logger = logging.getLogger("magr_fx")


def relaxed_step(
    shifted: Tensor,
    weight: Tensor,
    level: Tensor,
    source: Tensor,
    scratch: Tensor,
    *,
    prices: Tensor,
    alpha: float,
    relaxation: float,
) -> Tensor:
    """From v = z + u of the step before to everything of the next step but its product.

    With z = clamp(v, -τ, τ), the prox of alpha‖·‖∞ at v in the metric of ``prices``, and
    u = v - z, writes y = z - u - w into ``source`` and v + relaxation·(w - z) into ``shifted``.
    What is left of the step is ``shifted += relaxation·(y N)``, N being the splitting's step.

    On CUDA with Triton this is one kernel launch; elsewhere about twenty element-wise ones.

    Args:
        shifted: v, ``[..., in]``, contiguous; overwritten.
        weight: w, ``[..., in]``, the same dtype.
        level: a guess of τ, ``[..., groups]``.
        source, scratch: ``[..., in]``, overwritten.
        prices: ``[..., groups, group_size]``, broadcasts to the groups of ``shifted``.
        alpha: the penalty.
        relaxation: the over-relaxation.

    Returns:
        τ, ``[..., groups]``.
    """
    if shifted.is_cuda and has_triton(shifted.device):
        from magr_fx.iterations.relaxed_step_triton import relaxed_step_fused

        return relaxed_step_fused(
            shifted, weight, level, source, prices=prices, alpha=alpha, relaxation=relaxation
        )
    grouped = shifted.view(*level.shape, -1)
    magnitude = torch.abs(shifted, out=scratch).view_as(grouped)
    level = prox_level(magnitude, alpha, prices=prices, start=level)
    bound = level.unsqueeze(-1)
    clamped = torch.clamp(grouped, -bound, bound, out=scratch.view_as(grouped)).view_as(shifted)
    torch.sub(clamped, shifted, out=source)
    missing = torch.sub(weight, clamped, out=scratch)
    source.sub_(missing)
    shifted.add_(missing, alpha=relaxation)
    return level


def prox_level(magnitude: Tensor, alpha: float, *, prices: Tensor, start: Tensor) -> Tensor:
    """:func:`magr_fx.iterations.prox.threshold`, to the end where asking costs nothing."""
    passes = None if magnitude.device.type == "cpu" else FIXED_PASSES
    return threshold(magnitude, alpha, prices=prices, start=start, passes=passes)


def clamp_groups(rows: Tensor, level: Tensor) -> Tensor:
    """Clamp each group of ``[..., in]`` to its ``level``, ``[..., groups]``."""
    bound = level.unsqueeze(-1)
    return rows.view(*level.shape, -1).clamp(-bound, bound).view_as(rows)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this device; says so once if it does not.

    PyTorch's CUDA builds for Linux bring it, but it also needs a C compiler.
    """
    if importlib.util.find_spec("triton") is None:
        logger.info("without Triton each step of the solver is some twenty kernels on %s", device)
        return False
    from magr_fx.iterations.relaxed_step_triton import relaxed_step_fused

    one = torch.ones(1, 1, dtype=torch.float32, device=device)
    try:
        relaxed_step_fused(
            one.clone(), one, one, one.clone(), prices=one.view(1, 1), alpha=0.5, relaxation=1.0
        )
    except Exception as error:  # whatever Triton, the compiler or the driver raises
        logger.warning(
            "Triton does not work on %s (%s: %s): each step of the solver is some twenty kernels "
            "instead of one; install a C compiler",
            device,
            type(error).__name__,
            error,
        )
        return False
    return True
