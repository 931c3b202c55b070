"""The private names of transformers that several files use; another release may change them.

A private name that only one file uses is in that file. tests/test_private_api.py lists all of them,
says what the library relies on, and fails if that changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

__all__ = [
    "AutoHfQuantizer",
    "HfQuantizer",
    "activated",
    "has_expert_interface",
    "revert_weight_conversion",
    "tied_names",
]

_FUSED = ("_apply_gate", "is_transposed", "has_gate", "has_bias", "has_post_expert_norm")


def has_expert_interface(module: nn.Module) -> bool:
    """Whether the module's class is decorated with ``use_experts_implementation``."""
    return all(hasattr(module, name) for name in _FUSED)


def activated(experts: Any, inner: torch.Tensor) -> torch.Tensor:
    """The activations of fused experts ``[tokens, inner]``, from their first product.

    That product is ``[tokens, 2·inner]`` with a gate, and ``[tokens, inner]`` without.
    """
    made: torch.Tensor
    made = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return made


def tied_names(model: nn.Module) -> dict[str, str]:
    """The name of each weight that is tied to another one → the name of that other weight.

    Empty for a model that is not from transformers.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied
