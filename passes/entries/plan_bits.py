"""plan_bits: which weights get how many bits, within a budget."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.errors import ConfigError, ModelError
from magr_fx.machine.memory import out_of_memory_told
from magr_fx.machine.ranks import Group, distributed_session
from magr_fx.passes.budgeting.budget import SEVERAL, Budget
from magr_fx.passes.budgeting.make_plan import accounts_of, key_for, make_plan
from magr_fx.passes.budgeting.measure import Errors, costs_of, measure
from magr_fx.passes.budgeting.output_gradients import output_gradients
from magr_fx.passes.budgeting.stored_bits import code_bits
from magr_fx.passes.budgeting.units import Unit, check_pins, choices_of, units_of
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.entries.run import select_quantizable, try_each_kind
from magr_fx.passes.finding.find_linears import UNREACHED, FilterFn, Found, find_linears
from magr_fx.passes.graphs.trace import TracedBatch, calibration_mode, unwrap
from magr_fx.passes.handover.quantizable import fits
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.passes.inputs.calibration import Batch, read_calib
from magr_fx.passes.offloading.execution import Execution, is_offloaded_or_sharded
from magr_fx.passes.rewriting.check_model import check_model, check_not_frozen
from magr_fx.passes.rewriting.pipeline import for_quantizing, resolve_config
from magr_fx.passes.rewriting.request import Folders, Request
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing
from magr_fx.reporting.bit_plan import BitPlan
from magr_fx.reporting.report import MagRReport

logger = logging.getLogger("magr_fx")


def plan_bits(
    model: nn.Module,
    calib: Any,
    budget: Budget,
    config: MagRConfig | None = None,
    *,
    holdout: float = 0.1,
    filter_fn: FilterFn | None = None,
    trace: str = "auto",
    calibrate_all_experts: bool = False,
    process_group: Group = None,
    spill_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> FqnToConfig:
    """Choose a torchao config for every weight, so that all stay within a budget.

    Each choice of each weight is tried on a sample of its rows, rounded to nearest, on the inputs
    of the original model. Its output error becomes a cost by the gradients of the model's outputs,
    from one backward pass on some batches: for logits, the divergence KL(original ‖ quantized) in
    nats for each output, to second order; for other outputs half of their squared relative error.
    Costs alone differ more between weights than in a model that is quantized as a whole, so their
    logarithms are drawn half way to the mean of all weights with the same config.
    The choices with the least sum of costs within the budget are found by an exact solver.

    Args:
        model, calib, config, holdout, filter_fn, trace, calibrate_all_experts, process_group,
        spill_dir, progress: as for :func:`magr_fx.magr_quantize`.
        budget: what the weights may take, and the configs to choose from.

    Returns:
        torchao's ``FqnToConfig`` with a config for each weight by its name, for
        :func:`magr_fx.magr_quantize`; also for torchao's ``quantize_`` or transformers'
        ``TorchAoConfig``, unless it names experts or a Conv1D (GPT-2), which have to become linears
        first (:func:`magr_fx.as_linears`).
        The model is as it was, but for ``model.magr_bits``: a :class:`BitPlan`, how the budget was
        spent.

    Raises:
        ConfigError: the budget is smaller than the smallest choices, a choice fits no weight or
            is not one whose codes can be set, or scipy is not installed.
        ModelError: the model is offloaded or sharded, or not fit for quantizing.
        CalibrationError, TraceError, DistributedError: as for :func:`magr_fx.magr_quantize`.

    Example:
        ::

            target = plan_bits(model, calib, Budget(bits=2.5))
            model = magr_quantize(model, calib, target, rounding="gptq")
    """
    with out_of_memory_told(lambda: None), distributed_session(process_group) as ranks:
        request = Request(
            config or MagRConfig(),
            tracing=Tracing(trace, calibrate_all_experts),
            filter_fn=filter_fn,
            folders=Folders(spill=spill_dir),
            progress=progress,
        )
        inner = unwrap(model)
        check_for_planning(inner, filter_fn)
        check_not_frozen(model)
        target, plan = planned(
            inner, read_calib(calib, inner), budget, request, holdout, Execution(ranks)
        )
    inner.magr_bits = plan  # type: ignore[assignment]
    logger.info("%s", plan.totals())
    return target


def check_for_planning(model: nn.Module, filter_fn: FilterFn | None) -> None:
    """Raise :class:`ModelError` unless the model can be planned for."""
    if is_offloaded_or_sharded(model):
        raise ModelError(
            "the model is offloaded or sharded, and a Budget needs it in memory as a whole: give "
            "one config for all weights, or an FqnToConfig"
        )
    check_model(model, filter_fn)


def planned(
    model: nn.Module,
    batches: list[Batch],
    budget: Budget,
    request: Request,
    holdout: float,
    execution: Execution,
) -> tuple[FqnToConfig, BitPlan]:
    """:func:`plan_bits` for a model that was checked, with the report on how it was spent."""
    started = perf_counter()
    found = tried(model, batches, budget, request, holdout, execution)
    costs = costs_of(found.errors, found.gradients)
    accounts = accounts_of(model, found.weights)
    return make_plan(found.units, costs, accounts, budget, found.config, started)


class Tried(NamedTuple):
    """What is known of the choices of each weight.

    Attributes:
        weights: all that can be quantized.
        units: those that have one choice together, with what they can choose from.
        errors: of each choice, by the names of the weights.
        gradients: of the outputs, likewise.
        config: how the weights will be solved.
    """

    weights: list[QuantizableWeight]
    units: list[Unit]
    errors: dict[str, Errors]
    gradients: dict[str, Tensor]
    config: MagRConfig


def tried(
    model: nn.Module,
    batches: list[Batch],
    budget: Budget,
    request: Request,
    holdout: float,
    execution: Execution,
) -> Tried:
    """Try every choice of every weight, and run the model backwards."""
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget must be a Budget, got {budget!r}")
    for choice in (*budget.choices, *(c for c in budget.pin.values() if c is not None)):
        code_bits(choice)
    options = QuantizeOptions(propagate=False, holdout=holdout)
    config = resolve_config(request.config, SEVERAL, several=True)
    with calibration_mode(model, execution.device):
        traced = trace_or_read(model, batches, request.tracing)
        found = find_linears(dict.fromkeys(b.trace for b in traced), model, request.filter_fn)
        trying = replace(request, config=config, quantize=True)
        found, weights = _quantizable(model, batches, traced, found, budget, trying, execution)
        run = CalibrationRun(
            traced,
            found.sites,
            holdout=holdout,
            resident=execution.resident,
            ranks=execution.ranks,
            spill=request.folders.spill,
        )
        sharing = [[site.name for site in shared.sites] for shared in run.grams]
        units = units_of(weights, sharing, budget)
        errors = measure(
            run,
            {weight.name: unit.choices for unit in units for weight in unit.weights},
            config,
            options,
            execution.ranks,
            progress=request.progress,
        )
        gradients = output_gradients(model, batches, found.sites, execution.ranks)
    return Tried(weights, units, errors, gradients, config)


def _quantizable(
    model: nn.Module,
    batches: list[Batch],
    traced: list[TracedBatch],
    found: Found,
    budget: Budget,
    request: Request,
    execution: Execution,
) -> tuple[Found, list[QuantizableWeight]]:
    """The sites and weights that can be quantized; every choice is tried on one of each kind.

    Raises:
        ConfigError: torchao cannot quantize a weight with one of its choices, or no site is left.
    """
    first = OrderedDict[str, AOBaseConfig]()
    shapes = {site.name: site.shape for site in found.sites}
    names = [*shapes, *(r.name for r in found.rejections if r.reason == UNREACHED)]
    check_pins(model, names, budget)
    for name in names:
        choices = choices_of(name, budget)
        if choices:
            fitting = [c for c in choices if name not in shapes or fits(shapes[name][1], c)]
            first[key_for(name)] = (fitting or choices)[0]
    if not first:
        raise ConfigError("pin leaves no weight to quantize: pin fewer to None")
    goal = for_quantizing(request.config, FqnToConfig(first), QuantizeOptions())[1]
    found, weights = select_quantizable(
        model,
        batches,
        traced,
        found,
        replace(request, target=goal),
        execution,
        MagRReport(request.config),
    )
    for at in range(1, max(len(choices_of(weight.name, budget)) for weight in weights)):
        others = [w for w in weights if len(choices_of(w.name, budget)) > at]
        chosen = {w.name: choices_of(w.name, budget)[at] for w in others}
        fitting = [w for w in others if fits(w.weight.shape[1], chosen[w.name])]
        try_each_kind(fitting, chosen.__getitem__, execution, gptq=True)
    return found, weights
