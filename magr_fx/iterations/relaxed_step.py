"""One step of ADMM without its matrix product: the prox, and the factor of the product."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from magr_fx.iterations.prox import threshold

# Newton passes on devices where a check for convergence would make the host wait. Each prox is
# warm-started with the level of the step before.
FIXED_PASSES = 3

logger = logging.getLogger("magr_fx")


def relaxed_step(
    shifted: Tensor,
    weight: Tensor,
    level: Tensor,
    source: Tensor,
    scratch: Tensor,
    *,
    rho: Tensor,
    alpha: float,
    relaxation: float,
) -> Tensor:
    """Compute everything of a step except its product from v = z + u of the step before.

    With z = clamp(v, -τ, τ), the prox of alpha‖·‖∞ at v in the metric of ``rho``, and
    u = v - z, this writes y = z - u - w into ``source`` and v + relaxation·(w - z) into
    ``shifted``. To complete the step, the caller adds relaxation·(y N) to ``shifted``, where N is
    the splitting's step.

    On CUDA with Triton this is one kernel launch, elsewhere about twenty element-wise kernels.

    Args:
        shifted: v, ``[..., in]``, contiguous; overwritten.
        weight: w, ``[..., in]``, the same dtype.
        level: a guess of τ, ``[..., groups]``.
        source, scratch: ``[..., in]``, overwritten.
        rho: ``[..., groups, group_size]``, broadcasts to the groups of ``shifted``.
        alpha: the penalty weight.
        relaxation: the over-relaxation.

    Returns:
        τ, ``[..., groups]``.
    """
    if shifted.is_cuda and has_triton(shifted.device):
        from magr_fx.iterations.relaxed_step_triton import relaxed_step_fused

        return relaxed_step_fused(
            shifted, weight, level, source, rho=rho, alpha=alpha, relaxation=relaxation
        )
    grouped = shifted.view(*level.shape, -1)
    magnitude = torch.abs(shifted, out=scratch).view_as(grouped)
    level = prox_level(magnitude, alpha, rho=rho, start=level)
    bound = level.unsqueeze(-1)
    clamped = torch.clamp(grouped, -bound, bound, out=scratch.view_as(grouped)).view_as(shifted)
    torch.sub(clamped, shifted, out=source)
    missing = torch.sub(weight, clamped, out=scratch)
    source.sub_(missing)
    shifted.add_(missing, alpha=relaxation)
    return level


def prox_level(magnitude: Tensor, alpha: float, *, rho: Tensor, start: Tensor) -> Tensor:
    """:func:`magr_fx.iterations.prox.threshold`: exact on a CPU, FIXED_PASSES elsewhere."""
    passes = None if magnitude.device.type == "cpu" else FIXED_PASSES
    return threshold(magnitude, alpha, metric=rho, start=start, passes=passes)


def clamp_groups(rows: Tensor, level: Tensor) -> Tensor:
    """Clamp each group of ``[..., in]`` to its ``level``, ``[..., groups]``."""
    bound = level.unsqueeze(-1)
    return rows.view(*level.shape, -1).clamp(-bound, bound).view_as(rows)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this device; logs once if it does not.

    PyTorch's CUDA builds for Linux include Triton, but it also needs a C compiler.
    """
    if importlib.util.find_spec("triton") is None:
        logger.info("without Triton each solver step launches some twenty kernels on %s", device)
        return False
    from magr_fx.iterations.relaxed_step_triton import relaxed_step_fused

    one = torch.ones(1, 1, dtype=torch.float32, device=device)
    try:
        relaxed_step_fused(
            one.clone(), one, one, one.clone(), rho=one.view(1, 1), alpha=0.5, relaxation=1.0
        )
    except Exception as error:  # whatever Triton, the compiler or the driver raises
        logger.warning(
            "Triton does not work on %s (%s: %s): each step of the solver launches some twenty "
            "kernels instead of one; install a C compiler",
            device,
            type(error).__name__,
            error,
        )
        return False
    return True
