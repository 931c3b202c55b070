"""One gram's sites → what each becomes under the target: chosen, rounded, and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig

from magr_fx.config import Handling, MagRConfig
from magr_fx.coordinate_descent import descend
from magr_fx.drift import made_up_for
from magr_fx.gptq import compensation
from magr_fx.gram import damped, output_energy, relative_error
from magr_fx.grid import stacked
from magr_fx.passes.find_linears import Site
from magr_fx.passes.ranks import ALONE, Ranks
from magr_fx.passes.shared_gram import SharedGram
from magr_fx.passes.to_torchao import shares_one_step
from magr_fx.passes.torchao_rounding import TorchaoRounding, dequantized, grid_of
from magr_fx.report import Quantization
from magr_fx.rounding import Nearest, OnGrid, Rounded
from magr_fx.search import Choice, choose
from magr_fx.solution import Status


class QuantizedWeight(NamedTuple):
    """What became of one site."""

    site: Site
    weight: Tensor  # [out, in], the weight's dtype: what torchao is to quantize
    tensor: Tensor  # torchao's tensor of it, or one with GPTQ's codes
    choice: Choice  # its rows
    report: Quantization

    @property
    def refusal(self) -> str | None:
        """Why it must not be written, or None where it may be."""
        failed = int((self.choice.status == Status.FAILED).sum())
        if failed:
            return f"{failed} of {len(self.weight)} rows: {Status.FAILED.sentence}"
        if not bool(self.choice.rounded.values.isfinite().all()):
            return "what torchao makes of it is not finite"
        return None


@dataclass(frozen=True)
class Target:
    """The torchao config that will quantize, and how its quantization is prepared."""

    config: AOBaseConfig
    handling: Handling


def quantized_weights(
    shared: SharedGram, config: MagRConfig, target: Target, ranks: Ranks = ALONE
) -> list[QuantizedWeight]:
    """Choose, for every row of the sites, what the target is to make of it; nothing is changed.

    Of several ranks each chooses for its part of the rows, and all return the whole.

    Raises:
        MagRError: the gram or the weight cannot be worked with.
    """
    sites, gram = shared.sites, damped(shared.collected, config.regularisation)
    rows = [site.shape[0] for site in sites]
    whole = torch.cat([site.weight for site in sites])
    own = ranks.part_of(len(whole))
    weight = whole[own]
    aim = weight.to(torch.float32)
    if shared.drift is not None:
        aim = made_up_for(weight, shared.collected, shared.drift)
    torchao = TorchaoRounding(target.config, _within(rows, own))
    alone = torchao.tensors(weight)
    start = torch.cat([dequantized(tensor) for tensor in alone])
    units = rows if shares_one_step(target.config) else None
    everywhere = ranks.concat if ranks.world > 1 else None
    if target.handling.rounding == "gptq":
        on_grid = OnGrid(torchao.grid, compensation(gram, by_activation=target.handling.act_order))
        grid = stacked([grid_of(tensor) for tensor in alone])
        codes = torch.cat([tensor.qdata for tensor in alone])  # type: ignore[attr-defined]
        choice = choose(
            aim,
            gram,
            on_grid,
            Rounded(start, (codes, grid.scale, grid.zero_point)),
            config,
            dtype=weight.dtype,
            units=units,
            everywhere=everywhere,
        )
        codes, scale, zero = choice.rounded.parts
        grid = grid._replace(scale=scale, zero_point=zero)
        if target.handling.refine:
            codes = descend(codes, aim, gram, grid, passes=target.handling.refine)
        rounded = Rounded(grid.values(codes), (codes, scale, zero))
    else:
        choice = choose(
            aim,
            gram,
            Nearest(torchao.values),
            Rounded(start, (weight,)),
            config,
            dtype=weight.dtype,
            units=units,
            one_weight=True,
            everywhere=everywhere,
        )
        rounded = choice.rounded
    aim, start = ranks.concat(aim), ranks.concat(start)
    choice = replace(choice, rounded=rounded).mapped(ranks.concat)
    values, parts = choice.rounded
    torchao = TorchaoRounding(target.config, rows)
    if target.handling.rounding == "gptq":
        tensors, final = torchao.on_grid(whole, parts), values.to(whole.dtype)
    else:
        (final,) = parts
        tensors = torchao.tensors(final)
    result = []
    for at, site in enumerate(sites):
        part = slice(sum(rows[:at]), sum(rows[: at + 1]))
        report = _report(shared, choice.rows(part), aim[part], start[part], values[part])
        result.append(QuantizedWeight(site, final[part], tensors[at], choice.rows(part), report))
    return result


def _within(rows: list[int], part: slice) -> list[int]:
    """How many rows of each of the stacked weights lie in a part of the stack, if any do."""
    ends = list(accumulate(rows))
    pieces = [
        min(end, part.stop) - max(end - length, part.start)
        for end, length in zip(ends, rows, strict=True)
    ]
    return [piece for piece in pieces if piece > 0]


def _report(
    shared: SharedGram, choice: Choice, aim: Tensor, alone: Tensor, values: Tensor
) -> Quantization:
    alphas, counts = torch.unique(choice.alpha, return_counts=True)
    error_alone, error = _errors(aim, alone, values, gram=shared.collected)
    report = Quantization(
        alphas={f"{a:g}": n for a, n in zip(alphas.tolist(), counts.tolist(), strict=True)},
        clip=float(choice.clip.mean()),
        error_alone=error_alone,
        error=error,
    )
    if shared.held is None or int(shared.held_tokens) == 0:
        return report
    held_alone, held = _errors(aim, alone, values, gram=shared.held)
    return replace(report, held_alone=held_alone, held=held)


def _errors(aim: Tensor, *candidates: Tensor, gram: Tensor) -> list[float]:
    """The output error of each candidate."""
    energy = output_energy(aim, gram)
    return [relative_error(output_energy(c - aim, gram), energy) for c in candidates]
