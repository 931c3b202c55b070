"""traced batches → rewritten weights: the steps that magr_transform and MagRPass share."""

from __future__ import annotations

import logging
from collections import defaultdict
from contextlib import closing
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from magr_fx.config import MagRConfig
from magr_fx.errors import ConfigError, MagRError
from magr_fx.gram import damped, output_error
from magr_fx.memory import high_water_mark
from magr_fx.passes.collect_grams import CalibrationRun, SharedGram
from magr_fx.passes.find_linears import Found, Site
from magr_fx.passes.rewrite_weights import refusal, rewrite_weight
from magr_fx.passes.to_torchao import target_group_size
from magr_fx.passes.trace import TracedBatch
from magr_fx.report import MagRReport, Outcome, SiteReport
from magr_fx.solution import Solution
from magr_fx.solver import problems_at_once, solve_magr

logger = logging.getLogger("magr_fx")


def resolve_config(config: MagRConfig | None, target: Any, *, required: bool = False) -> MagRConfig:
    """The options to solve with: the given or the default ones, at the target's group size.

    Raises:
        ConfigError: ``config`` or ``target`` is of the wrong type, or they disagree.
    """
    if not (config is None or isinstance(config, MagRConfig)):
        raise ConfigError(
            f"config must be a MagRConfig or None, got {type(config).__name__}; a torchao config "
            "goes into target"
        )
    config = config or MagRConfig()
    if target is None and not required:
        return config
    return config.for_groups_of(target_group_size(target))


def rewrite_sites(
    traced: list[TracedBatch],
    found: Found,
    config: MagRConfig,
    report: MagRReport,
    *,
    progress: bool | None = None,
) -> None:
    """Check the calibration, then solve and rewrite every site, block by block, into ``report``.

    Nothing is written before every batch has run once and every activation was finite. Should
    the work be interrupted after that, ``report`` holds exactly the sites that were rewritten.

    Raises:
        CalibrationError: an activation is NaN or Inf.
    """
    report.batches = len(traced)
    report.traces = len({batch.trace for batch in traced})
    run = CalibrationRun(traced, found.sites)
    with report.timed("check"):
        run.check(progress=progress)
    finished = run.collect(progress=progress)
    try:
        with closing(finished):  # gives the model its buffers back, whatever happens here
            while True:
                with report.timed("grams"):
                    shared = next(finished, None)
                if shared is None:
                    break
                for together in _batches(shared):
                    device = together[0].sites[0].parameter.device.type
                    with torch.autocast(device, enabled=False):  # the caller's is for the forward
                        _solve_and_rewrite(together, config, report)
    except BaseException:
        done = [site.name for site in report.rewritten]
        logger.error("interrupted after rewriting %d sites: %s", len(done), ", ".join(done))
        raise
    finally:
        skipped = [SiteReport(r.name, r.shape, "skipped", r.reason) for r in found.rejections]
        report.sites = [*report.rewritten, *report.failed, *report.skipped, *skipped]


def _batches(finished: list[SharedGram]) -> list[list[SharedGram]]:
    """What to solve at once: alike problems that are too small to fill the device by themselves.

    The experts of a layer are such: as many grams as experts, all of one shape.
    """
    alike: dict[tuple[int, int, torch.dtype, torch.device], list[SharedGram]] = defaultdict(list)
    for shared in finished:
        weight = shared.sites[0].parameter
        rows, columns = sum(site.shape[0] for site in shared.sites), shared.sites[0].shape[1]
        alike[rows, columns, weight.dtype, weight.device].append(shared)
    batches = []
    for (rows, columns, _, device), group in alike.items():
        most = problems_at_once((rows, columns), device)
        batches += [group[i : i + most] for i in range(0, len(group), most)]
    return batches


def _solve_and_rewrite(together: list[SharedGram], config: MagRConfig, report: MagRReport) -> None:
    """Solve the sites of each gram as one stacked problem, and alike problems as one batch."""
    fed = [shared for shared in together if int(shared.tokens) > 0]
    for shared in together:
        if shared not in fed:
            reason = "no calibration token reaches it: there are none, or all are padding"
            report.sites += [_untouched(site, "skipped", reason) for site in shared.sites]
    if not fed:
        return
    before = report.seconds["solve"]
    try:
        with report.timed("solve"):
            solutions = _solve(fed, config)
    except (MagRError, LinAlgError) as error:
        if len(fed) > 1:  # one of them is to blame: the others are solved all the same
            for shared in fed:
                _solve_and_rewrite([shared], config, report)
            return
        reason, tokens = f"{type(error).__name__}: {error}", int(fed[0].tokens)
        sites = fed[0].sites
        logger.warning("%s failed: %s", ", ".join(s.name for s in sites), reason)
        report.sites += [_untouched(site, "failed", reason, tokens) for site in sites]
        return
    rows = sum(len(solution.weight) for solution in solutions)
    seconds = (report.seconds["solve"] - before) / rows
    with report.timed("rewrite"):
        for shared, solution in zip(fed, solutions, strict=True):
            parts = _split(solution, [site.shape[0] for site in shared.sites])
            for site, part in zip(shared.sites, parts, strict=True):
                # Into the report one by one: an interruption may come between two writes.
                report.sites.append(_write(site, part, shared, seconds * site.shape[0]))


def _solve(together: list[SharedGram], config: MagRConfig) -> list[Solution]:
    weights = [_stacked(shared.sites) for shared in together]
    grams = [damped(shared.collected, config.regularisation) for shared in together]
    single = len(together) == 1
    solution = solve_magr(
        weights[0] if single else torch.stack(weights),
        grams[0] if single else torch.stack(grams),
        alpha=config.penalty,
        group_size=config.group_size,
        solver=config.solver,
        max_steps=config.max_steps,
        tol=config.tol,
        precision=config.precision,
    )
    if grams[0].is_cuda:
        torch.cuda.synchronize(grams[0].device)
    if single:
        return [solution]
    columns = zip(*(getattr(solution, f.name).unbind() for f in fields(Solution)), strict=True)
    return [Solution(*column) for column in columns]


def _stacked(sites: list[Site]) -> torch.Tensor:
    weights = [site.weight for site in sites]
    return torch.cat(weights) if len(weights) > 1 else weights[0]


def _split(solution: Solution, rows: list[int]) -> list[Solution]:
    """The stacked solution as one per site."""
    columns = zip(*(getattr(solution, f.name).split(rows) for f in fields(Solution)), strict=True)
    return [Solution(*column) for column in columns]


def _untouched(site: Site, outcome: Outcome, reason: str, tokens: int = 0) -> SiteReport:
    return SiteReport(site.name, site.shape, outcome, reason, len(site.calls), tokens)


def _write(site: Site, solution: Solution, shared: SharedGram, seconds: float) -> SiteReport:
    """Write one site's solution if it may be written, and say what happened."""
    tokens = int(shared.tokens)
    reason = refusal(solution)
    if reason is not None:
        logger.warning("%s failed and keeps its weight: %s", site.name, reason)
        return _untouched(site, "failed", reason, tokens)
    old, new = site.weight, solution.weight
    note = "padding is counted: the input's shape does not tell which tokens are padding"
    result = SiteReport(
        name=site.name,
        shape=site.shape,
        outcome="rewritten",
        reason=note if shared.padding_counted else "",
        calls=len(site.calls),
        tokens=tokens,
        channel_max_before=_channel_max(old),
        channel_max_after=_channel_max(new),
        output_error=output_error(new.float() - old.float(), old, shared.collected),
        status=solution.summary,
        steps=int(solution.steps.max()),
        seconds=seconds,
        memory=high_water_mark(old.device),
    )
    rewrite_weight(site, new)
    return result


def _channel_max(weight: torch.Tensor) -> npt.NDArray[np.float32]:
    return weight.abs().amax(-1).float().cpu().numpy()
