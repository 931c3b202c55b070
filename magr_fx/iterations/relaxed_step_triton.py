"""The relaxed step as one Triton kernel, with one program for each group of each row."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries that a program holds at a time. A longer group is read again, from cache, in every pass.
MOST_BLOCK = 4096
# Newton's method ends after a few passes. This only bounds a program whose row is not finite.
MOST_PASSES = 64


def relaxed_step_fused(
    shifted: Tensor,
    weight: Tensor,
    level: Tensor,
    source: Tensor,
    *,
    rho: Tensor,
    alpha: float,
    relaxation: float,
) -> Tensor:
    """:func:`relaxed_step` on CUDA, for rows of any number and length."""
    groups = level.shape[-1]
    size = shifted.shape[-1] // groups
    rows = level.numel() // groups
    per_problem = rows if rho.dim() == 2 else rows // rho.shape[0]
    result = torch.empty_like(level)
    block = min(MOST_BLOCK, triton.next_power_of_2(size))
    _relaxed_step[(rows * groups,)](
        shifted,
        weight,
        source,
        level,
        result,
        rho,
        _in_memory(alpha, shifted.dtype, shifted.device),
        _in_memory(relaxation, shifted.dtype, shifted.device),
        groups,
        size,
        per_problem,
        DTYPE=tl.float64 if shifted.dtype == torch.float64 else tl.float32,
        BLOCK=block,
        PASSES=MOST_PASSES,
        num_warps=max(1, min(16, block // 256)),
    )
    return result


@lru_cache(maxsize=256)
def _in_memory(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor in the rows' dtype, because Triton passes Python floats as float32."""
    return torch.full((1,), number, dtype=dtype, device=device)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _relaxed_step(  # type: ignore[no-untyped-def]
    shifted,
    weight,
    source,
    guess,
    level,
    rho,
    alpha_at,
    relaxation_at,
    groups,
    size,
    per_problem,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSES: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    start = item * size  # rows are contiguous, and so are their groups
    own_rho = (item // groups // per_problem * groups + item % groups) * size
    lanes = tl.arange(0, BLOCK)

    # Newton's method on f(t) = Σρ(|v| - t)₊ - alpha. From any start the first pass ends left of the
    # root, and the next ones climb to it.
    alpha = tl.load(alpha_at)
    relaxation = tl.load(relaxation_at)
    tau = tl.load(guess + item)
    reached = tl.full([], -1.0, DTYPE)
    passes = 0
    going = True
    while going:
        total = tl.zeros([BLOCK], DTYPE)
        slope = tl.zeros([BLOCK], DTYPE)
        for offset in range(0, size, BLOCK):
            lane = offset + lanes
            value = tl.load(shifted + start + lane, mask=lane < size, other=0.0)
            rho_here = tl.load(rho + own_rho + lane, mask=lane < size, other=0.0)
            excess = tl.maximum(tl.abs(value) - tau, 0.0)
            total += excess * rho_here
            slope += tl.where(excess > 0, rho_here, 0.0)
        above = tl.sum(total)
        steep = tl.sum(slope)
        # If no entry lies above the guess, start again from 0, which is left of every root.
        climbed = tl.where(steep > 0, tau + (above - alpha) / tl.where(steep > 0, steep, 1.0), 0.0)
        climbed = tl.maximum(climbed, 0.0)
        passes += 1
        # The first pass may lower the level. After it the active set only shrinks, and the loop
        # ends when it stays the same.
        going = (steep != reached) & (passes < PASSES) & ((steep > 0) | (tau > 0))
        tau = tl.where(passes > 1, tl.maximum(climbed, tau), climbed)
        reached = steep

    tl.store(level + item, tau)
    for offset in range(0, size, BLOCK):
        lane = offset + lanes
        value = tl.load(shifted + start + lane, mask=lane < size, other=0.0)
        original = tl.load(weight + start + lane, mask=lane < size, other=0.0)
        clamped = tl.minimum(tl.maximum(value, -tau), tau)
        missing = original - clamped
        tl.store(source + start + lane, clamped - value - missing, mask=lane < size)
        tl.store(shifted + start + lane, value + relaxation * missing, mask=lane < size)
