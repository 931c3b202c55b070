"""save_quantized: a quantized model as a directory that transformers loads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from transformers import TorchAoConfig

from magr_fx.errors import ConfigError, ModelError, brief
from magr_fx.passes.entries.save_packed import check_saveable, quantized_linears
from magr_fx.passes.graphs.torchao_private import flatten_tensor_state_dict, is_quantized
from magr_fx.passes.graphs.trace import unwrap
from magr_fx.passes.handover.to_compressed_tensors import linears_besides
from magr_fx.passes.known_layers.transformers_private import AutoHfQuantizer


def save_quantized(model: nn.Module, folder: str | os.PathLike[str], target: AOBaseConfig) -> None:
    """Save a model with torchao's tensors as they are: codes, scales and zero points, bit for bit.

    transformers' own ``save_pretrained`` writes the files, in torchao's safetensors format, with a
    ``TorchAoConfig`` in ``config.json``; ``from_pretrained(folder)`` loads them. A weight takes a
    byte whatever its bits: :func:`magr_fx.save_packed` writes smaller files.

    Args:
        model: a model of transformers, quantized by :func:`magr_fx.magr_quantize` or by torchao.
        folder: where to write. Save the tokenizer beside it yourself.
        target: what the model was quantized with; ``config.json`` names it.

    Raises:
        ConfigError: ``target`` is no torchao config.
        ModelError: the model is not of transformers, not quantized, offloaded or sharded; or it
            has weights that its class does not have, such as an expert's that became a linear
            (see :func:`magr_fx.as_linears`); or torchao's format cannot hold one of its weights.
            Nothing was written.
        OSError: the disk is full, or the folder may not be written.

    Example:
        ::

            model = magr_quantize(model, calib, target, rounding="gptq")
            save_quantized(model, "quantized", target)
            model = AutoModelForCausalLM.from_pretrained("quantized")
    """
    if not isinstance(target, AOBaseConfig):
        raise ConfigError(
            f"target must be the torchao config that the model was quantized with, got {target!r}"
        )
    inner: Any = unwrap(model)
    check_saveable(inner)
    for name, parameter in inner.named_parameters():
        if not is_quantized(parameter):
            continue
        try:
            flatten_tensor_state_dict({name: parameter.detach()})
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise ModelError(
                f"{name} is a {type(parameter.data).__name__}, which torchao's safetensors format "
                f"cannot hold ({brief(error)}): save the state_dict with torch.save"
            ) from error
    left = linears_besides(inner, quantized_linears(inner))
    config = TorchAoConfig(target, modules_to_not_convert=left or None)
    with _described(inner, config):
        inner.save_pretrained(folder)


@contextlib.contextmanager
def _described(model: Any, config: TorchAoConfig) -> Iterator[None]:
    """The model as transformers has it after quantizing it with ``config``."""
    own, described = vars(model).get("hf_quantizer"), dict(vars(model.config))
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.config.quantization_config = config
    try:
        yield
    finally:
        vars(model.config).clear()  # save_pretrained adds names of its own
        vars(model.config).update(described)
        if own is None:
            vars(model).pop("hf_quantizer")
        else:
            model.hf_quantizer = own
