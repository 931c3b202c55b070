"""magr_transform and magr_quantize: the two calls that most users need."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from torch import nn

from magr_fx.config import Handling, MagRConfig
from magr_fx.errors import ConfigError
from magr_fx.passes.calibration import read_calib
from magr_fx.passes.check_model import check_group_size, check_model
from magr_fx.passes.find_linears import FilterFn, check_filter, find_linears
from magr_fx.passes.pipeline import resolve_config, rewrite_sites, target_for_rewriting
from magr_fx.passes.quantizable import (
    Quantizable,
    leave_out_unquantizable,
    leave_out_unrunnable,
)
from magr_fx.passes.quantized_weights import Target
from magr_fx.passes.read_exported import trace_or_read
from magr_fx.passes.to_torchao import describe, hand_over, try_target
from magr_fx.passes.trace import calibration_mode, unwrap
from magr_fx.report import MagRReport

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
    progress: bool | None = None,
) -> Model:
    """Shrink every weight's largest magnitudes in place, leaving its outputs on ``calib`` alone.

    For each weight W ``[out, in]`` that meets an input X ``[tokens, in]`` in a matmul, each row
    w becomes the ŵ that minimises ½(ŵ-w)ᵀG(ŵ-w) + alpha·λmax(G)·‖ŵ‖∞ with G = XᵀX (Zhang et
    al., "MagR", NeurIPS 2024, arXiv 2406.00800, section 3), per group where there are groups.

    Args:
        model: any module that torch.export can trace, compiled or not, or its exported graph.
        calib: an iterable of model inputs, a DataLoader for instance, read once: a tensor is the
            first argument, a tuple or list the arguments, a mapping the keyword arguments.
            Batch sizes and lengths may differ. What ``attention_mask`` marks as padding does
            not count.
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
        progress: shows progress bars; None shows them on a terminal only.

    Returns:
        ``model`` itself: same Parameter objects, dtypes, devices, training mode and
        ``requires_grad``. The :class:`~magr_fx.MagRReport` is at ``model.magr_report``.

    Raises:
        ConfigError: an option, the target or the filter is wrong, a group size does not divide
            a layer's inputs, or torchao cannot quantize a layer on this machine.
        CalibrationError: ``calib`` is empty, of the wrong type, or leads to NaN or Inf.
        ModelError: no weight matmul, or weights on the meta device, quantized, NaN or Inf.
        TraceError: torch.export refused the model.
        Nothing was changed then, but for a CalibrationError that says that a quantized model
        failed: the log then names the weights that were rewritten before.

    Example:
        >>> import torch
        >>> from magr_fx import magr_transform
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        >>> model = magr_transform(model, [torch.randn(32, 8), torch.randn(5, 8)])
        >>> [site.name for site in model.magr_report.rewritten]
        ['0.weight']
    """
    config = resolve_config(config, target)
    taking_part = target_for_rewriting(config, target, propagate, holdout)
    _run(
        model,
        calib,
        config,
        taking_part,
        filter_fn=filter_fn,
        progress=progress,
        quantize=False,
    )
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
    propagate: bool | None = True,
    holdout: float = 0.1,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> Model:
    """:func:`magr_transform` for ``target``, then torchao's ``quantize_`` with it, then proof.

    A weight that torchao cannot quantize (stored transposed, or as a slice of a parameter; in a
    module that its tensors do not run in, such as nn.MultiheadAttention), or that an embedding
    shares, is not rewritten either, and reported as skipped with its reason. A linear that no
    calibration input reaches is quantized by torchao alone.

    Args:
        model, calib, config, holdout, filter_fn, progress: as for :func:`magr_transform`.
        target: the torchao config: int weight-only or dynamic-activation int weight.
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

    Returns:
        ``model`` itself, with every rewritten weight a torchao tensor.

    Raises:
        HandoverError: torchao left a rewritten weight unquantized; the message lists which.
        ConfigError, CalibrationError, ModelError, TraceError: as for :func:`magr_transform`.
    """
    handling = Handling(rounding, act_order, refine, propagate is None or propagate, holdout)
    config = resolve_config(config, target, required=True)
    if config.alpha == 0 and rounding == "nearest":
        raise ConfigError('alpha=0 shrinks nothing; with it only rounding="gptq" makes sense')
    _run(
        model,
        calib,
        config,
        Target(target, handling),
        filter_fn=filter_fn,
        progress=progress,
        quantize=True,
    )
    return model


def _run(
    model: nn.Module,
    calib: Any,
    config: MagRConfig,
    target: Target | None,
    *,
    filter_fn: FilterFn | None,
    progress: bool | None,
    quantize: bool,
) -> None:
    check_filter(filter_fn)
    inner = unwrap(model)
    check_model(inner)
    quantizer = target if quantize else None
    report = MagRReport(config, "" if quantizer is None else describe(quantizer.config))
    batches = read_calib(calib, inner)
    weights: list[Quantizable] = []
    with calibration_mode(inner):
        with report.timed("trace"):
            traced = trace_or_read(inner, batches)
        found = find_linears(dict.fromkeys(b.trace for b in traced), inner, filter_fn)
        if quantizer is not None:
            found, weights = leave_out_unquantizable(
                found, inner, quantizer.config, group_size=config.group_size, filter_fn=filter_fn
            )
        check_group_size(found.sites, config.group_size)
        if target is not None:
            with report.timed("quantize"):
                matrices = [(site.name, site.weight) for site in found.sites]
                matrices += [(weight.name, weight.parameter) for weight in weights]
                try_target(matrices, target.config, gptq=target.handling.rounding == "gptq")
                if quantizer is not None:
                    found, weights = leave_out_unrunnable(
                        found, weights, inner, quantizer.config, traced=traced, batches=batches
                    )
        try:
            tensors = rewrite_sites(
                traced,
                found,
                config,
                report,
                target=target,
                progress=progress,
            )
        finally:
            if report.sites:  # also of a run that was cut short
                model.magr_report = report  # type: ignore[assignment]
    if quantizer is not None:
        with report.timed("quantize"):
            hand_over(inner, quantizer.config, weights, tensors)
        report.mark_quantized({weight.name for weight in weights})
    logger.info("%s", report.totals())
