"""traced batches → rewritten weights: the steps that magr_transform and MagRPass share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import closing
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from magr_fx.block_log import log_block
from magr_fx.config import Handling, MagRConfig
from magr_fx.errors import CalibrationError, ConfigError
from magr_fx.memory import high_water_mark
from magr_fx.passes.checkpoint import Checkpoint
from magr_fx.passes.collect_grams import CalibrationRun
from magr_fx.passes.coverage import refuse_failed, refuse_uncovered
from magr_fx.passes.few_tokens import fill_up
from magr_fx.passes.find_linears import FilterFn, Found, Site
from magr_fx.passes.quantized_weights import Target
from magr_fx.passes.ranks import ALONE, Ranks
from magr_fx.passes.resident import NotStoredError, Resident, all_resident
from magr_fx.passes.rewrite_weights import rewrite_weight
from magr_fx.passes.shared_gram import SharedGram
from magr_fx.passes.solve_sites import alike, quantize_and_rewrite, solve_and_rewrite
from magr_fx.passes.spread import exchange, plan
from magr_fx.passes.to_torchao import target_group_size
from magr_fx.passes.trace import TracedBatch
from magr_fx.report import MagRReport, SiteReport

logger = logging.getLogger("magr_fx")


def resolve_config(config: MagRConfig | None, target: Any, *, required: bool = False) -> MagRConfig:
    """The options to solve with: the given or the default ones, with what the target says.

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
            f'a MagRConfig with step="{config.step}" belongs into torchao\'s quantize_(model, '
            "config), with the calibration run in between; leave step and base_config out here, "
            "and give the torchao config as target"
        )
    if target is None and not required:
        if config.alpha == "auto":
            raise ConfigError(
                'alpha="auto" chooses by what the target makes of each row: give a target, the '
                "torchao config that will quantize the model, or a number for alpha"
            )
        return config
    config = config.for_groups_of(target_group_size(target))
    return replace(config, alpha="auto") if config.alpha is None else config


def target_for_rewriting(
    config: MagRConfig, target: Any, propagate: bool | None, holdout: float
) -> Target | None:
    """How the target takes part in rewriting the weights; None where it only sets the groups.

    Raises:
        ConfigError: the options do not go together.
    """
    handling = Handling(propagate=propagate is not False, holdout=holdout)
    if config.alpha == 0:
        raise ConfigError("alpha=0 shrinks nothing, so that there is nothing to transform")
    if target is None and propagate:
        raise ConfigError("propagate needs a target: what is propagated is what it quantizes")
    if config.alpha != "auto" and not propagate:
        return None
    return Target(target, handling)


def rewrite_sites(
    traced: list[TracedBatch],
    found: Found,
    config: MagRConfig,
    report: MagRReport,
    tensors: MutableMapping[str, torch.Tensor],
    *,
    target: Target | None = None,
    resident: Resident = all_resident,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    spill_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> None:
    """Check the calibration, then solve and rewrite every site, block by block, into ``report``.

    Nothing is written before every batch has run once and every activation was finite. Should
    the work be interrupted after that, ``report`` holds exactly the sites that were rewritten.

    Args:
        traced: the calibration batches, each with its trace.
        found: the sites.
        config: how to solve.
        report: what is filled.
        tensors: with GPTQ takes torchao's tensors by the names of their sites, which keep their
            weights; as soon as each is made.
        target: what will quantize the sites, and takes part; None rewrites without it.
        resident: has those weights in memory that are worked on.
        checkpoint: where to save each step, and what to go on from.
        ranks: those that share the work, and end with the same weights and report.
        spill_dir: where to keep the values between blocks; None keeps them in memory.
        strict: whether every weight that meets an input has to be rewritten, but for those that
            ``filter_fn`` leaves out.
        progress: whether to show bars.

    Raises:
        CalibrationError: an activation is NaN or Inf, or no token counts.
        CoverageError: ``strict``, and a weight is not rewritten.
    """
    handling = Handling(propagate=False, holdout=0.0) if target is None else target.handling
    run = CalibrationRun(
        traced,
        found.sites,
        propagate=handling.propagate,
        holdout=handling.holdout,
        resident=resident,
        ranks=ranks,
        spill=spill_dir,
    )
    _describe(run, traced, report)
    saved = None if checkpoint is None else checkpoint.last()
    if saved is None:
        with report.timed("check"):
            run.check(progress=progress)
        unfed = _unfed(run, found, len(traced))
        if strict:
            refuse_uncovered(found.rejections, unfed, filter_fn)
    keeper = _Keeper(checkpoint, report)
    try:
        keeper.restore(saved, found.sites, handling, resident, tensors)
        finished = run.collect(
            after=None if saved is None else (saved["step"], saved.pop("boundary")),
            save=None if checkpoint is None else keeper.save,
            progress=progress,
        )
        started = perf_counter()
        with closing(finished):  # gives the model its buffers back, whatever happens here
            while True:
                known = len(report.sites)
                with report.timed("grams"):
                    shared = next(finished, None)
                if shared is None:
                    break
                fill_up(shared)
                tensors.update(_rewrite(shared, config, target, report, run, ranks))
                keeper.remember(shared, tensors)
                memory = high_water_mark(shared[0].sites[0].parameter.device)
                now = perf_counter()
                log_block(*run.working_on, report.sites[known:], now - started, memory)
                started = now
    except BaseException as error:
        _leave_out_lost(report, error)
        if handling.rounding == "gptq":  # the tensors take their places together, at the end
            report.sites = []
            logger.error("interrupted: nothing was changed")
        else:
            done = [site.name for site in report.rewritten]
            logger.error("interrupted after rewriting %d sites: %s", len(done), ", ".join(done))
        raise
    finally:
        skipped = [SiteReport(r.name, r.shape, "skipped", r.reason) for r in found.rejections]
        report.sites = [*report.rewritten, *report.failed, *report.skipped, *skipped]
    keeper.tell(ranks)
    if report.overfitted:
        logger.warning(
            "%d sites gain much less over torchao alone on the held-out tokens than on the "
            "calibration, %s for one: calibrate on more text, and more kinds of it, or raise "
            "damping",
            len(report.overfitted),
            report.overfitted[0].name,
        )
    if strict:
        refuse_failed(report, written=handling.rounding != "gptq")


def _describe(run: CalibrationRun, traced: list[TracedBatch], report: MagRReport) -> None:
    """Put into the report what it says of the calibration."""
    report.batches = len(traced)
    report.traces = len({batch.trace for batch in traced})
    report.tracer, report.refusal = traced[0].trace.tracer, traced[0].trace.refusal
    report.notes += run.notes


def _unfed(run: CalibrationRun, found: Found, batches: int) -> list[Site]:
    """The sites that no counted token reaches, which may not be all of them.

    What is unclear of the inputs is logged here: before anything is changed.
    """
    for note in run.notes:
        logger.warning("%s", note)
    unfed = run.unfed()
    if len(unfed) == len(found.sites):
        raise CalibrationError(
            f"no token of the {batches} calibration batches counts: all are padding by their "
            "masks, or the inputs are empty; nothing was changed. In attention_mask 1 (or 0, if it "
            "is added to the scores) stands for a token"
        )
    return unfed


def _leave_out_lost(report: MagRReport, error: BaseException) -> None:
    """Have in the report no weight that could not be stored, which is what it was."""
    lost = error if isinstance(error, NotStoredError) else error.__cause__
    if isinstance(lost, NotStoredError):
        report.sites = [row for row in report.sites if row.name.partition("[")[0] not in lost.names]


def _rewrite(
    finished: list[SharedGram],
    config: MagRConfig,
    target: Target | None,
    report: MagRReport,
    run: CalibrationRun,
    ranks: Ranks,
) -> dict[str, torch.Tensor]:
    """Solve and rewrite the sites of grams that are complete; with GPTQ, torchao's tensors."""
    tensors: dict[str, torch.Tensor] = {}
    first, (whole, owners, split) = len(report.sites), plan(finished, target, ranks)
    own = [shared for shared, owner in zip(whole, owners, strict=True) if owner == ranks.rank]
    device = finished[0].sites[0].parameter.device.type
    with torch.autocast(device, enabled=False):  # the caller's is for the forward
        for together in alike(own):
            if target is None:
                solve_and_rewrite(together, config, report)
            else:
                for one in together:
                    tensors |= quantize_and_rewrite(one, config, target, report, run)
        exchange(whole, owners, report, first, tensors, target, run, ranks)
        for shared in split:
            if target is None:
                solve_and_rewrite([shared], config, report, ranks)
            else:
                tensors |= quantize_and_rewrite(shared, config, target, report, run, ranks)
    if split:  # each has its own seconds, and memory
        report.sites[first:] = ranks.gather(report.sites[first:])[0]
    return tensors


class _Keeper:
    """Keeps what a step makes of its sites until it is saved; only where there is a checkpoint."""

    def __init__(self, checkpoint: Checkpoint | None, report: MagRReport) -> None:
        self.checkpoint, self.report = checkpoint, report
        self.weights: dict[str, torch.Tensor] = {}

    def restore(
        self,
        saved: dict[str, Any] | None,
        sites: list[Site],
        handling: Handling,
        resident: Resident,
        tensors: MutableMapping[str, torch.Tensor],
    ) -> None:
        """Write again what an earlier run made of its sites; with GPTQ, its tensors."""
        if saved is None or self.checkpoint is None:
            return
        logger.info("going on after step %d of %s", saved["step"], self.checkpoint.folder)
        self.checkpoint.check_weights(saved["step"], saved["rows"])
        for weights in self.checkpoint.weights(saved["step"]):
            if handling.rounding == "gptq":
                tensors.update(weights)
                continue
            own = [site for site in sites if site.name in weights]
            with resident([site.parameter for site in own]):
                for site in own:
                    rewrite_weight(site, weights[site.name])
        self.report.sites = saved["rows"]

    def remember(self, finished: list[SharedGram], tensors: Mapping[str, torch.Tensor]) -> None:
        """What was made of the sites of these grams: their weights, or torchao's tensors."""
        if self.checkpoint is None or not self.checkpoint.keeps_weights:
            return
        done = {row.name for row in self.report.rewritten}
        for site in (site for shared in finished for site in shared.sites):
            if site.name in done:
                weight = tensors.get(site.name)
                self.weights[site.name] = site.weight.clone() if weight is None else weight

    def save(self, step: int, boundary: Callable[[], Any], last: bool) -> None:
        """Write what a step that has ended has made; it is not held in memory any longer."""
        if self.checkpoint is not None:
            self.checkpoint.save(step, boundary, self.report.sites, self.weights, last)
            self.weights.clear()

    def tell(self, ranks: Ranks) -> None:
        """Have in the report how much was written, by all ranks."""
        if self.checkpoint is not None:
            self.report.states = self.checkpoint.states
            self.report.saved_bytes = sum(ranks.gather(self.checkpoint.written))


def rewrite_alone(shared: SharedGram, config: MagRConfig, target: Target | None) -> SiteReport:
    """Solve and rewrite the one site of a gram that is complete, outside of any graph.

    Args:
        shared: its site, its gram and the number of tokens in that.
        config: how to solve, resolved for the target.
        target: what will quantize the site, and takes part, without propagation and to the
            nearest; None rewrites without it.

    Returns:
        What happened to the site. A failed one keeps its weight.
    """
    report = MagRReport(config)
    with torch.autocast(shared.sites[0].parameter.device.type, enabled=False):
        if target is None:
            solve_and_rewrite([shared], config, report)
        else:
            quantize_and_rewrite(shared, config, target, report)
    return report.sites[0]
