"""The expert layers of Llama 4 and DBRX, computed with every token at every expert.

Each function here replaces the forward of a module of transformers. The output of the layer does
not change, because an expert that a token is not routed to has weight 0 in the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn


def dense_attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The attributes to set so that these layers are dense: (module, attribute, value)."""
    for module in model.modules():
        kind = type(module).__name__
        if not type(module).__module__.startswith("transformers.models."):
            continue
        if kind == "Llama4TextMoe":
            yield module, "forward", MethodType(_llama4, module)
        elif kind == "DbrxExperts":
            yield module, "forward", MethodType(_dbrx, module)


def routing(
    count: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routing as a dense matrix ``[tokens, experts]``, with 0 where a token is not routed.

    Args:
        count: the number of experts.
        hidden: ``[tokens, hidden]``; its dtype is that of the result.
        top_k_index: ``[tokens, k]``, int64: the experts of each token.
        top_k_weights: ``[tokens, k]``: their routing weights.
    """
    share = hidden.new_zeros(len(hidden), count)
    return share.scatter_add(1, top_k_index, top_k_weights.to(hidden.dtype))


def _llama4(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense forward of Llama4TextMoe, which applies the routing weights to an expert's inputs.

    A token that is not routed to an expert enters it with the weight that it would have there.
    """
    hidden = hidden.reshape(-1, self.hidden_dim)
    routed, logits = self.router(hidden)  # both [tokens, experts]
    scores = logits.float().sigmoid().to(routed.dtype)
    inputs = hidden.repeat(self.num_experts, 1) * scores.T.reshape(-1, 1)
    outputs = self.experts(inputs) * (routed != 0).T.reshape(-1, 1)  # [experts · tokens, hidden]
    own: torch.Tensor = outputs.unflatten(0, (self.num_experts, -1)).sum(0)
    return self.shared_expert(hidden) + own, logits


def _dbrx(
    self: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    tokens = hidden.reshape(-1, self.hidden_size)
    share = routing(self.num_experts, tokens, top_k_index, top_k_weights)
    sizes = (-1, self.ffn_hidden_size, self.hidden_size)
    w1, v1, w2 = (stack.view(sizes) for stack in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    result = torch.zeros_like(tokens)
    for expert in range(self.num_experts):
        output = self.mlp(tokens, w1[expert], v1[expert], w2[expert])
        result = result + output * share[:, expert, None]
    return result.view(hidden.shape[0], -1, self.hidden_size)
