"""Names of transformers without a promise that they stay, which several files use: all from here.

A private name that one file alone uses is in that file. tests/test_private_api.py lists each of
them, says what is relied on, and fails where that changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import HfQuantizer

__all__ = [
    "HfQuantizer",
    "activated",
    "has_expert_interface",
    "revert_weight_conversion",
    "tied_names",
]

_FUSED = ("_apply_gate", "is_transposed", "has_gate", "has_bias", "has_post_expert_norm")


def has_expert_interface(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` has made the module's class."""
    return all(hasattr(module, name) for name in _FUSED)


def activated(experts: Any, inner: torch.Tensor) -> torch.Tensor:
    """What fused experts make of their first product ``[tokens, 2·inner]``: ``[tokens, inner]``.

    Without a gate both are ``[tokens, inner]``.
    """
    made: torch.Tensor
    made = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return made


def tied_names(model: nn.Module) -> dict[str, str]:
    """Of each weight that shares another's values: its name → the other's name.

    Empty for a model that is not of transformers.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied
