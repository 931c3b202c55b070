"""MagRConfig in torchao's own quantize_: prepare sums grams, convert solves and quantizes.

This sees what module hooks see: nn.Linear, each by itself, on the inputs of the original model.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchao.quantization.transform_module import register_quantize_module_handler

from magr_fx.config import MagRConfig
from magr_fx.errors import CalibrationError, ConfigError, ModelError
from magr_fx.grams.gram import add_to_gram
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.graphs.torchao_private import apply_config, is_quantized
from magr_fx.passes.graphs.unsupported_weights import why_unsupported
from magr_fx.passes.graphs.weight_views import WeightView
from magr_fx.passes.handover.to_torchao import try_target
from magr_fx.passes.rewriting.check_model import check_finite, check_model
from magr_fx.passes.rewriting.pipeline import resolve_config, rewrite_alone, target_for_rewriting
from magr_fx.reporting.report import SiteReport

logger = logging.getLogger("magr_fx")
# Where a prepared linear holds its GramHook: a plain attribute, which no state_dict knows.
_HOOK_ATTRIBUTE = "_magr_gram"


class GramHook:
    """A forward pre-hook that adds what its nn.Linear reads to G = XᵀX; no input is kept.

    It is copied and pickled with its module, and then belongs to the copy.

    Attributes:
        gram: G, ``[in, in]`` float32, on the device of the first input; None before that.
        tokens: how many tokens are in it.
        handle: takes the hook off the module.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.gram: torch.Tensor | None = None
        self.tokens = 0
        self.handle: RemovableHandle = linear.register_forward_pre_hook(self, with_kwargs=True)

    # It runs between the graphs: its sums are no part of the model.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the input ``[..., in]``."""
        if torch.compiler.is_exporting():  # what is traced there has no values
            return
        activation = args[0] if args else kwargs["input"]
        size = activation.shape[-1]
        tokens = activation.reshape(-1, size)
        if self.gram is None:
            # A tensor made in inference mode could not be added to outside of it.
            with torch.inference_mode(False):
                self.gram = torch.zeros(size, size, dtype=torch.float32, device=tokens.device)
        add_to_gram(self.gram, tokens)
        self.tokens += len(tokens)


def prepare_or_convert(module: nn.Module, config: MagRConfig) -> nn.Module:
    """What torchao's ``quantize_`` does to each module that its ``filter_fn`` lets through.

    ``step="prepare"`` puts a :class:`GramHook` on the nn.Linear. The forward passes that follow,
    under ``torch.no_grad`` or not, sum its gram G = XᵀX ``[in, in]``; preparing it once more
    starts anew. ``step="convert"`` takes the hook off, makes of the weight ``[out, in]`` what
    :func:`magr_fx.magr_transform` does with ``target=config.base_config, propagate=False,
    holdout=0``, and lets torchao quantize that with ``base_config``. It works on a copy of the
    weight, so that an embedding or another linear that shares it keeps its values. A linear that
    no token reached is quantized by ``base_config`` alone, with a warning; one that is quantized
    already is left as it is, so that a conversion that stopped can go on.

    Weights are found by their modules and no graph is seen: nn.Linear only, each with a gram of
    its own, padding counted, nothing made up for between layers. Prepare before torch.compile,
    whose code does not look for hooks that come later; the grams are then summed between graphs,
    which ``fullgraph=True`` refuses.

    Args:
        module: the nn.Linear.
        config: with a ``step``; how to solve is read from the one that converts.

    Returns:
        ``module`` when it was prepared, what torchao makes of it when it was converted.

    Raises:
        ConfigError: ``module`` is no nn.Linear, or not prepared, or torchao cannot quantize it
            with ``base_config`` on this machine; ``config`` has no step, or an alpha of 0.
        ModelError: the weight cannot be worked with (computed from others, quantized, meta, NaN).
        CalibrationError: the inputs held NaN or Inf.
        The module is as it was then; those before it in the model are prepared, or converted.

    Example:
        >>> import torch
        >>> from torchao.quantization import IntxWeightOnlyConfig, quantize_
        >>> from magr_fx import MagRConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        >>> quantize_(model, MagRConfig(step="prepare"))
        >>> outputs = model(torch.randn(32, 8))
        >>> target = IntxWeightOnlyConfig(weight_dtype=torch.int3)
        >>> quantize_(model, MagRConfig(step="convert", base_config=target))
        >>> type(model[0].weight).__name__
        'IntxUnpackedToInt8Tensor'
    """
    if config.step is None:
        raise ConfigError(
            'in quantize_ a MagRConfig needs a step: step="prepare", then the calibration is run, '
            'then step="convert" with a base_config; or call magr_quantize(model, calib, target)'
        )
    if not isinstance(module, nn.Linear):
        raise ConfigError(
            f"a MagRConfig takes nn.Linear modules, got {type(module).__name__}; give quantize_ a "
            "filter_fn that lets no others through, or call magr_transform, which finds weights "
            "in any module"
        )
    if config.step == "prepare":
        _prepare(module)
        return module
    return _convert(module, config)


def _prepare(linear: nn.Linear) -> None:
    if "weight" not in linear._parameters:
        raise ModelError(
            f"the weight of {_name(linear)} is computed from other parameters; fold them in first, "
            "with torch.nn.utils.parametrize.remove_parametrizations for instance"
        )
    check_model(linear)
    reason = why_unsupported(linear.weight)
    if reason is not None:
        raise ModelError(
            f"the weight of {_name(linear)} {reason}; leave it out with quantize_'s filter_fn"
        )
    check_finite([(_name(linear), linear.weight)])
    _remove_hook(linear)
    setattr(linear, _HOOK_ATTRIBUTE, GramHook(linear))


@torch.no_grad()
def _convert(linear: nn.Linear, config: MagRConfig) -> nn.Module:
    solving, base = config.without_step(), config.base_config
    solving = resolve_config(solving, base, required=True)
    target = target_for_rewriting(solving, base, propagate=False, holdout=0.0)
    if is_quantized(linear.weight):
        return linear
    hook: GramHook | None = getattr(linear, _HOOK_ATTRIBUTE, None)
    if hook is None:
        raise ConfigError(
            f'{_name(linear)} is not prepared: run quantize_(model, MagRConfig(step="prepare")) '
            'and the calibration before step="convert", both steps with the same filter_fn'
        )
    weight = linear.weight.detach()
    try_target([("nn.Linear", weight)], base)
    if hook.gram is None or not hook.tokens:
        logger.warning(
            "no calibration token reached %s: %s alone quantizes it. If the model is compiled, "
            "prepare it before torch.compile",
            _name(linear),
            type(base).__name__,
        )
    else:
        if not bool(hook.gram.isfinite().all()):
            raise CalibrationError(
                f"the calibration inputs of {_name(linear)} hold NaN or Inf, or overflow float32. "
                'Run step="prepare" again with finite ones, or leave the layer out with filter_fn; '
                "linears before it are converted already"
            )
        own = nn.Parameter(weight.clone(), requires_grad=False)
        site = Site(_name(linear), own, linear, "", WeightView.of(own))
        shared = SharedGram([site], gram=hook.gram.to(own.device), tokens=hook.tokens)
        logger.info("%s", _summary(rewrite_alone(shared, solving, target)))
        linear.weight = own
    _remove_hook(linear)
    return apply_config(linear, base)


def _remove_hook(linear: nn.Linear) -> None:
    """Take the hook off a linear that has one, and its gram with it."""
    hook: GramHook | None = getattr(linear, _HOOK_ATTRIBUTE, None)
    if hook is not None:
        hook.handle.remove()
        delattr(linear, _HOOK_ATTRIBUTE)


def _name(linear: nn.Linear) -> str:
    """torchao does not tell a module's name."""
    return f"nn.Linear {(linear.out_features, linear.in_features)}"


def _summary(site: SiteReport) -> str:
    if site.outcome != "rewritten":
        return f"{site.name}: quantized by torchao alone"
    line = f"{site.name}: {site.tokens} tokens, output error {site.output_error:.2%}"
    if site.quantization is None:
        return line
    errors = site.quantization
    return f"{line}, quantized {errors.error:.2%} (torchao alone {errors.error_alone:.2%})"


register_quantize_module_handler(MagRConfig)(prepare_or_convert)
