"""traced batches → rewritten weights: the steps that magr_transform and MagRPass share."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torchao.quantization import FqnToConfig

from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.errors import CalibrationError, ConfigError
from magr_fx.machine.memory import high_water_mark
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.few_tokens import fill_up
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Found, Site
from magr_fx.passes.graphs.trace import TracedBatch
from magr_fx.passes.handover.mixed_target import Goal, MixedTarget
from magr_fx.passes.handover.target import (
    Target,
    described_in_full,
    has_free_zero_points,
    target_group_size,
)
from magr_fx.passes.offloading.execution import Execution
from magr_fx.passes.rewriting.coverage import refuse_failed, refuse_uncovered
from magr_fx.passes.rewriting.ledger import Ledger
from magr_fx.passes.rewriting.request import Request
from magr_fx.passes.rewriting.share_solves import exchange, plan
from magr_fx.passes.rewriting.solve_sites import (
    batch_same_shape,
    quantize_and_rewrite,
    solve_and_rewrite,
)
from magr_fx.reporting.block_log import log_block
from magr_fx.reporting.report import MagRReport, SiteReport

logger = logging.getLogger("magr_fx")


def resolve_config(
    config: MagRConfig | None, target: Any, *, required: bool = False, several: bool = False
) -> MagRConfig:
    """``config``, or the default one, completed by the target: its group size, and alpha="auto".

    Args:
        config, target: the caller's.
        required: whether there has to be a target.
        several: whether the target may be an FqnToConfig, whose configs complete it one by one.

    Raises:
        ConfigError: ``config`` or ``target`` is of the wrong type, or they disagree.
    """
    if not (config is None or isinstance(config, MagRConfig)):
        raise ConfigError(
            f"config must be a MagRConfig or None, got {type(config).__name__}; a torchao config "
            "goes into target"
        )
    config = config or MagRConfig()
    if config.step is not None:
        raise ConfigError(
            f'a MagRConfig with step="{config.step}" belongs to torchao\'s quantize_(model, '
            "config), with the calibration run in between. Here, leave step and base_config out, "
            "and give the torchao config as target"
        )
    if target is None and not required:
        if config.alpha == "auto":
            raise ConfigError(
                'alpha="auto" chooses by the quantization error of each row: give a target, the '
                "torchao config that will quantize the model, or a number for alpha"
            )
        return config
    if several and isinstance(target, FqnToConfig):
        if config.group_size is not None:
            raise ConfigError(
                f"group_size={config.group_size} is that of all weights, and of several configs "
                "each has its own; leave it out"
            )
    else:
        config = config.for_groups_of(target_group_size(target))
    return replace(config, alpha="auto") if config.alpha is None else config


def for_quantizing(
    config: MagRConfig, target: Any, options: QuantizeOptions
) -> tuple[MagRConfig, Target | MixedTarget]:
    """The config and the target of a run that quantizes, with its kind of zero points decided.

    Raises:
        ConfigError: the target cannot hold free zero points, which the config asks for.
    """
    if isinstance(target, FqnToConfig):
        return config, _mixed(config, target, options)
    goal = goal_for(config, target, options)
    return goal.config, goal.target


def _mixed(config: MagRConfig, target: FqnToConfig, options: QuantizeOptions) -> MixedTarget:
    """A goal for each different config. If one makes tensors, all do, on grids of their own."""
    goals: dict[str, Goal] = {}
    for one in target.fqn_to_config.values():
        if one is not None:
            goals[described_in_full(one)] = goal_for(resolve_config(config, one), one, options)
    if not goals:
        raise ConfigError("FqnToConfig names no config that quantizes: give it one")
    if any(goal.target.makes_tensors for goal in goals.values()):
        goals = {
            key: Goal(goal.config, replace(goal.target, direct=True)) for key, goal in goals.items()
        }
    return MixedTarget(target, options, goals)


def goal_for(config: MagRConfig, target: Any, options: QuantizeOptions) -> Goal:
    """How weights are solved for one torchao config, with its kind of zero points decided.

    Raises:
        ConfigError: the target cannot hold free zero points, which the config asks for.
    """
    wanted = config.zero_point
    if wanted is None and config.is_published:  # as published
        wanted = "whole"
    free = has_free_zero_points(wanted, target)
    zero_point = "free" if free else "whole"
    return Goal(replace(config, zero_point=zero_point), Target(target, options, free))


def target_for_rewriting(
    config: MagRConfig, target: Any, propagate: bool | None, holdout: float
) -> Target | None:
    """The target, where it takes part in rewriting the weights; None where it only sets the groups.

    Raises:
        ConfigError: the options do not go together.
    """
    options = QuantizeOptions(propagate=propagate is not False, holdout=holdout)
    if config.zero_point == "free":
        raise ConfigError(
            'zero_point="free" belongs to magr_quantize: here torchao makes the zero points later, '
            "and rounds them; leave it out"
        )
    if config.alpha == 0:
        raise ConfigError("alpha=0 shrinks nothing, so there is nothing to transform")
    if target is None and propagate:
        raise ConfigError(
            "propagate=True needs a target: each layer is fitted to the quantized layers before it"
        )
    if config.alpha != "auto" and not propagate:
        return None
    return Target(target, options)


def rewrite_sites(
    traced: list[TracedBatch],
    found: Found,
    request: Request,
    execution: Execution,
    ledger: Ledger,
) -> None:
    """Check the calibration, and solve and rewrite every site, block by block.

    No weight is written before every batch has run once and every activation was finite. Where
    torchao's tensors are made, which take the weights' places at the end, that one run also
    collects the grams; otherwise it comes before. If the work is interrupted later, the report
    holds exactly the sites that were rewritten.

    Args:
        traced: the calibration batches, each with its trace.
        found: the sites.
        request: what was asked for.
        execution: where the work is done.
        ledger: collects the results; an interrupted run is resumed from its checkpoint.

    Raises:
        CalibrationError: an activation is NaN or Inf, or no token counts.
        CoverageError: ``strict``, and a weight is not rewritten.
    """
    run = CalibrationRun(
        traced,
        found.sites,
        propagate=request.propagates,
        holdout=request.holdout,
        resident=execution.resident,
        ranks=execution.ranks,
        spill=request.folders.spill,
    )
    _describe(run, traced, ledger.report)
    for note in run.notes:
        logger.warning("%s", note)
    saved = ledger.saved()
    # Where nothing is written before the end, the run itself can find what is wrong; also a run
    # that is resumed, as the states were saved before all was seen.
    on_the_way = request.makes_tensors and not request.strict
    if saved is None and not on_the_way:
        _check(run, found, request, ledger.report)
    try:
        ledger.restore(saved, found.sites, execution.resident, makes_tensors=request.makes_tensors)
        _rewrite_blocks(run, saved, request, execution.ranks, ledger, check=on_the_way)
        if on_the_way:
            fed = {row.name for row in ledger.rows if row.tokens}
            _refuse_unfed(sum(site.name not in fed for site in found.sites), found, ledger.report)
    except BaseException as error:
        ledger.interrupted(error, makes_tensors=request.makes_tensors)
        raise
    finally:
        ledger.close(found.rejections)
    ledger.count_saved(execution.ranks)
    _warn_of_overfitting(ledger.report)
    if request.strict:
        refuse_failed(ledger.report, written=not request.makes_tensors)


def _describe(run: CalibrationRun, traced: list[TracedBatch], report: MagRReport) -> None:
    """Note the number of batches and traces, the tracer, and notes on the calibration."""
    report.batches = len(traced)
    report.traces = len({batch.trace for batch in traced})
    report.tracer, report.refusal = traced[0].trace.tracer, traced[0].trace.refusal
    report.notes += run.notes


def _check(run: CalibrationRun, found: Found, request: Request, report: MagRReport) -> None:
    """Check the whole calibration before anything is changed.

    Raises:
        CalibrationError: an activation is NaN or Inf, or no token counts.
        CoverageError: ``strict``, and a weight would not be rewritten.
    """
    with report.timed("check"):
        run.check(progress=request.progress)
    unfed = run.unfed()
    _refuse_unfed(len(unfed), found, report)
    if request.strict:
        refuse_uncovered(found.rejections, unfed, request.filter_fn)


def _refuse_unfed(unfed: int, found: Found, report: MagRReport) -> None:
    """Raise if no token reaches any site.

    Raises:
        CalibrationError: no token counts.
    """
    if unfed == len(found.sites):
        raise CalibrationError(
            f"no token of the {report.batches} calibration batches counts: all are padding by "
            "their masks, or the inputs are empty; nothing was changed. In attention_mask, 1 "
            "means a token (0 if the mask is added to the scores)"
        )


def _rewrite_blocks(
    run: CalibrationRun,
    saved: dict[str, Any] | None,
    request: Request,
    ranks: Ranks,
    ledger: Ledger,
    *,
    check: bool,
) -> None:
    """Run the calibration step by step, and rewrite the sites whose grams each step completes.

    ``saved`` is the last state of an interrupted run, if any; its boundary is taken from it.
    """
    steps = run.collect(
        after=None if saved is None else (saved["step"], saved.pop("boundary")),
        save=None if ledger.checkpoint is None else ledger.save,
        check=check,
        progress=request.progress,
    )
    finished: list[SharedGram] | None = None
    started = perf_counter()
    with closing(steps):  # restores the model's buffers, also after an error
        while True:
            with ledger.timed("grams"):
                try:  # only the run keeps a reference to what replaces the weights
                    finished = steps.send(None if finished is None else ledger.end_step(finished))
                except StopIteration:
                    return
            fill_up(finished)
            _rewrite(finished, request, ledger, ranks)
            memory = high_water_mark(finished[0].sites[0].parameter.device)
            now = perf_counter()
            log_block(*run.working_on, ledger.step.rows, now - started, memory)
            started = now


def _rewrite(finished: list[SharedGram], request: Request, ledger: Ledger, ranks: Ranks) -> None:
    """Solve and rewrite the sites of grams that are complete; for one target after the other."""
    if not isinstance(request.target, MixedTarget):
        _rewrite_for(finished, request.config, request.target, ledger, ranks)
        return
    by_goal: dict[int, tuple[Goal, list[SharedGram]]] = {}
    for shared in finished:
        sites: dict[int, tuple[Goal, list[Site]]] = {}
        for site in shared.sites:
            goal = request.target.goal_of(site.name)
            if goal is not None:
                sites.setdefault(id(goal), (goal, []))[1].append(site)
        for key, (goal, own) in sites.items():
            by_goal.setdefault(key, (goal, []))[1].append(replace(shared, sites=own))
    for (config, target), parts in by_goal.values():
        _rewrite_for(parts, config, target, ledger, ranks)
    order = {site.name: at for at, site in enumerate(s for one in finished for s in one.sites)}
    ledger.step.rows.sort(key=lambda row: order[row.name])


def _rewrite_for(
    finished: list[SharedGram],
    config: MagRConfig,
    target: Target | None,
    ledger: Ledger,
    ranks: Ranks,
) -> None:
    step = ledger.step
    whole, owners, split = plan(finished, target, ranks)
    own = [shared for shared, owner in zip(whole, owners, strict=True) if owner == ranks.rank]
    device = finished[0].sites[0].parameter.device.type
    with torch.autocast(device, enabled=False):  # a caller's autocast is for forward passes
        for together in batch_same_shape(own):
            if target is None:
                solve_and_rewrite(together, config, ledger)
            else:
                for one in together:
                    quantize_and_rewrite(one, config, target, ledger)
        exchange(whole, owners, step, target, ranks)
        for shared in split:
            if target is None:
                solve_and_rewrite([shared], config, ledger, ranks)
            else:
                quantize_and_rewrite(shared, config, target, ledger, ranks)
    if split:  # seconds and memory differ between ranks: all report the first rank's
        step.rows = ranks.gather(step.rows)[0]


def _warn_of_overfitting(report: MagRReport) -> None:
    if report.overfitted:
        logger.warning(
            "%d sites gain much less over torchao alone on the held-out tokens than on the "
            "calibration tokens, such as %s: calibrate on more text, of more kinds, or raise "
            "damping",
            len(report.overfitted),
            report.overfitted[0].name,
        )


def rewrite_alone(shared: SharedGram, config: MagRConfig, target: Target | None) -> SiteReport:
    """Solve and rewrite a single site, whose gram was collected without a graph.

    Args:
        shared: the site, its gram and the number of tokens.
        config: how to solve, resolved for the target.
        target: what will quantize the site, rounding to nearest and without propagation; None
            rewrites without regard to a target.

    Returns:
        The site's row of the report. A failed site keeps its weight.
    """
    ledger = Ledger(MagRReport(config))
    with torch.autocast(shared.sites[0].parameter.device.type, enabled=False):
        if target is None:
            solve_and_rewrite([shared], config, ledger)
        else:
            quantize_and_rewrite(shared, config, target, ledger)
    return ledger.rows[0]
