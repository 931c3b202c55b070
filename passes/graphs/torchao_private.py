"""Private names of torchao that several files use; all of them import these names from here.

A private name that is used in one file only is in that file. tests/test_private_api.py lists each
of them with what is relied on, and fails if that changes.
"""

from __future__ import annotations

import inspect

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER
from torchao.utils import TorchAOBaseTensor

__all__ = [
    "apply_config",
    "flatten_tensor_state_dict",
    "is_quantized",
    "takes_parameter_names",
]


def apply_config(module: nn.Module, config: AOBaseConfig) -> nn.Module:
    """The module that ``quantize_`` replaces ``module`` with."""
    made: nn.Module = _QUANTIZE_CONFIG_HANDLER[type(config)](module, config)
    return made


def takes_parameter_names(config: AOBaseConfig) -> bool:
    """Whether ``quantize_`` can apply the config to a parameter that is named in FqnToConfig."""
    handler = _QUANTIZE_CONFIG_HANDLER[type(config)]
    return "parameter_name" in inspect.signature(handler).parameters


def is_quantized(tensor: object) -> bool:
    """Whether this is one of torchao's quantized tensors."""
    return isinstance(tensor, TorchAOBaseTensor)
