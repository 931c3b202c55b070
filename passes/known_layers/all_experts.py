"""transformers' mixture-of-experts layers: send every token to every expert during calibration.

The weights of such a layer are stacks, ``[experts, out, in]`` or ``[experts, in, out]``. Its
forward is one of several functions that transformers keeps in a table. This file adds one to that
table. For layers that do not use the table, ``dense_layers`` replaces the forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from magr_fx.errors import ConfigError
from magr_fx.passes.known_layers.dense_layers import dense_attributes, routing
from magr_fx.passes.known_layers.transformers_private import activated, has_expert_interface

_NAME = "magr_fx_all_experts"
# An attribute of configs. The property without "_internal" would also set it in sub-configs.
_IMPLEMENTATION = "_experts_implementation_internal"


def is_experts(module: nn.Module) -> bool:
    """Whether the module is fused experts whose forward transformers looks up in its table."""
    fused = isinstance(getattr(module, "down_proj", None), nn.Parameter)
    return fused and has_expert_interface(module)


@contextlib.contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Within this context every token enters every expert. The model's outputs do not change.

    An expert that a token is not routed to has weight 0 in the sum.

    Raises:
        ConfigError: the model has no layer whose forward can be replaced so.
    """
    configs = {id(m.config): m.config for m in model.modules() if is_experts(m)}
    others = list(dense_attributes(model))
    if not configs and not others:
        raise ConfigError(
            f"calibrate_all_experts=True, but {type(model).__name__} has no experts whose forward "
            "can be replaced, such as transformers' fused experts; leave calibrate_all_experts out"
        )
    with contextlib.ExitStack() as restored:
        ALL_EXPERTS_FUNCTIONS[_NAME] = dense_forward
        restored.callback(ALL_EXPERTS_FUNCTIONS.__delitem__, _NAME)
        for config in configs.values():
            restored.callback(setattr, config, _IMPLEMENTATION, getattr(config, _IMPLEMENTATION))
            setattr(config, _IMPLEMENTATION, _NAME)
        for module, name, value in others:
            if name in vars(module):
                restored.callback(setattr, module, name, vars(module)[name])
            else:
                restored.callback(delattr, module, name)
            setattr(module, name, value)
        yield


def dense_forward(
    self: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' forward ``[tokens, hidden]``, in which every token enters every expert.

    Args:
        self: the experts.
        hidden: ``[tokens, hidden]``.
        top_k_index: ``[tokens, k]``, int64: the experts of each token.
        top_k_weights: ``[tokens, k]``: their routing weights.
    """
    share = routing(self.num_experts, hidden, top_k_index, top_k_weights)
    result = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        result = result + one_expert(self, expert, hidden) * share[:, expert, None]
    return result


def one_expert(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """The outputs of one expert for tokens ``[tokens, hidden]``, in the same shape."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _linear(experts, first, expert, hidden)
    outer = _linear(experts, "down_proj", expert, activated(experts, inner))
    return experts.post_expert_norm(outer) if experts.has_post_expert_norm else outer


def _linear(experts: Any, name: str, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return functional.linear(tokens, weight.T if experts.is_transposed else weight, bias)
