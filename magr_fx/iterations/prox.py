"""The prox of ‖·‖∞ and the projection onto the l1 ball, by Newton steps instead of a sort.

Both need one number per row: the level τ at which Σ(|v| - τ)₊ = t. The left side is convex,
piecewise linear and decreasing in τ, so Newton's method started left of the root climbs to it
monotonically and reaches it after finitely many passes. For the projection this is Michelot's
algorithm (J. Optim. Theory Appl. 50, 1986). Unlike the usual sort and cumulative sum it costs two
row reductions a pass, needs no index tensors, and can be warm-started.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.errors import ConfigError


@torch.no_grad()
def prox_linf(x: Tensor, scale: float | Tensor) -> Tensor:
    """The proximal operator of ``scale``·‖·‖∞ over the last dimension.

    argmin over z of ½‖z - x‖² + scale·‖z‖∞, which is clamp(x, -τ, τ) with Σ(|x| - τ)₊ = scale,
    and 0 where ‖x‖₁ ≤ scale.

    Args:
        x: ``[..., n]``, floating. Computed in float64 for float64, in float32 otherwise.
        scale: at least 0, in the units of ``x``: a number, or a tensor that broadcasts to
            ``x.shape[:-1]`` (one value per row). 0 returns ``x``, inf returns zeros.

    Returns:
        A new tensor of the shape, dtype and device of ``x``. Not differentiable.

    Raises:
        ConfigError: ``x`` is not a floating tensor with a non-empty last dimension, or ``scale``
            is negative, NaN or of a shape that does not fit.

    Example:
        >>> prox_linf(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 2.0000, -2.0000,  0.5000])
    """
    values = _checked_rows(x)
    level = threshold(values.abs(), _checked_amount("scale", scale, values)).unsqueeze(-1)
    return values.clamp(-level, level).to(x.dtype)


@torch.no_grad()
def project_l1_ball(x: Tensor, radius: float | Tensor) -> Tensor:
    """The Euclidean projection onto {z : ‖z‖₁ ≤ ``radius``} over the last dimension.

    sign(x)·(|x| - τ)₊ with Σ(|x| - τ)₊ = radius where ‖x‖₁ > radius, otherwise ``x``. By Moreau's
    identity ``prox_linf(x, r) + project_l1_ball(x, r) == x``.

    Args:
        x: ``[..., n]``, floating. Computed in float64 for float64, in float32 otherwise.
        radius: at least 0, in the units of ``x``: a number, or a tensor that broadcasts to
            ``x.shape[:-1]`` (one value per row). 0 returns zeros, inf returns ``x``.

    Returns:
        A new tensor of the shape, dtype and device of ``x``. Not differentiable.

    Raises:
        ConfigError: ``x`` is not a floating tensor with a non-empty last dimension, or ``radius``
            is negative, NaN or of a shape that does not fit.

    Example:
        >>> project_l1_ball(torch.tensor([3.0, -2.0, 0.5]), 2.0)
        tensor([ 1.5000, -0.5000,  0.0000])
    """
    values = _checked_rows(x)
    level = threshold(values.abs(), _checked_amount("radius", radius, values)).unsqueeze(-1)
    # Soft thresholding. Inside the ball the level is 0, so the row does not change.
    return (values - values.clamp(-level, level)).to(x.dtype)


def threshold(
    magnitude: Tensor,
    scale: float | Tensor,
    *,
    metric: Tensor | None = None,
    start: Tensor | None = None,
    passes: int | None = None,
) -> Tensor:
    """The level τ ≥ 0 with Σ(magnitude - τ)₊ = scale for each row, 0 where Σ magnitude ≤ scale.

    With a diagonal metric p the sums are Σp(magnitude - τ)₊ and Σp·magnitude. clamp(v, -τ, τ) is
    then the minimiser of ½Σp(z - v)² + scale·‖z‖∞, the prox in that metric.

    Args:
        magnitude: ``[..., n]``, not negative.
        scale: not negative, broadcasts to ``magnitude.shape[:-1]``; not checked here.
        metric: p, positive, broadcasts to ``magnitude``; None is all ones.
        start: a guess of τ, ``magnitude.shape[:-1]``; None starts at max - scale.
        passes: None iterates until no row's active set changes, and waits for the device in every
            pass. A number takes exactly that many passes without waiting; the level is then at
            or below the exact one.

    Returns:
        τ, ``magnitude.shape[:-1]``.
    """
    top = magnitude.amax(-1)
    # No root lies below this level, at which the largest entry alone makes the sum `scale`.
    # Without the clamp an infinite scale would start at -inf.
    floor = (top - (scale if metric is None else scale / metric.amin(-1))).clamp_(min=0)
    # Above the largest entry the active set is empty, so that Newton would have no slope.
    level = floor if start is None else torch.minimum(start, top)
    active: Tensor | None = None
    # From the second pass on the active set can only shrink, so n + 1 passes suffice.
    for _ in range(magnitude.shape[-1] + 1 if passes is None else passes):
        excess = torch.sub(magnitude, level.unsqueeze(-1)).clamp_(min=0)
        if metric is not None:
            excess.mul_(metric)
        total = excess.sum(-1)
        # The sum of the signs is the size of the active set: exact up to 2^24 columns in float32,
        # and faster on a CPU than reducing a boolean mask. An empty set (a zero row) divides by 1.
        count = excess.sign_()
        if metric is None:
            count = count.sum(-1).clamp_(min=1)
        else:
            count = count.mul_(metric).sum(-1)
            # Not 1: a step from the largest entry could then end right of the root for good.
            count = torch.where(count > 0, count, metric.amin(-1))
        # Not torch.equal: a NaN row would then never end the loop.
        if passes is None and active is not None and not bool(((count - active).abs() > 0).any()):
            break
        active = count
        # τ + (f(τ) - t)/count, not (Σ|v| - t)/count: this corrects the previous level, so that
        # the rounding error is relative to t and not to Σ|v|. By convexity the new level is left
        # of the root from either side; the maximum makes the climb monotone in floating point.
        level = torch.maximum(level + (total - scale) / count, floor)
        floor = level
    return level


def _checked_rows(x: Tensor) -> Tensor:
    """``x``, checked, in the dtype of the computation."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"x must be a floating tensor, got {kind}; convert it, e.g. x.float()")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ConfigError(
            f"x must have a non-empty last dimension, got shape {list(x.shape)}; "
            "pass rows of at least one value"
        )
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _checked_amount(name: str, amount: float | Tensor, values: Tensor) -> Tensor:
    """``scale`` or ``radius`` as a tensor that broadcasts to the rows of ``values``."""
    try:
        result = torch.as_tensor(amount, dtype=values.dtype, device=values.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be a number or a tensor, got {amount!r}") from error
    rows = values.shape[:-1]
    try:
        spread = result.expand(rows)
    except RuntimeError as error:
        raise ConfigError(
            f"{name} of shape {list(result.shape)} must broadcast to the rows of x, "
            f"{list(rows)}; pass a number or one value per row"
        ) from error
    if not bool((result >= 0).all()):  # also False for NaN
        raise ConfigError(f"{name} must be at least 0 and not NaN; check how it was computed")
    return spread
