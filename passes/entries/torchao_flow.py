"""MagRConfig in torchao's own quantize_: prepare sums grams, convert solves and quantizes.

No graph is traced. A forward pre-hook on each nn.Linear sees the inputs of the original model.
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
# A prepared linear holds its GramHook in this attribute, which is not part of its state_dict.
_HOOK_ATTRIBUTE = "_magr_gram"


class GramHook:
    """A forward pre-hook that adds the inputs X of its nn.Linear to the gram G = XᵀX.

    The inputs themselves are not kept. When the module is copied or pickled, the copy gets a copy
    of the hook.

    Attributes:
        gram: G, ``[in, in]`` float32, on the device of the first input; None before that.
        tokens: the number of tokens in G.
        handle: removes the hook from the module.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.gram: torch.Tensor | None = None
        self.tokens = 0
        self.handle: RemovableHandle = linear.register_forward_pre_hook(self, with_kwargs=True)

    # The sums must not become part of a compiled graph: the hook runs between the graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the input ``[..., in]`` to the gram."""
        if torch.compiler.is_exporting():  # the inputs of an export have no values
            return
        activation = args[0] if args else kwargs["input"]
        size = activation.shape[-1]
        tokens = activation.reshape(-1, size)
        if self.gram is None:
            # Outside of inference mode, a tensor that was made in it cannot be changed in place.
            with torch.inference_mode(False):
                self.gram = torch.zeros(size, size, dtype=torch.float32, device=tokens.device)
        add_to_gram(self.gram, tokens)
        self.tokens += len(tokens)


def prepare_or_convert(module: nn.Module, config: MagRConfig) -> nn.Module:
    """Handle a MagRConfig in torchao's ``quantize_``, for each module that its ``filter_fn`` takes.

    ``step="prepare"`` puts a :class:`GramHook` on the nn.Linear. The forward passes that follow,
    under ``torch.no_grad`` or not, sum its gram G = XᵀX ``[in, in]``. Preparing a linear again
    starts a new gram.

    ``step="convert"`` removes the hook, rewrites the weight ``[out, in]`` as
    :func:`magr_fx.magr_transform` does with ``target=config.base_config, propagate=False,
    holdout=0``, and lets torchao quantize the result with ``base_config``. It rewrites a copy of
    the weight, so that an embedding or another linear that shares the weight keeps its values. A
    linear that no token reached is quantized by ``base_config`` alone, with a warning. A linear
    that is quantized already is left as it is, so that ``convert`` can be called again after an
    error.

    No graph is traced. Therefore only nn.Linear is supported, each linear has its own gram,
    padding tokens count, and no input error is compensated. Prepare before torch.compile: compiled
    code ignores hooks that are added later. The hook causes a graph break, which
    ``fullgraph=True`` does not allow.

    Args:
        module: the nn.Linear.
        config: with a ``step``. The options of the solve are read in the convert step.

    Returns:
        ``module`` after prepare, and the quantized module that torchao returns after convert.

    Raises:
        ConfigError: ``module`` is not an nn.Linear, or is not prepared, or torchao cannot quantize
            it with ``base_config`` on this machine; ``config`` has no step, or an alpha of 0.
        ModelError: the weight is computed from other parameters, quantized, on the meta device,
            or holds NaN or Inf.
        CalibrationError: the inputs hold NaN or Inf.
        ``module`` is unchanged then. The modules before it stay prepared or converted.

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
            'in quantize_ a MagRConfig needs a step: step="prepare" first, and step="convert" with '
            "a base_config after the calibration was run; or call magr_quantize(model, calib, "
            "target)"
        )
    if not isinstance(module, nn.Linear):
        raise ConfigError(
            f"a MagRConfig takes nn.Linear modules, got {type(module).__name__}; give quantize_ a "
            "filter_fn that selects only nn.Linear, or call magr_transform, which finds the "
            "weights of any module"
        )
    if config.step == "prepare":
        _prepare(module)
        return module
    return _convert(module, config)


def _prepare(linear: nn.Linear) -> None:
    if "weight" not in linear._parameters:
        raise ModelError(
            f"the weight of {_name(linear)} is computed from other parameters; make it a parameter "
            "first, for instance with torch.nn.utils.parametrize.remove_parametrizations"
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
    try_target("nn.Linear", weight, base)
    if hook.gram is None or not hook.tokens:
        logger.warning(
            "no calibration token reached %s: %s alone quantizes it. If the model is compiled, "
            "run the prepare step before torch.compile",
            _name(linear),
            type(base).__name__,
        )
    else:
        if not bool(hook.gram.isfinite().all()):
            raise CalibrationError(
                f"the calibration inputs of {_name(linear)} hold NaN or Inf, or overflow float32. "
                'Run step="prepare" again with finite inputs, or leave the layer out with '
                "filter_fn. The linears before it are converted already"
            )
        own = nn.Parameter(weight.clone(), requires_grad=False)
        site = Site(_name(linear), own, linear, "", WeightView.of(own))
        shared = SharedGram([site], gram=hook.gram.to(own.device), tokens=hook.tokens)
        logger.info("%s", _summary(rewrite_alone(shared, solving, target)))
        linear.weight = own
    _remove_hook(linear)
    return apply_config(linear, base)


def _remove_hook(linear: nn.Linear) -> None:
    """Remove the hook and its gram from a linear that has one."""
    hook: GramHook | None = getattr(linear, _HOOK_ATTRIBUTE, None)
    if hook is not None:
        hook.handle.remove()
        delattr(linear, _HOOK_ATTRIBUTE)


def _name(linear: nn.Linear) -> str:
    """A description for messages: torchao does not pass on a module's name."""
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
