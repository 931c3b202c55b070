"""traced batches → rewritten weights: the steps that magr_transform and MagRPass share."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from contextlib import closing
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from magr_fx.config import Handling, MagRConfig
from magr_fx.errors import ConfigError, MagRError
from magr_fx.gram import damped, output_error
from magr_fx.memory import high_water_mark
from magr_fx.passes.collect_grams import CalibrationRun
from magr_fx.passes.coverage import refuse_failed, refuse_uncovered
from magr_fx.passes.few_tokens import fill_up
from magr_fx.passes.find_linears import FilterFn, Found, Site
from magr_fx.passes.offloaded import Resident, all_resident
from magr_fx.passes.quantizable import quantized_copy
from magr_fx.passes.quantized_weights import Target, quantized_weights
from magr_fx.passes.rewrite_weights import laid_out, refusal, rewrite_weight
from magr_fx.passes.shared_gram import SharedGram
from magr_fx.passes.to_torchao import target_group_size
from magr_fx.passes.torchao_rounding import dequantized
from magr_fx.passes.trace import TracedBatch
from magr_fx.report import MagRReport, Outcome, SiteReport
from magr_fx.solution import Solution, summary
from magr_fx.solver import problems_at_once, solve_magr

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
    *,
    target: Target | None = None,
    resident: Resident = all_resident,
    strict: bool = False,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Check the calibration, then solve and rewrite every site, block by block, into ``report``.

    Nothing is written before every batch has run once and every activation was finite. Should
    the work be interrupted after that, ``report`` holds exactly the sites that were rewritten.

    Args:
        traced: the calibration batches, each with its trace.
        found: the sites.
        config: how to solve.
        report: what is filled.
        target: what will quantize the sites, and takes part; None rewrites without it.
        resident: has those weights in memory that are worked on.
        strict: whether every weight that meets an input has to be rewritten, but for those that
            ``filter_fn`` leaves out.
        progress: whether to show bars.

    Returns:
        With GPTQ, torchao's tensors by the names of their sites, which then keep their weights.

    Raises:
        CalibrationError: an activation is NaN or Inf.
        CoverageError: ``strict``, and a weight is not rewritten.
    """
    report.batches = len(traced)
    report.traces = len({batch.trace for batch in traced})
    report.tracer, report.refusal = traced[0].trace.tracer, traced[0].trace.refusal
    handling = Handling(propagate=False, holdout=0.0) if target is None else target.handling
    run = CalibrationRun(
        traced,
        found.sites,
        propagate=handling.propagate,
        holdout=handling.holdout,
        resident=resident,
    )
    tensors: dict[str, torch.Tensor] = {}
    with report.timed("check"):
        run.check(progress=progress)
    if strict:
        refuse_uncovered(found.rejections, run.unfed(), filter_fn)
    finished = run.collect(progress=progress)
    try:
        with closing(finished):  # gives the model its buffers back, whatever happens here
            while True:
                with report.timed("grams"):
                    shared = next(finished, None)
                if shared is None:
                    break
                fill_up(shared)
                for together in _batches(shared):
                    device = together[0].sites[0].parameter.device.type
                    with torch.autocast(device, enabled=False):  # the caller's is for the forward
                        if target is None:
                            _solve_and_rewrite(together, config, report)
                            continue
                        for one in together:
                            tensors |= _quantize_and_rewrite(one, config, target, report, run)
    except BaseException:
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
    return tensors


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
            _solve_and_rewrite([shared], config, report)
        else:
            _quantize_and_rewrite(shared, config, target, report)
    return report.sites[0]


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
    fed = [shared for shared in together if _is_fed(shared, report)]
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
        _failed(fed[0], error, report)
        return
    rows = sum(len(solution.weight) for solution in solutions)
    seconds = (report.seconds["solve"] - before) / rows
    with report.timed("rewrite"):
        for shared, solution in zip(fed, solutions, strict=True):
            parts = _split(solution, [site.shape[0] for site in shared.sites])
            for site, part in zip(shared.sites, parts, strict=True):
                # Into the report one by one: an interruption may come between two writes.
                report.sites.append(_write(site, part, shared, seconds * site.shape[0]))


def _quantize_and_rewrite(
    shared: SharedGram,
    config: MagRConfig,
    target: Target,
    report: MagRReport,
    run: CalibrationRun | None = None,
) -> dict[str, torch.Tensor]:
    """Choose and round the sites of one gram, write them, and let the run go on with them.

    Without a run there is nothing to propagate to.
    """
    if not _is_fed(shared, report):
        return {}
    before = report.seconds["solve"]
    try:
        with report.timed("solve"):
            quantized = quantized_weights(shared, config, target)
    except (MagRError, LinAlgError) as error:
        _failed(shared, error, report)
        for site in shared.sites:
            _go_on_with_torchao_alone(site, target, run)
        return {}
    rows = sum(site.shape[0] for site in shared.sites)
    seconds = (report.seconds["solve"] - before) / rows
    tensors = {}
    with report.timed("rewrite"):
        for one in quantized:
            site, tokens = one.site, int(shared.tokens)
            if one.refusal is not None:
                logger.warning("%s failed and keeps its weight: %s", site.name, one.refusal)
                report.sites.append(_untouched(site, "failed", one.refusal, tokens))
                _go_on_with_torchao_alone(site, target, run)
                continue
            status, steps = summary(one.choice.status), int(one.choice.steps.max())
            done = _rewritten(site, one.weight, shared, status, steps)
            if target.handling.rounding == "gptq":  # no weight is left that is to be quantized
                done = replace(done, output_error=math.nan)
            done = replace(done, quantization=one.report, seconds=seconds * site.shape[0])
            if run is not None and target.handling.propagate:
                _go_on_with(site, one.tensor, run)
            if target.handling.rounding == "gptq":
                tensors[site.name] = one.tensor
            else:
                rewrite_weight(site, one.weight)
            report.sites.append(done)
    return tensors


def _go_on_with(site: Site, tensor: torch.Tensor, run: CalibrationRun) -> None:
    """Let the run read torchao's tensor, or its values, in the place of the site's weight."""
    if not (site.view.covers(site.parameter) and all(call.direct for call in site.calls)):
        # Not F.linear with the whole parameter, which is all that torchao's tensors run in.
        tensor = laid_out(site, dequantized(tensor), run.replacement(site.parameter))
    run.replace(site.parameter, tensor)


def _go_on_with_torchao_alone(site: Site, target: Target, run: CalibrationRun | None) -> None:
    """A site that failed keeps its weight, which torchao will quantize."""
    if run is not None and target.handling.propagate:
        _go_on_with(site, quantized_copy(site.weight, target.config), run)


def _is_fed(shared: SharedGram, report: MagRReport) -> bool:
    """Whether a token reached these sites; if not they are reported."""
    if int(shared.tokens) > 0:
        return True
    reason = "no calibration token reaches it: there are none, or all are padding"
    report.sites += [_untouched(site, "skipped", reason) for site in shared.sites]
    return False


def _failed(shared: SharedGram, error: Exception, report: MagRReport) -> None:
    reason, tokens = f"{type(error).__name__}: {error}", int(shared.tokens)
    logger.warning("%s failed: %s", ", ".join(s.name for s in shared.sites), reason)
    report.sites += [_untouched(site, "failed", reason, tokens) for site in shared.sites]


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
    result = _rewritten(site, solution.weight, shared, solution.summary, int(solution.steps.max()))
    rewrite_weight(site, solution.weight)
    return replace(result, seconds=seconds)


def _rewritten(
    site: Site, new: torch.Tensor, shared: SharedGram, status: str, steps: int
) -> SiteReport:
    old = site.weight
    return SiteReport(
        name=site.name,
        shape=site.shape,
        outcome="rewritten",
        reason=shared.notes,
        calls=len(site.calls),
        tokens=int(shared.tokens),
        channel_max_before=_channel_max(old),
        channel_max_after=_channel_max(new),
        output_error=output_error(new.float() - old.float(), old, shared.collected),
        status=status,
        steps=steps,
        memory=high_water_mark(old.device),
    )


def _channel_max(weight: torch.Tensor) -> npt.NDArray[np.float32]:
    return weight.abs().amax(-1).float().cpu().numpy()
