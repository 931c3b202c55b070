"""magr_transform and magr_quantize: the two calls that most users need."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from magr_fx.comparing.compare import Reference
from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.errors import ConfigError, ModelError
from magr_fx.machine.memory import out_of_memory_told
from magr_fx.machine.ranks import Group, distributed_session
from magr_fx.passes.budgeting.budget import SEVERAL, Budget
from magr_fx.passes.entries.plan_bits import planned
from magr_fx.passes.entries.run import run
from magr_fx.passes.finding.find_linears import FilterFn
from magr_fx.passes.graphs.trace import calibration_mode, unwrap
from magr_fx.passes.graphs.unsupported_weights import unsupported_named
from magr_fx.passes.handover.mixed_target import MixedTarget
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.passes.handover.target import Target, describe
from magr_fx.passes.handover.to_pt2e import (
    export_for_pt2e,
    is_pt2e_quantizer,
    quantize_graph,
    still_read,
    try_quantizer,
)
from magr_fx.passes.handover.to_torchao import hand_over
from magr_fx.passes.inputs.calibration import Batch, read_calib
from magr_fx.passes.offloading.execution import Execution, execution_of, is_offloaded_or_sharded
from magr_fx.passes.offloading.offloaded import is_offloaded
from magr_fx.passes.offloading.sharded import is_sharded
from magr_fx.passes.rewriting.check_model import check_model, check_not_frozen
from magr_fx.passes.rewriting.ledger import Ledger
from magr_fx.passes.rewriting.pipeline import (
    for_quantizing,
    resolve_config,
    target_for_rewriting,
)
from magr_fx.passes.rewriting.request import Folders, Request
from magr_fx.passes.tracing.module_state import state_kept
from magr_fx.passes.tracing.trace_batches import Tracing
from magr_fx.reporting.report import MagRReport

logger = logging.getLogger("magr_fx")
Model = TypeVar("Model", bound=nn.Module)


def magr_transform(
    model: Model,
    calib: Any,
    config: MagRConfig | None = None,
    *,
    target: Any = None,
    propagate: bool | None = None,
    holdout: float = 0.1,
    filter_fn: FilterFn | None = None,
    trace: str = "auto",
    calibrate_all_experts: bool = False,
    strict: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    process_group: Group = None,
    spill_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Model:
    """Shrink the largest magnitudes of every weight in place, and hardly change its outputs.

    The outputs are those on ``calib``. For each weight W ``[out, in]`` that a matmul multiplies
    with an input X ``[tokens, in]``, each row w becomes the ŵ that minimises
    ½(ŵ-w)ᵀG(ŵ-w) + alpha·λmax(G)·r·‖ŵ‖∞ with G = XᵀX (Zhang et al., "MagR", NeurIPS 2024, arXiv
    2406.00800, section 3). With groups, ‖ŵ‖∞ is summed over the groups of the row. The paper has
    r = 1; here r is the root mean square of w, so that c·W and d·X give c·Ŵ.

    Args:
        model: any module that runs, compiled or not, or its exported graph. It may be offloaded
            to memory or disk by accelerate, or sharded over ranks (FSDP2, DTensor), and stays so:
            one whole block at a time is then loaded to the device that it would run on.
        calib: an iterable of model inputs, such as a DataLoader, read once. A tensor is the
            first argument, a tuple or list the arguments, a mapping the keyword arguments.
            Batch sizes and lengths may differ. Tokens that ``attention_mask`` (or nn.Transformer's
            ``key_padding_mask``), in any of its forms, marks as padding are left out.
        config: how to solve; None is ``MagRConfig()`` with the target's group size.
        target: the torchao config that will quantize the model: an int weight-only or
            dynamic-activation int weight config. An alpha and a clip are then chosen for every
            row: torchao quantizes a few candidates with this config, and the one with the smallest
            output error is taken. The unchanged weight is one of the candidates. If
            ``config.alpha`` is a number or ``"published"``, the target only sets the group size,
            unless ``propagate`` is True.
        propagate: calibrate each layer on the activations of the model whose earlier layers are
            already quantized, and compensate their error. This needs a target. None does so
            where the target chooses alpha.
        holdout: the share of each activation's tokens, the last ones, that no weight is fitted
            to, unless the target only sets the group size; the report has the output error on
            them as well.
        filter_fn: ``(module, fqn) -> bool``, as in torchao, for the module that owns a weight;
            None takes every weight except those shared with an embedding.
        trace: ``"export"``, one graph for batches of all sizes; ``"make_fx"``, which runs the
            model once more for each batch and follows control flow that depends on values; or
            ``"auto"``, which tries the first and takes the second if torch.export fails.
        calibrate_all_experts: send every token to every expert of transformers' mixture-of-experts
            layers to collect the grams; the layers' outputs do not change.
        strict: raise an error if the weight of a matmul would not be rewritten.
        checkpoint_dir: a directory that gets the weights of each block as soon as it is done, and
            every half minute what the next block needs. If a run is interrupted, the same call
            with the same directory, original model, calibration and options continues it, and
            gives the same bits.
        process_group: the ranks of torch.distributed that share the work; None is the default
            group, where it is initialised. Every rank makes the same call, with the same model
            and all of ``calib``, and ends with the same bits. False is this process alone.
        spill_dir: a directory, on a fast disk, for the activations between blocks, also those of
            a device; None keeps them in memory.
        progress: whether to show progress bars; None shows them on a terminal only.

    Returns:
        ``model`` itself: same Parameter objects, dtypes, devices, training mode and
        ``requires_grad``. The :class:`~magr_fx.MagRReport` is at ``model.magr_report``.

    Raises:
        ConfigError: an option, the target or the filter is wrong, a group size does not divide
            a layer's inputs, or torchao cannot quantize a layer on this machine.
        CalibrationError: ``calib`` is empty, endless, of the wrong type, has only padding, or
            leads to NaN or Inf.
        ModelError: the model has no weight matmul, or its weights are on the meta device,
            quantized already, NaN or Inf.
        TraceError: the model cannot be traced.
        CoverageError: a weight is not rewritten, with ``strict``.
        CheckpointError: ``checkpoint_dir`` belongs to another run, or cannot be used.
        OutOfMemoryError: the host or the device is out of memory.
        DistributedError: another rank failed, does not answer, or was called with different
            arguments. Each of these errors is raised on all ranks.

        The model is unchanged after an error, except for a CalibrationError that says that the
        quantized model failed, a CoverageError that says that a solve failed, a CheckpointError
        of a full disk, an OutOfMemoryError that says so, and a DistributedError. The log then
        names the weights that were rewritten.

    Example:
        >>> import torch
        >>> from magr_fx import magr_transform
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        >>> model = magr_transform(model, [torch.randn(32, 8), torch.randn(5, 8)])
        >>> [site.name for site in model.magr_report.rewritten]
        ['0.weight']
    """
    with out_of_memory_told(lambda: _report(model)), distributed_session(process_group) as ranks:
        config = resolve_config(config, target)
        request = Request(
            config,
            target_for_rewriting(config, target, propagate, holdout),
            Tracing(trace, calibrate_all_experts),
            filter_fn,
            strict,
            Folders(checkpoint_dir, spill_dir),
            progress,
        )
        inner = _checked(model, request)
        if is_offloaded_or_sharded(inner):
            request = request.without_values()
        with execution_of(inner, ranks) as execution:
            ledger, _ = _rewrite(model, read_calib(calib, inner), request, execution)
        logger.info("%s", ledger.report.totals())
    return model


def magr_quantize(
    model: Model,
    calib: Any,
    target: Any,
    config: MagRConfig | None = None,
    *,
    rounding: str = "nearest",
    act_order: bool = True,
    refine: int = 0,
    propagate: bool | None = None,
    holdout: float = 0.1,
    filter_fn: FilterFn | None = None,
    trace: str = "auto",
    calibrate_all_experts: bool = False,
    strict: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    process_group: Group = None,
    spill_dir: str | os.PathLike[str] | None = None,
    evaluate: Any = None,
    progress: bool | None = None,
) -> Model:
    """Run :func:`magr_transform` for ``target``, quantize with torchao, and check the result.

    torchao's ``quantize_`` ignores the weights of transformers' Conv1D (GPT-2) and of fused
    experts. These layers are first replaced by equivalent ones made of nn.Linear (see
    :func:`magr_fx.as_linears`). Experts stay fused where their implementation runs with torchao's
    tensor of the whole stack (int8, "eager"). A weight is skipped, and reported with the reason,
    if torchao cannot quantize it (a slice of a parameter, or a weight in a module that does not run
    with torchao's tensors, such as nn.MultiheadAttention) or if an embedding shares it. A linear or
    an expert that no calibration input reaches is quantized by torchao without being rewritten.

    Args:
        model, calib, config, holdout, filter_fn, trace, calibrate_all_experts, strict,
        checkpoint_dir, spill_dir, process_group, progress: as for :func:`magr_transform`.
        target: the torchao config: int weight-only or dynamic-activation int weight; or an
            ``FqnToConfig`` of several, by the names of weights, modules, or patterns: what it does
            not name is left alone; or a :class:`Budget`, which gives each weight the config that
            is worth most (:func:`magr_fx.plan_bits`). Or one of PT2E's quantizers: the weights
            are then rewritten with one alpha that does not depend on the rounding, and
            ``config.group_size`` must be the group size of the quantizer.
        rounding: ``"nearest"``, by torchao, or ``"gptq"`` (Frantar et al., ICLR 2023) on the
            grids that torchao chooses, for configs with integer codes: IntxWeightOnly,
            Int8WeightOnly, Int8DynamicActivationIntxWeight, Int8DynamicActivationInt8Weight,
            per row and per group. Alpha and clip are then chosen for that rounding.
        act_order: GPTQ rounds the inputs with the largest activations first. This mostly lowers
            the output error, and costs nothing at inference, because the grids do not change.
        refine: the number of passes of coordinate descent on the codes after GPTQ; each pass lowers
            the output error. The paper's † has 30.
        propagate: as for :func:`magr_transform`, but None does so with every torchao config;
            False calibrates every layer on the original model.
        evaluate: batches of inputs, preferably of text that is not in ``calib``. The quantized
            model is compared on them with the original one (:func:`magr_fx.compare`); the report
            has the result as ``comparison``. Until then the hidden states of all their tokens and
            a copy of the head stay in memory, or all outputs if the model predicts no next token.

    Returns:
        ``model`` itself, with every rewritten weight a torchao tensor. With a PT2E quantizer the
        converted ``torch.fx.GraphModule``, which is called like the model; ``model`` itself keeps
        its rewritten weights. Like every graph from PT2E it cannot be pickled, for example by
        ``torch.save``. To save it, export it once more:
        ``torch.export.save(torch.export.export(converted, args, dynamic_shapes=...), file)``.

    Raises:
        HandoverError: torchao left weights unquantized; the message lists them.
        ConfigError, CalibrationError, ModelError, TraceError, CoverageError, CheckpointError,
            DistributedError: as for :func:`magr_transform`.
    """
    with out_of_memory_told(lambda: _report(model)), distributed_session(process_group) as ranks:
        options = QuantizeOptions(rounding, act_order, refine, propagate is not False, holdout)
        by_graph = is_pt2e_quantizer(target)
        if by_graph and (rounding != "nearest" or propagate):
            raise ConfigError(
                'rounding="gptq" and propagate=True need a torchao config as target, because they '
                "quantize weight by weight; a PT2E quantizer takes a whole graph. Leave both out"
            )
        if by_graph and config is not None and config.zero_point == "free":
            raise ConfigError(
                'zero_point="free" does not work with a PT2E quantizer, whose graph holds whole '
                "zero points; leave it out"
            )
        if by_graph and evaluate is not None:
            raise ConfigError(
                "evaluate does not work with a PT2E quantizer, which returns a new graph: keep a "
                "copy of the model, and call magr_fx.compare(original, converted, batches) with it"
            )
        by_budget = isinstance(target, Budget)
        completed_by = SEVERAL if by_budget else None if by_graph else target
        config = resolve_config(config, completed_by, required=not by_graph, several=True)
        if config.alpha == 0 and rounding == "nearest":
            raise ConfigError('alpha=0 shrinks nothing; use it only with rounding="gptq"')
        goal: Target | MixedTarget | None = None
        if not by_graph and not by_budget:
            config, goal = for_quantizing(config, target, options)
        request = Request(
            config,
            goal,
            Tracing(trace, calibrate_all_experts),
            filter_fn,
            strict,
            Folders(checkpoint_dir, spill_dir),
            progress,
            quantize=not by_graph,
        )
        inner = _checked(model, request)
        _refuse_elsewhere(inner)
        batches, execution = read_calib(calib, inner), Execution(ranks)
        if by_graph:
            return _quantize_graph(model, batches, target, request, execution)
        plan = None
        if by_budget:
            target, plan = planned(inner, batches, target, request, holdout, execution)
            config, goal = for_quantizing(config, target, options)
        if isinstance(goal, MixedTarget):
            goal = goal.for_model(inner)
        if goal is None:
            raise RuntimeError("a target that is no graph's has no goal")
        request = replace(request, target=goal)
        before = None if evaluate is None else Reference(inner, evaluate, ranks)
        ledger, weights = _rewrite(model, batches, request, execution)
        ledger.report.bits = plan
        vars(inner).pop("magr_bits", None)  # of an earlier plan
        with ledger.timed("quantize"):
            hand_over(inner, goal.config_of, weights, ledger.tensors)
        done = {name for weight in weights for name in (weight.name, *weight.covers)}
        ledger.report.mark_quantized(done)
        if before is not None:
            ledger.report.comparison = before.against(inner, progress)
        logger.info("%s", ledger.report.totals())
        return model


def quantize_apart(
    model: nn.Module,
    calib: Any,
    request: Request,
    tensors: MutableMapping[str, torch.Tensor],
) -> list[str]:
    """:func:`magr_quantize` for a possibly offloaded model, without torchao's ``quantize_``.

    The caller quantizes the weights. The ranks of the default group, if there is one, share the
    work.

    Args:
        model, calib: as for :func:`magr_quantize`.
        request: the options, with a target that quantizes.
        tensors: if the target makes tensors (GPTQ, free zero points) it receives torchao's tensor
            of each site under the site's name, block by block, and the model does not change.
            Otherwise the model's weights are rewritten.

    Returns:
        The names of all weights that torchao can quantize. The report says why the others that
        ``quantize_`` would take must be left out.

    Raises:
        ConfigError, CalibrationError, ModelError, TraceError, CheckpointError, DistributedError:
            as for :func:`magr_quantize`.
    """
    with out_of_memory_told(lambda: _report(model)), distributed_session() as ranks:
        inner, request = _checked(model, request), request.without_values()
        with execution_of(inner, ranks) as execution:
            batches = read_calib(calib, inner)
            ledger, weights = _rewrite(model, batches, request, execution, tensors)
        logger.info("%s", ledger.report.totals())
    return [place.name for weight in weights for place in weight.places]


def _report(model: object) -> Any:
    """The model's report, or None if it has none yet."""
    return getattr(model, "magr_report", None)


def _checked(model: nn.Module, request: Request) -> nn.Module:
    """The model that was checked; of a compiled model the original module."""
    inner = unwrap(model)
    elsewhere = {"offloaded": is_offloaded(inner), "sharded": is_sharded(inner)}
    check_model(inner, request.filter_fn, **elsewhere)
    check_not_frozen(model)
    return inner


def _refuse_elsewhere(model: nn.Module) -> None:
    if is_offloaded(model):
        raise ModelError(
            "the model is offloaded by accelerate, which cannot offload torchao's tensors: call "
            "magr_transform(model, calib, target=target) and model.save_pretrained(folder), then "
            "load that with from_pretrained(folder, quantization_config=TorchAoConfig(target))"
        )
    if is_sharded(model):
        raise ModelError(
            "the model is sharded (DTensor, FSDP2), and magr_quantize cannot shard torchao's "
            "tensors: call magr_transform(model, calib, target=target), save the gathered weights, "
            "and let quantize_ quantize the loaded model"
        )


def _rewrite(
    model: nn.Module,
    batches: list[Batch],
    request: Request,
    execution: Execution,
    tensors: MutableMapping[str, torch.Tensor] | None = None,
) -> tuple[Ledger, list[QuantizableWeight]]:
    """Rewrite the weights and attach the report; returns the weights that torchao can quantize."""
    quantizer = request.quantizer
    report = MagRReport(request.config, "" if quantizer is None else describe(quantizer.config))
    ledger = Ledger(report, tensors)
    if execution.ranks.rank != 0:
        request = replace(request, progress=False)
    try:
        weights = run(unwrap(model), batches, request, execution, ledger)
    finally:
        if report.sites:  # also after an error
            model.magr_report = report  # type: ignore[assignment]
    return ledger, weights


def _quantize_graph(
    model: Model, batches: list[Batch], quantizer: Any, request: Request, execution: Execution
) -> Model:
    """magr_quantize with PT2E. It exports first, so that a failure leaves the model unchanged."""
    inner = unwrap(model)
    with calibration_mode(inner), state_kept(inner):
        with unsupported_named(inner):
            graph_module, check, inputs = export_for_pt2e(inner, batches)
        try_quantizer(type(inner).__name__, graph_module, check, quantizer, inputs)
    ledger, _ = _rewrite(model, batches, request, execution)
    report = ledger.report
    with report.timed("quantize"), calibration_mode(inner), state_kept(inner):
        converted = quantize_graph(graph_module, check, quantizer, inputs)
    report.target = type(quantizer).__name__
    read = still_read(converted)
    owned = dict(inner.named_parameters())
    parts = {site.name: owned.get(site.name.partition("[")[0]) for site in report.sites}
    report.mark_quantized({n for n, p in parts.items() if p is not None and id(p) not in read})
    logger.info("%s", report.totals())
    converted.meta["magr"] = converted.magr_report = report  # type: ignore[assignment]
    return converted  # type: ignore[return-value]
