"""GPTQ: round one input after the other; the inputs not yet rounded compensate each error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.machine.matmul_precision import full_float32
from magr_fx.rounding.grid import Grid

# Inputs whose errors are applied to the later ones in one product (the paper's lazy batch updates).
BLOCK = 64
# If the gram cannot be factorised, FIRST_DAMPING times its mean diagonal is added, then RAISE times
# as much, up to MOST_DAMPING times.
FIRST_DAMPING, RAISE, MOST_DAMPING = 1e-6, 10.0, 1.0


class Compensation(NamedTuple):
    """The order in which inputs are rounded, and the factor that spreads errors to later inputs."""

    order: Tensor  # [in]: the input at each position
    factor: Tensor  # [in, in], upper triangular U with UᵀU = G⁻¹, both in that order


@full_float32()
def compensation(gram: Tensor, *, by_activation: bool = False) -> Compensation:
    """What :func:`gptq` needs of a gram ``[in, in]``, computed once for all weights with that gram.

    The weights of a dead input (G_jj = 0) are rounded to the nearest, and compensate nothing.

    Args:
        gram: G, positive semidefinite. If it cannot be factorised, the smallest tried share of its
            mean diagonal with which it can is added to the diagonal.
        by_activation: round the inputs with the largest G_jj first (the authors' ``act_order``)
            instead of in the order of the weight.

    Raises:
        CalibrationError: the gram is not positive semidefinite.
    """
    gram = gram.to(torch.float32)
    energy = gram.diagonal()
    order = torch.arange(len(gram), device=gram.device)
    if by_activation:
        order = torch.argsort(energy, descending=True, stable=True)
    dead = energy[order] <= 0
    unit = torch.where(dead, 0, energy[order]).mean()
    unit = torch.where(unit > 0, unit, 1)
    # A negative diagonal entry is always an error, which damping, or the treatment of dead inputs,
    # could hide.
    damping = 0.0 if bool((energy >= 0).all()) else torch.inf
    while damping <= MOST_DAMPING:
        ordered = gram[order][:, order]
        ordered.diagonal().add_(torch.where(dead, unit, damping * unit))
        lower, failed = torch.linalg.cholesky_ex(ordered)
        del ordered  # as large as the gram
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed) and bool(upper.isfinite().all()):
                return Compensation(order, upper)
        damping = RAISE * damping if damping else FIRST_DAMPING
    raise CalibrationError(
        "gram is not positive semidefinite, by far more than rounding can explain; "
        "pass XᵀX, summed in float32 or wider"
    )


@full_float32()
def gptq(weight: Tensor | Sequence[Tensor], grid: Grid, compensation: Compensation) -> Tensor:
    """Round each row to its grid, input by input; the later inputs compensate every error.

    After input j has been rounded with the error e_j = (w_j - v_j)/U_jj, the inputs k > j become
    w_k - e_j·U_jk. This minimises (v - w)ᵀG(v - w) over them, with the inputs up to j fixed
    (Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, section 3 and algorithm 1).

    The caller fixes the grid beforehand, so any order of the inputs is possible. The paper's code
    instead chooses each group's grid from the weights as compensated so far.

    Args:
        weight: ``[out, in]``, any floating dtype; or several weights, whose rows are stacked.
        grid: the grid of the rows.
        compensation: of the gram, from :func:`compensation`.

    Returns:
        Codes ``[out, in]``, int8.
    """
    order, factor = compensation
    columns = len(order)
    # One row per input, so that the numbers of an input are contiguous. Those that have been
    # rounded are replaced by their errors e_j·U_jj, hence the factor with a diagonal of ones.
    rest = _by_column([weight] if isinstance(weight, Tensor) else weight, order)
    unit = factor / factor.diagonal().unsqueeze(-1)
    steps = grid.by_column(columns).permuted(order)
    codes = torch.empty(rest.shape, dtype=torch.int8, device=rest.device)
    found = torch.empty_like(rest[:BLOCK])
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = rest[start:end]
        factors = unit[start:end, start:end]
        for j, (numbers, row) in enumerate(zip(block.unbind(), factors.unbind(), strict=True)):
            numbers.sub_(steps.round(start + j, numbers, found[j]))
            block[j + 1 :].addr_(row[j + 1 :], numbers, alpha=-1)
        codes[start:end] = found[: end - start]
        rest[end:].addmm_(unit[start:end, end:].T, block, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def _by_column(weights: Sequence[Tensor], order: Tensor) -> Tensor:
    """The weights' rows as columns ``[in, out]``, float32, in one copy."""
    rows = [len(weight) for weight in weights]
    result = torch.empty(len(order), sum(rows), dtype=torch.float32, device=order.device)
    for weight, columns in zip(weights, torch.split(result, rows, 1), strict=True):
        columns.copy_(weight.T[order])
    return result
