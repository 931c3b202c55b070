"""Coordinate descent on the codes of a quantized weight: one code after the other is optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.machine.matmul_precision import full_float32
from magr_fx.rounding.grid import Grid

# Inputs whose changes are applied to the later inputs in one matrix product.
BLOCK = 64


@full_float32()
def descend(codes: Tensor, weight: Tensor, gram: Tensor, grid: Grid, *, passes: int) -> Tensor:
    """Lower each row's output error (v - w)ᵀG(v - w) by changing one code after the other.

    With all other codes fixed, the best value of input j is the one nearest to
    v_j - (G(v - w))_j / G_jj. A pass visits every input once, and no visit raises the error.
    The authors' code runs this after OPTQ, against the original weight (Zhang et al., arXiv
    2406.00800, the rows marked † of their tables). It ends early if a pass changes nothing.

    Args:
        codes: ``[out, in]`` int8, to start from; not modified.
        weight: w, ``[out, in]``, any floating dtype.
        gram: G, ``[in, in]``, positive semidefinite. Codes of inputs with G_jj = 0 do not change.
        grid: the grid of the codes.
        passes: the maximum number of passes over all inputs.

    Returns:
        Codes ``[out, in]``, int8.
    """
    gram = gram.to(torch.float32)
    energy = gram.diagonal().tolist()
    columns = len(gram)
    steps = grid.by_column(columns)
    target = weight.to(torch.float32).T.contiguous()
    # A copy, [in, out], so that the codes of one input are contiguous.
    codes = codes.T.clone(memory_format=torch.contiguous_format)
    values = grid.values(codes.T).T.contiguous()
    changes, found = torch.empty_like(values[:BLOCK]), torch.empty_like(values[:BLOCK])
    for _ in range(passes):
        before = codes.clone()
        slope = gram @ (values - target)  # recomputed, so that no rounding errors add up
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            changes[: end - start].zero_()
            found[: end - start] = codes[start:end]
            block = slope[start:end]
            for j, row in enumerate(gram[start:end, start:end].unbind()):
                if energy[start + j] <= 0:
                    continue
                old, change = values[start + j], changes[j]
                best = torch.sub(old, block[j], alpha=1 / energy[start + j])
                value = steps.round(start + j, best, found[j])
                if not steps.exact:  # values are rounded, so the nearest code may be worse
                    worse = (value - best).abs() >= (old - best).abs()
                    value = torch.where(worse, old, value)
                    found[j] = torch.where(worse, codes[start + j], found[j])
                torch.sub(value, old, out=change)
                block[j + 1 :].addr_(row[j + 1 :], change)
                old.copy_(value)
            codes[start:end] = found[: end - start]
            slope[end:].addmm_(gram[end:, start:end], changes[: end - start])
        if torch.equal(codes, before):
            break
    return codes.T.contiguous()
