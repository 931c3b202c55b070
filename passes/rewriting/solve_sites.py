"""grams → rewritten weights: solve or quantize the sites of each gram that is complete."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import torch

from magr_fx.config import MagRConfig
from magr_fx.errors import DistributedError
from magr_fx.grams.gram import damped, output_error, within_range
from magr_fx.iterations.solution import Solution, summary
from magr_fx.machine.memory import high_water_mark
from magr_fx.machine.ranks import ALONE, UNSOLVABLE, Ranks
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.handover.target import Target
from magr_fx.passes.handover.torchao_rounding import dequantized, quantized_copy
from magr_fx.passes.rewriting.ledger import Ledger, Step
from magr_fx.passes.rewriting.quantized_weights import quantized_weights
from magr_fx.passes.rewriting.rewrite_weights import laid_out, refusal, rewrite_weight
from magr_fx.reporting.report import Outcome, SiteReport
from magr_fx.solver.row_scale import row_scale
from magr_fx.solver.solver import problems_at_once, solve_magr

logger = logging.getLogger("magr_fx")
# A warning is logged if a fixed alpha alone costs more than this output error: as much as
# quantizing to 3 bits costs.
MOST_LOST = 0.2


def batch_same_shape(finished: list[SharedGram]) -> list[list[SharedGram]]:
    """Group problems of the same shape, so that small ones fill the device together.

    The experts of a layer are an example: one gram for each expert, all of one shape.
    """
    same: dict[tuple[int, int, torch.dtype, torch.device], list[SharedGram]] = defaultdict(list)
    for shared in finished:
        weight = shared.sites[0].parameter
        rows, columns = sum(site.shape[0] for site in shared.sites), shared.sites[0].shape[1]
        same[rows, columns, weight.dtype, weight.device].append(shared)
    batches = []
    for (rows, columns, _, device), group in same.items():
        most = problems_at_once((rows, columns), device)
        batches += [group[i : i + most] for i in range(0, len(group), most)]
    return batches


def solve_and_rewrite(
    together: list[SharedGram], config: MagRConfig, ledger: Ledger, ranks: Ranks = ALONE
) -> None:
    """Solve the sites of each gram as one stacked problem, and problems of one shape as one batch.

    With several ranks there is one gram only, and each rank solves a part of its rows.
    """
    fed = [shared for shared in together if _is_fed(shared, ledger.step)]
    if not fed:
        return
    try:
        with ledger.timed("solve") as spent, ranks.failing_together():
            solutions = _solve(fed, config, ranks)
    except DistributedError:
        raise
    except UNSOLVABLE as error:
        if len(fed) > 1:  # solve one by one, so that only those that fail are left out
            for shared in fed:
                solve_and_rewrite([shared], config, ledger)
            return
        _failed(fed[0], error, ledger.step)
        return
    rows = sum(len(solution.weight) for solution in solutions)
    seconds = spent() / rows
    with ledger.timed("rewrite"):
        for shared, solution in zip(fed, solutions, strict=True):
            parts = _split(solution, [site.shape[0] for site in shared.sites])
            damping = shared.damping(config)
            for site, part in zip(shared.sites, parts, strict=True):
                # Appended one by one: the run may be interrupted between two writes.
                ledger.step.rows.append(
                    _write(site, part, shared, damping, seconds * site.shape[0])
                )


def quantize_and_rewrite(
    shared: SharedGram,
    config: MagRConfig,
    target: Target,
    ledger: Ledger,
    ranks: Ranks = ALONE,
) -> None:
    """Choose alpha and clip, and round the sites of one gram.

    The weights are written; where torchao's tensors are made, these are kept in the step instead.
    With several ranks, each works on a part of the rows.
    """
    step = ledger.step
    if not _is_fed(shared, ledger.step):
        return
    try:
        with ledger.timed("solve") as spent, ranks.failing_together():
            quantized = quantized_weights(shared, config, target, ranks)
    except DistributedError:
        raise
    except UNSOLVABLE as error:
        _failed(shared, error, step)
        for site in shared.sites:
            calibrate_with_torchao_alone(site, target, step)
        return
    rows = sum(site.shape[0] for site in shared.sites)
    seconds = spent() / rows
    damping = shared.damping(config)
    with ledger.timed("rewrite"):
        for one in quantized:
            site, tokens = one.site, int(shared.tokens)
            if one.refusal is not None:
                logger.warning("%s failed and keeps its weight: %s", site.name, one.refusal)
                step.rows.append(_untouched(site, "failed", one.refusal, tokens, damping))
                calibrate_with_torchao_alone(site, target, step)
                continue
            status, steps = summary(one.choice.status), int(one.choice.steps.max())
            tensors = target.makes_tensors
            done = _rewritten(site, one.weight, shared, status, steps, judged=not tensors)
            done = replace(
                done,
                damping=damping,
                quantization=one.report,
                seconds=seconds * site.shape[0],
            )
            if target.options.propagate:
                calibrate_with(site, one.tensor, step)
            if tensors:
                step.tensors[site.name] = one.tensor
            else:
                rewrite_weight(site, one.weight)
            step.rows.append(done)


def calibrate_with(site: Site, tensor: torch.Tensor, step: Step) -> None:
    """Let the calibration read torchao's tensor, or its values, in place of the site's weight."""
    if not (site.view.covers(site.parameter) and all(call.direct for call in site.calls)):
        # torchao's tensors run only in F.linear, and as whole parameters.
        tensor = laid_out(site, dequantized(tensor), step.value_of(site.parameter))
    step.replaced[site.parameter] = tensor


def calibrate_with_torchao_alone(site: Site, target: Target, step: Step) -> None:
    """Let the calibration read torchao's tensor of a failed site's own weight."""
    if target.options.propagate:
        calibrate_with(site, quantized_copy(site.weight, target.config), step)


def _is_fed(shared: SharedGram, step: Step) -> bool:
    """Whether a token reached these sites; if not, they are noted as skipped."""
    if int(shared.tokens) > 0:
        return True
    reason = "no calibration token that is not padding reaches it"
    step.rows += [_untouched(site, "skipped", reason) for site in shared.sites]
    return False


def _failed(shared: SharedGram, error: Exception, step: Step) -> None:
    reason, tokens = f"{type(error).__name__}: {error}", int(shared.tokens)
    logger.warning("%s failed: %s", ", ".join(s.name for s in shared.sites), reason)
    step.rows += [_untouched(site, "failed", reason, tokens) for site in shared.sites]


def _solve(together: list[SharedGram], config: MagRConfig, ranks: Ranks) -> list[Solution]:
    weights = [_stacked(shared.sites) for shared in together]
    if ranks.world > 1:
        weights = [weight[ranks.part_of(len(weight))] for weight in weights]
    grams = [within_range(damped(s.collected, s.damping(config))) for s in together]
    single = len(together) == 1
    stacked = weights[0] if single else torch.stack(weights)
    solution = solve_magr(
        stacked,
        grams[0] if single else torch.stack(grams),
        alpha=config.penalty,
        group_size=config.group_size,
        solver=config.solver,
        max_steps=config.max_steps,
        tol=config.tol,
        precision=config.precision,
        row_scale=None if config.is_published else row_scale(stacked),
        all_gather_rows=ranks.concat if ranks.world > 1 else None,
    )
    if grams[0].device.type != "cpu":  # else the report would time the kernel launch alone
        torch.accelerator.synchronize(grams[0].device)
    if single:
        return [Solution(*(ranks.concat(getattr(solution, f.name)) for f in fields(Solution)))]
    columns = zip(*(getattr(solution, f.name).unbind() for f in fields(Solution)), strict=True)
    return [Solution(*column) for column in columns]


def _stacked(sites: list[Site]) -> torch.Tensor:
    weights = [site.weight for site in sites]
    return torch.cat(weights) if len(weights) > 1 else weights[0]


def _split(solution: Solution, rows: list[int]) -> list[Solution]:
    """The stacked solution, split into one for each site."""
    columns = zip(*(getattr(solution, f.name).split(rows) for f in fields(Solution)), strict=True)
    return [Solution(*column) for column in columns]


def _untouched(
    site: Site, outcome: Outcome, reason: str, tokens: int = 0, damping: float | None = None
) -> SiteReport:
    return SiteReport(site.name, site.shape, outcome, reason, len(site.calls), tokens, damping)


def _write(
    site: Site, solution: Solution, shared: SharedGram, damping: float, seconds: float
) -> SiteReport:
    """Write one site's solution, unless it is refused; the row of the report."""
    tokens = int(shared.tokens)
    reason = refusal(solution)
    if reason is not None:
        logger.warning("%s failed and keeps its weight: %s", site.name, reason)
        return _untouched(site, "failed", reason, tokens, damping)
    result = _rewritten(site, solution.weight, shared, solution.summary, int(solution.steps.max()))
    if result.output_error > MOST_LOST:
        logger.warning(
            "%s loses %.0f%% of its output to alpha. Give a smaller alpha, or a target, with which "
            "each row gets its own. alpha='published' does not adapt to the scale of the weight",
            site.name,
            100 * result.output_error,
        )
    rewrite_weight(site, solution.weight)
    return replace(result, damping=damping, seconds=seconds)


def _rewritten(
    site: Site,
    new: torch.Tensor,
    shared: SharedGram,
    status: str,
    steps: int,
    *,
    judged: bool = True,
) -> SiteReport:
    """The row of a rewritten site. ``judged`` is False if no weight is written."""
    old = site.weight
    error = output_error(new.float() - old.float(), old, shared.collected) if judged else math.nan
    return SiteReport(
        name=site.name,
        shape=site.shape,
        outcome="rewritten",
        reason=shared.notes,
        calls=len(site.calls),
        tokens=int(shared.tokens),
        channel_max_before=_channel_max(old),
        channel_max_after=_channel_max(new),
        output_error=error,
        status=status,
        steps=steps,
        memory=high_water_mark(old.device),
    )


def _channel_max(weight: torch.Tensor) -> npt.NDArray[np.float32]:
    return weight.abs().amax(-1).float().cpu().numpy()
