"""Model and calibration → rewritten weights: the run that every entry point starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from magr_fx.passes.finding.find_linears import Found, Site, find_linears
from magr_fx.passes.graphs.trace import TracedBatch, calibration_mode
from magr_fx.passes.handover.mixed_target import config_for
from magr_fx.passes.handover.quantizable import (
    keep_stacks,
    leave_out_unquantizable,
    leave_out_unrunnable,
)
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.passes.handover.target import ConfigOf, Target, described_in_full
from magr_fx.passes.handover.to_torchao import try_target
from magr_fx.passes.handover.trial import Trial
from magr_fx.passes.inputs.calibration import Batch, notes_of
from magr_fx.passes.offloading.execution import Execution
from magr_fx.passes.offloading.on_device import on_device
from magr_fx.passes.offloading.resident import all_resident
from magr_fx.passes.rewriting.check_model import check_finite, check_group_size
from magr_fx.passes.rewriting.checkpoint import Checkpoint, fingerprint
from magr_fx.passes.rewriting.ledger import Ledger
from magr_fx.passes.rewriting.pipeline import rewrite_sites
from magr_fx.passes.rewriting.request import Request
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.reporting.report import MagRReport


def run(
    model: nn.Module,
    batches: list[Batch],
    request: Request,
    execution: Execution,
    ledger: Ledger,
) -> list[QuantizableWeight]:
    """Trace the model, find its sites, and rewrite them; the model is not quantized yet.

    Args:
        model: unwrapped and checked.
        batches: the calibration.
        request: the caller's options.
        execution: the ranks and the device that do the work.
        ledger: records the rewrites. A run that fails half way also fills its report.

    Returns:
        The weights that the target will quantize; empty if the request quantizes nothing.

    Raises:
        MagRError: see :func:`magr_fx.magr_transform`.
    """
    report = ledger.report
    report.notes += notes_of(batches)
    of_graph = getattr(model, "meta", {}).get("magr_rotations", ())
    report.rotations = list(getattr(model, "magr_rotations", of_graph))
    with calibration_mode(model, execution.device):
        with report.timed("trace"):
            traced = trace_or_read(model, batches, request.tracing)
        found = find_linears(dict.fromkeys(b.trace for b in traced), model, request.filter_fn)
        found, weights = select_quantizable(
            model, batches, traced, found, request, execution, report
        )
        ledger.checkpoint = _checkpoint(model, traced, found, request, execution)
        if execution.device is not None:
            traced = on_device(traced, execution.device)
        rewrite_sites(traced, found, request, execution, ledger)
    return weights


def select_quantizable(
    model: nn.Module,
    batches: list[Batch],
    traced: list[TracedBatch],
    found: Found,
    request: Request,
    execution: Execution,
    report: MagRReport,
) -> tuple[Found, list[QuantizableWeight]]:
    """Try the target, and leave out the weights that it cannot quantize.

    Returns:
        The remaining sites, and the weights that the target will quantize.

    Raises:
        ConfigError: the target fails, or no site is left.
    """
    quantizer = request.quantizer
    weights: list[QuantizableWeight] = []
    if quantizer is not None:
        found, weights = leave_out_unquantizable(
            found, model, quantizer.config_of, filter_fn=request.filter_fn
        )
    for site in found.sites:
        check_group_size(site, request.config_of(site.name).group_size)
    candidates: list[Site | QuantizableWeight] = [*found.sites, *weights]
    if execution.resident is all_resident:  # offloaded and sharded weights are checked before
        check_finite((one.name, one.weight) for one in candidates)
    if request.target is None:
        return found, weights
    with report.timed("quantize"):
        config_of = partial(config_for, request.target)
        try_each_kind(candidates, config_of, execution, gptq=request.makes_tensors)
        if quantizer is not None:
            trial = Trial.of(batches, traced, execution.resident, execution.device)
            config_of = partial(config_for, quantizer)
            found, weights = leave_out_unrunnable(found, weights, model, config_of, trial)
            if isinstance(quantizer, Target) and not quantizer.makes_tensors:
                weights = keep_stacks(weights, model, quantizer.config, trial)
    return found, weights


def try_each_kind(
    candidates: Sequence[Site | QuantizableWeight],
    config_of: ConfigOf,
    execution: Execution,
    *,
    gptq: bool,
) -> None:
    """Quantize a copy of one weight of each shape, dtype and config, to see whether that works."""
    kinds: dict[Any, Site | QuantizableWeight] = {}
    for one in candidates:
        config = described_in_full(config_of(one.name))
        kinds.setdefault((one.weight.shape, one.weight.dtype, config), one)
    with execution.resident([one.weight for one in kinds.values()]):
        # ``weight`` is read only here: an offloaded one changes device when it is loaded.
        for one in kinds.values():
            try_target(one.name, one.weight, config_of(one.name), gptq=gptq)


def _checkpoint(
    model: nn.Module,
    traced: list[TracedBatch],
    found: Found,
    request: Request,
    execution: Execution,
) -> Checkpoint | None:
    """The run's checkpoint, or None; several ranks also check that their runs are the same.

    Raises:
        CheckpointError: the directory belongs to another run, or cannot be used.
        DistributedError: the ranks were called with different arguments.
    """
    folder, ranks, target = request.folders.checkpoint, execution.ranks, request.target
    if folder is None and ranks.world == 1:
        return None
    options = {
        "config": request.config.as_dict(),
        "target": None if target is None else described_in_full(target.config),
        "handling": None if target is None else asdict(target.options),
        "sites": [site.name for site in found.sites],
        "strict": request.strict,
        "devices": execution.names_of_devices(model),
    }
    owned = [*model.named_parameters(), *model.named_buffers()]
    known = fingerprint(traced, owned, options, execution.resident)
    ranks.agree_on(known)
    return None if folder is None else Checkpoint(folder, known, ranks)
