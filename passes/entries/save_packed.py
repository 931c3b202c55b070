"""save_packed: a quantized model as a directory whose size is that of its bits."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from magr_fx.errors import ModelError
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.graphs.trace import unwrap
from magr_fx.passes.handover.to_compressed_tensors import (
    check_installed,
    in_groups,
    layout_of,
    linears_besides,
    packed,
    quantization_config,
)
from magr_fx.passes.known_layers.transformers_private import revert_weight_conversion, tied_names
from magr_fx.passes.offloading.execution import is_offloaded_or_sharded


def save_packed(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a quantized model in the format "pack-quantized" of compressed-tensors.

    A weight takes its b bits, scales, and zero points of b bits; torchao's own tensors, and their
    files, take a byte for each weight whatever the bits. The codes, scales and zero points are
    those of the model, bit for bit. transformers loads the directory with ``from_pretrained``;
    which serving engine runs it depends on the bits (README, "Packed files").

    The weights are those of ``IntxWeightOnlyConfig`` (1 to 8 bits, rows or groups, mixed as you
    like) and ``Int8WeightOnlyConfig``, in nn.Linear. Zero points have to be whole numbers:
    quantize with ``MagRConfig(zero_point="whole")``. Other parameters are saved as they are.

    Args:
        model: a model of transformers, quantized by :func:`magr_fx.magr_quantize` or by torchao.
        folder: where to write; made if it does not exist. Save the tokenizer beside it yourself.

    Raises:
        ConfigError: compressed-tensors is not installed; the message has the command.
        ModelError: the model is not of transformers, not quantized, offloaded or sharded, or the
            format cannot hold one of its weights; nothing was written.
        OSError: the disk is full, or the folder may not be written.

    Example:
        ::

            target = IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerGroup(64))
            model = magr_quantize(model, calib, target, MagRConfig(zero_point="whole"))
            save_packed(model, "packed")
            model = AutoModelForCausalLM.from_pretrained("packed")
    """
    check_installed()
    inner: Any = unwrap(model)
    quantized = _quantized(inner)
    layouts = in_groups(
        {name: layout_of(f"{name}.weight", weight) for name, weight in quantized.items()},
        {name: weight.shape[1] for name, weight in quantized.items()},
    )
    ignored = linears_besides(inner, layouts)
    state: dict[str, Tensor] = {}
    tied = {name for name, value in tied_names(inner).items() if _is_same(inner, name, value)}
    for name, value in inner.state_dict().items():
        module = name.removesuffix(".weight")
        if module in layouts and name.endswith(".weight"):
            parts = packed(quantized[module], layouts[module])
            state |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        elif not is_quantized(value) and name not in tied:  # of two names transformers wants one
            state[name] = value
    config = copy.deepcopy(inner.config)
    config.quantization_config = quantization_config(layouts, ignored)
    config.architectures = [type(inner).__name__]
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(revert_weight_conversion(inner, state), folder)
    config.save_pretrained(folder)
    generation: Any = getattr(inner, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def check_saveable(model: nn.Module) -> None:
    """Raise unless this is a quantized model that transformers could load, all of it in memory.

    Its parameters have to be those of a new model of its class and configuration.

    Raises:
        ModelError: as said.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers, which could load the directory: "
            "save its state_dict"
        )
    if is_offloaded_or_sharded(model):
        raise ModelError("the model is offloaded or sharded: save it while it is in memory")
    if not any(is_quantized(parameter) for parameter in model.parameters()):
        raise ModelError("no weight is quantized: call magr_quantize or torchao's quantize_ first")
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    known = {name: _kind(module, key) for module, key, name in _parameters(fresh)}
    for module, key, name in _parameters(model):
        own = _kind(module, key)
        if known.get(name) != own:
            what = "parameter" if name not in known else "parameter of that shape and module"
            raise ModelError(
                f"{name} {own.shape} is no {what} of {type(model).__name__} itself, so "
                "transformers could not load it. magr_quantize and as_linears make linears of "
                "experts and of Conv1D: leave these out with filter_fn, or save the state_dict"
            )


class _Kind(NamedTuple):
    """What transformers has to find again to load a parameter."""

    shape: tuple[int, ...]
    of_linear: bool


def _kind(module: nn.Module, key: str) -> _Kind:
    return _Kind(tuple(getattr(module, key).shape), isinstance(module, nn.Linear))


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every parameter, as a module, an attribute and the full name, tied ones by each name."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, _ in module.named_parameters(recurse=False):
            yield module, key, f"{path}.{key}" if path else key


def quantized_linears(model: nn.Module) -> dict[str, Tensor]:
    """The quantized weights of linears, by the names of their modules; shared ones by each name."""
    return {
        name: module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and is_quantized(module.weight)
    }


def _is_same(model: nn.Module, name: str, other: str) -> bool:
    return model.get_parameter(name) is model.get_parameter(other)


def _quantized(model: nn.Module) -> dict[str, Tensor]:
    """The quantized weights, by the names of their modules.

    Raises:
        ModelError: they are not those of linears of a model of transformers.
    """
    check_saveable(model)
    found = quantized_linears(model)
    of_linears = {id(weight) for weight in found.values()}
    for name, parameter in model.named_parameters():
        if is_quantized(parameter) and id(parameter) not in of_linears:
            raise ModelError(
                f"{name} is quantized and no linear's weight, which the format cannot hold: leave "
                "it out with filter_fn"
            )
    return found
