"""The sites of one gram → quantized weights: choose alpha and clip, round, measure the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.config import MagRConfig
from magr_fx.grams.drift import compensate_input_error
from magr_fx.grams.gram import damped, output_energy, relative_error, within_range
from magr_fx.iterations.solution import Status
from magr_fx.machine.ranks import ALONE, Ranks
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.handover.target import (
    Target,
    row_multiple,
    rows_are_independent,
    shares_one_step,
    shorter_side,
)
from magr_fx.passes.handover.torchao_rounding import TorchaoRounding, dequantized, grid_of
from magr_fx.reporting.report import Quantization
from magr_fx.rounding.coordinate_descent import descend
from magr_fx.rounding.free_grid import fitted_grid, refitted_grid, spanning_grid
from magr_fx.rounding.gptq import Compensation, compensation
from magr_fx.rounding.grid import Grid, stacked
from magr_fx.rounding.rounding import Nearest, OnGrid, Rounded, Rounding
from magr_fx.rounding.row_pieces import cut, pieces, within
from magr_fx.rounding.search import Choice, best_alphas, choose, joined

# Rounds of fitting a free grid to the codes, each with so many passes over the codes. More rounds
# lower the error by less than 1% together.
REFITS, PASSES = 2, 2
# One row of so many shows which alphas are worth trying, but at least so many rows.
SAMPLE, LEAST_SAMPLE = 8, 64


class QuantizedWeight(NamedTuple):
    """The result for one site."""

    site: Site
    weight: Tensor  # [out, in], in the weight's dtype: torchao is to quantize this
    tensor: Tensor  # torchao's tensor of that, or one with GPTQ's codes
    choice: Choice  # of the site's rows
    report: Quantization

    @property
    def refusal(self) -> str | None:
        """The reason why it must not be written, or None."""
        failed = int((self.choice.status == Status.FAILED).sum())
        if failed:
            return f"{failed} of {len(self.weight)} rows: {Status.FAILED.sentence}"
        if not bool(self.choice.rounded.values.isfinite().all()):
            return "torchao's quantized weight is not finite"
        return None


def quantized_weights(
    shared: SharedGram, config: MagRConfig, target: Target, ranks: Ranks = ALONE
) -> list[QuantizedWeight]:
    """Choose alpha and clip for every row of the sites, and round it; the model is not changed.

    With several ranks, each works on a part of the rows, and all return the whole.

    Raises:
        MagRError: the gram or the weight cannot be used.
    """
    sites = shared.sites
    rows, columns = [site.shape[0] for site in sites], sites[0].shape[1]
    whole = torch.cat([site.weight for site in sites])
    gptq = target.options.rounding == "gptq"
    gram = within_range(damped(shared.collected, shared.damping(config)))
    hessian_factor = compensation(gram, by_activation=target.options.act_order) if gptq else None
    alphas = None
    if config.alpha == "auto" and rows_are_independent(target.config):
        alphas = ranks.gather(_best_alphas(whole, shared, gram, config, target, hessian_factor))[0]
    own = ranks.part_of(len(whole), row_multiple(target.config))
    weight = whole[own]
    target_weight = weight.to(torch.float32)
    if shared.drift is not None:
        target_weight = compensate_input_error(weight, shared.collected, shared.drift)
    count = 1
    if rows_are_independent(target.config):  # equal on all ranks, as each piece has collectives
        count = pieces(-(-len(whole) // ranks.world), columns, whole.device)
    rtns: list[Tensor] = []
    choices: list[Choice] = []
    for piece in cut(len(weight), count):
        stacked_rows = within(rows, slice(own.start + piece.start, own.start + piece.stop))
        torchao = TorchaoRounding(target.config, stacked_rows)
        rtn, choice = choose_rows(
            weight[piece],
            target_weight[piece],
            gram,
            torchao,
            config,
            target,
            hessian_factor,
            alphas,
            ranks,
        )
        rtns.append(rtn)
        choices.append(choice)
        del rtn, choice
    rtn = rtns[0] if count == 1 else torch.cat(rtns)
    rtns.clear()  # frees one copy of each matrix
    choice = joined(choices)
    choices.clear()
    target_weight, rtn, choice = (
        ranks.concat(target_weight),
        ranks.concat(rtn),
        choice.mapped(ranks.concat),
    )
    values, parts = choice.rounded
    torchao = TorchaoRounding(target.config, rows)
    if target.makes_tensors:
        tensors, final = torchao.on_grid(whole, parts), values.to(whole.dtype)
    else:
        (final,) = parts
        tensors = torchao.tensors(final)
    result = []
    for at, site in enumerate(sites):
        part = slice(sum(rows[:at]), sum(rows[: at + 1]))
        report = _report(shared, choice.rows(part), target_weight[part], rtn[part], values[part])
        result.append(QuantizedWeight(site, final[part], tensors[at], choice.rows(part), report))
    return result


def choose_rows(
    weight: Tensor,
    target_weight: Tensor,
    gram: Tensor,
    torchao: TorchaoRounding,
    config: MagRConfig,
    target: Target,
    hessian_factor: Compensation | None,
    alphas: Sequence[float] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Choice]:
    """For one piece of the rows: the values of torchao alone (round to nearest), and the choice.

    ``hessian_factor`` is GPTQ's factor of the gram, or None to round to nearest; ``alphas`` are
    those to try, or None for all.
    """
    rounding, rtn, grid = _rounding(weight, gram, torchao, target, hessian_factor)
    choice = choose(
        target_weight,
        gram,
        rounding,
        rtn,
        config,
        dtype=weight.dtype,
        alphas=alphas,
        units=torchao.rows if shares_one_step(target.config) else None,
        all_gather_rows=ranks.concat if ranks.world > 1 else None,
    )
    if grid is not None:
        codes, grid = _refined(choice, target_weight, gram, grid, target)
        parts = (codes, grid.scale, grid.zero_point)
        choice = replace(choice, rounded=Rounded(grid.values(codes), parts))
    return rtn.values, choice


def _rounding(
    weight: Tensor,
    gram: Tensor,
    torchao: TorchaoRounding,
    target: Target,
    hessian_factor: Compensation | None,
) -> tuple[Rounding, Rounded, Grid | None]:
    """How rows are rounded, what torchao alone makes of the weight, and the grid of that.

    The grid is None if torchao rounds, and not codes are made here.
    """
    alone = torchao.tensors(weight)
    rtn = torch.cat([dequantized(tensor) for tensor in alone])
    if not target.makes_tensors:
        shorter = shorter_side(target.config)
        return Nearest(torchao.values, shorter), Rounded(rtn, (weight,)), None
    grid = stacked([grid_of(tensor) for tensor in alone])
    codes = torch.cat([tensor.qdata for tensor in alone])  # type: ignore[attr-defined]
    alone.clear()
    rounding = OnGrid(torchao.grid, hessian_factor, shorter=shorter_side(target.config))
    if target.free_zero_points:
        grid = grid._replace(zero_point=grid.zero_point.to(grid.scale.dtype))
        spanning = partial(spanning_grid, like=grid)
        fitted = partial(fitted_grid, energy=gram.diagonal(), like=grid)
        rounding = OnGrid(spanning, hessian_factor, fitted)
    return rounding, Rounded(rtn, (codes, grid.scale, grid.zero_point)), grid


def _best_alphas(
    whole: Tensor,
    shared: SharedGram,
    gram: Tensor,
    config: MagRConfig,
    target: Target,
    hessian_factor: Compensation | None,
) -> list[float] | None:
    """The alphas worth trying, by rows at equal distances; None if the weight has few rows."""
    multiple = row_multiple(target.config)
    count = max(LEAST_SAMPLE, len(whole) // SAMPLE) // multiple * multiple
    if len(whole) < 2 * count or count == 0:
        return None
    rows = torch.arange(count, device=whole.device) * len(whole) // count
    sample = whole[rows]
    target_weight = sample.to(torch.float32)
    if shared.drift is not None:
        target_weight = compensate_input_error(sample, shared.collected, shared.drift)
    torchao = TorchaoRounding(target.config, [count])
    rounding, _, _ = _rounding(sample, gram, torchao, target, hessian_factor)
    return best_alphas(target_weight, gram, rounding, config, dtype=whole.dtype)


def _refined(
    choice: Choice, target_weight: Tensor, gram: Tensor, grid: Grid, target: Target
) -> tuple[Tensor, Grid]:
    """Codes and grid with a smaller error than the chosen ones, or the same.

    Free grids are fitted to the codes, and with GPTQ the codes to the grids, in turn.
    """
    codes, scale, zero = choice.rounded.parts
    grid = grid._replace(scale=scale, zero_point=zero)
    gptq, refine = target.options.rounding == "gptq", target.options.refine
    if target.free_zero_points:
        for _ in range(REFITS):
            grid = refitted_grid(codes, target_weight, gram, grid)
            if gptq:
                codes = descend(codes, target_weight, gram, grid, passes=PASSES)
    if refine:
        codes = descend(codes, target_weight, gram, grid, passes=refine)
    return codes, grid


def _report(
    shared: SharedGram, choice: Choice, target_weight: Tensor, alone: Tensor, values: Tensor
) -> Quantization:
    alphas, counts = torch.unique(choice.alpha, return_counts=True)
    error_alone, error = _errors(target_weight, alone, values, gram=shared.collected)
    zeros = choice.rounded.parts[-1]  # or a weight, if torchao makes the grid
    free = choice.rounded.parts[1:] and bool(zeros.is_floating_point())
    report = Quantization(
        free=float((zeros != zeros.round()).float().mean()) if free else 0.0,
        alphas={f"{a:g}": n for a, n in zip(alphas.tolist(), counts.tolist(), strict=True)},
        clip=float(choice.clip.mean()),
        error_alone=error_alone,
        error=error,
    )
    if shared.held is None or int(shared.held_tokens) == 0:
        return report
    held_alone, held = _errors(target_weight, alone, values, gram=shared.held)
    return replace(report, held_alone=held_alone, held=held)


def _errors(target_weight: Tensor, *candidates: Tensor, gram: Tensor) -> list[float]:
    """The output error of each candidate for the weight, on a gram."""
    energy = output_energy(target_weight, gram)
    return [relative_error(output_energy(c - target_weight, gram), energy) for c in candidates]
