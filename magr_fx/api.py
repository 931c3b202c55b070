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
from magr_fx.passes.entries.run import run
from magr_fx.passes.finding.find_linears import FilterFn
from magr_fx.passes.graphs.trace import calibration_mode, unwrap
from magr_fx.passes.graphs.unsupported_weights import unsupported_named
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
from magr_fx.passes.rewriting.pipeline import resolve_config, target_for_rewriting
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
    """Shrink every weight's largest magnitudes in place, leaving its outputs on ``calib`` alone.

    For each weight W ``[out, in]`` that meets an input X ``[tokens, in]`` in a matmul, each row
    w becomes the ŵ that minimises ½(ŵ-w)ᵀG(ŵ-w) + alpha·λmax(G)·r·‖ŵ‖∞ with G = XᵀX (Zhang et
    al., "MagR", NeurIPS 2024, arXiv 2406.00800, section 3), per group where there are groups. The
    paper has r = 1; here r is the root mean square of w, so that c·W and d·X give c·Ŵ.

    Args:
        model: any module that runs, compiled or not, or its exported graph; also one that
            accelerate offloads to memory or disk, or whose weights are sharded over ranks (FSDP2,
            DTensor) and stay so: a block of it is then in memory, as a whole, at a time, on the
            device that it would run on.
        calib: an iterable of model inputs, a DataLoader for instance, read once: a tensor is the
            first argument, a tuple or list the arguments, a mapping the keyword arguments.
            Batch sizes and lengths may differ. What ``attention_mask`` (or nn.Transformer's
            ``key_padding_mask``) marks as padding does not count, in whatever form it comes.
        config: how to solve; None is ``MagRConfig()``, at the target's group size.
        target: the torchao config that will quantize the model: an int weight-only or
            dynamic-activation int weight config. Then every row chooses its own alpha, and a
            clip with it: of a few candidates, each quantized by torchao itself with this config,
            the one with the smallest output error, and torchao alone is one of them. With a
            number for ``config.alpha`` the target only sets the group size.
        propagate: calibrate each layer on what the model computes once the layers before it are
            quantized, and make up for what they lose. None does so where torchao takes part.
        holdout: the share of each activation's tokens, its last ones, that no weight is fitted
            to where torchao takes part: the report has the output error on them as well.
        filter_fn: ``(module, fqn) -> bool``, as in torchao, for the module that owns a weight;
            None takes every weight but those that an embedding shares.
        trace: ``"export"``, one graph for batches of all sizes; ``"make_fx"``, which runs the
            model once more for each batch and follows control flow that depends on values; or
            ``"auto"``, the second where torch.export refuses the model.
        calibrate_all_experts: send every token to every expert of transformers' mixture-of-experts
            layers for the statistics; the layers' outputs stay what they are.
        strict: raise if a weight that meets an input in a matmul would be left as it is.
        checkpoint_dir: a directory to save each block's weights in as soon as it is done, and
            every half minute what the next block needs. A run with the directory of one that was
            cut short, and the same original model, calibration and options, goes on from there, to
            the same bits.
        process_group: the ranks of torch.distributed that share the work; None is the default
            group, where it is initialised. Every rank makes the same call, with the same model
            and all of ``calib``, and ends with the same bits. False is this process alone.
        spill_dir: a directory, on a disk that is fast, to keep the activations between blocks in,
            those on a device too; None keeps them in memory.
        progress: shows progress bars; None shows them on a terminal only.

    Returns:
        ``model`` itself: same Parameter objects, dtypes, devices, training mode and
        ``requires_grad``. The :class:`~magr_fx.MagRReport` is at ``model.magr_report``.

    Raises:
        ConfigError: an option, the target or the filter is wrong, a group size does not divide
            a layer's inputs, or torchao cannot quantize a layer on this machine.
        CalibrationError: ``calib`` is empty, has no end, is of the wrong type, has no token
            that counts, or leads to NaN or Inf.
        ModelError: no weight matmul, or weights on the meta device, quantized, NaN or Inf.
        TraceError: the model cannot be traced.
        CoverageError: ``strict``, and a weight is not rewritten.
        CheckpointError: ``checkpoint_dir`` belongs to another run, or cannot be used.
        OutOfMemoryError: the memory of the host or the device is used up.
        DistributedError: another rank failed, does not answer, or was called otherwise. Any of
            these errors is raised on all ranks.
        Nothing was changed then, but for a CalibrationError that says that a quantized model
        failed, a CoverageError that says that a solve did, a CheckpointError of a full disk, an
        OutOfMemoryError that says so and a DistributedError: the log names what was rewritten.

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
    """:func:`magr_transform` for ``target``, then torchao's ``quantize_`` with it, then proof.

    transformers' Conv1D (GPT-2) and layers of fused experts, whose weights torchao passes by, are
    replaced by the same with nn.Linear (see :func:`magr_fx.as_linears`); experts stay fused where
    torchao's tensor of the whole stack runs as they are implemented (int8, "eager"). A weight that
    torchao still cannot quantize (a slice of a parameter; in a module that its tensors do not run
    in, such as nn.MultiheadAttention), or that an embedding shares, is not rewritten either, and
    reported as skipped with its reason. A linear, or an expert, that no calibration input reaches
    is quantized by torchao alone.

    Args:
        model, calib, config, holdout, filter_fn, trace, calibrate_all_experts, strict,
        checkpoint_dir, spill_dir, process_group, progress: as for :func:`magr_transform`.
        target: the torchao config: int weight-only or dynamic-activation int weight. Or one of
            PT2E's quantizers: then the weights are rewritten with one alpha, without regard to
            the rounding, and ``config.group_size`` has to say what groups the quantizer makes.
        rounding: ``"nearest"``, by torchao, or ``"gptq"`` (Frantar et al., ICLR 2023) on the
            grids that torchao chooses, for configs of whole-number codes: IntxWeightOnly,
            Int8WeightOnly, Int8DynamicActivationIntxWeight, Int8DynamicActivationInt8Weight,
            per row and per group. Alpha and clip are then chosen for that rounding.
        act_order: GPTQ takes the inputs with the largest activations first, which costs nothing
            at inference: the grids stay where they are. It mostly loses less.
        refine: how many passes of coordinate descent on the codes follow GPTQ, each lowering the
            output error; the paper's † is 30.
        propagate: as for :func:`magr_transform`; False calibrates every layer on the original
            model.
        evaluate: batches of inputs, best of text that is not in ``calib``. The model is compared
            on them with what it was before (:func:`magr_fx.compare`); the report has the result as
            ``comparison``. Hidden states of all their tokens and a copy of the head are kept
            meanwhile, and of models that predict no next token all outputs.

    Returns:
        ``model`` itself, with every rewritten weight a torchao tensor. With a PT2E quantizer the
        converted ``torch.fx.GraphModule``, which is called as the model was; ``model`` keeps its
        rewritten weights. Such a graph cannot be pickled, by ``torch.save`` for one, as no graph
        that comes from PT2E can: to save it, export it once more, ``torch.export.save(
        torch.export.export(converted, args, dynamic_shapes=...), file)``.

    Raises:
        HandoverError: torchao left a rewritten weight unquantized; the message lists which.
        ConfigError, CalibrationError, ModelError, TraceError, CoverageError, CheckpointError,
            DistributedError: as for :func:`magr_transform`.
    """
    with out_of_memory_told(lambda: _report(model)), distributed_session(process_group) as ranks:
        options = QuantizeOptions(rounding, act_order, refine, propagate is not False, holdout)
        by_graph = is_pt2e_quantizer(target)
        if by_graph and (rounding != "nearest" or propagate):
            raise ConfigError(
                'rounding="gptq" and propagate=True need a torchao config as target, which can '
                "be asked what it makes of a weight; a PT2E quantizer cannot"
            )
        if by_graph and evaluate is not None:
            raise ConfigError(
                "evaluate compares a model with what it was, and PT2E returns another one: call "
                "magr_fx.compare(original, converted, batches)"
            )
        config = resolve_config(config, None if by_graph else target, required=not by_graph)
        if config.alpha == 0 and rounding == "nearest":
            raise ConfigError('alpha=0 shrinks nothing; with it only rounding="gptq" makes sense')
        request = Request(
            config,
            None if by_graph else Target(target, options),
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
        before = None if evaluate is None else Reference(inner, evaluate, ranks)
        ledger, weights = _rewrite(model, batches, request, execution)
        with ledger.timed("quantize"):
            hand_over(inner, target, weights, ledger.tensors)
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
    """:func:`magr_quantize` of a model that may be offloaded, and is quantized elsewhere.

    The ranks of the default group work together, if there is one.

    Args:
        model, calib: as for :func:`magr_quantize`.
        request: what is asked for, with a target that quantizes.
        tensors: with GPTQ takes torchao's tensor of each site by its name, block by block, and the
            model stays as it is; to the nearest its weights are rewritten.

    Returns:
        All names of the weights that torchao can quantize: of the others that it would take, the
        report says why they may not be.

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
    """The report that the model has by now, if it has one."""
    return getattr(model, "magr_report", None)


def _checked(model: nn.Module, request: Request) -> nn.Module:
    """The model itself, where it is compiled, once it has been looked at."""
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
            "the model is sharded (DTensor, FSDP2), which torchao's tensors are not here: call "
            "magr_transform(model, calib, target=target), save the gathered weights, and let "
            "quantize_ quantize the loaded model"
        )


def _rewrite(
    model: nn.Module,
    batches: list[Batch],
    request: Request,
    execution: Execution,
    tensors: MutableMapping[str, torch.Tensor] | None = None,
) -> tuple[Ledger, list[QuantizableWeight]]:
    """Rewrite the weights, and hang the report on the model; what the target is to quantize."""
    quantizer = request.quantizer
    report = MagRReport(request.config, "" if quantizer is None else describe(quantizer.config))
    ledger = Ledger(report, tensors)
    if execution.ranks.rank != 0:
        request = replace(request, progress=False)
    try:
        weights = run(unwrap(model), batches, request, execution, ledger)
    finally:
        if report.sites:  # also of a run that was cut short
            model.magr_report = report  # type: ignore[assignment]
    return ledger, weights


def _quantize_graph(
    model: Model, batches: list[Batch], quantizer: Any, request: Request, execution: Execution
) -> Model:
    """The way of PT2E: the graph is made first, so that what cannot be exported stays as it was."""
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
