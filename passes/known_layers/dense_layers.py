"""Llama 4's, JetMoE's and DBRX's layers of experts, with every token at every expert.

Each function stands in for a method of transformers' module of that name: what the layer returns
stays what it was, since what a token was not routed to has no weight in the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def dense_attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """What to set so that the model's own layers are dense: (module, attribute, value)."""
    for module in model.modules():
        own: Any = module
        kind = type(module).__name__
        if not type(module).__module__.startswith("transformers.models."):
            continue
        if kind == "Llama4TextMoe":
            yield module, "forward", MethodType(_llama4, module)
        elif kind == "DbrxExperts":
            yield module, "forward", MethodType(_dbrx, module)
        elif kind == "JetMoeParallelExperts":
            yield module, "forward", MethodType(_jetmoe_expert, module)
        elif kind == "JetMoeMoE" and _is_stacked(own):
            yield module, "forward", MethodType(_jetmoe, module)
        elif kind == "JetMoeAttention" and _is_stacked(own.experts):
            # Its experts are pairs of projections around the attention: as many run through that.
            yield module, "top_k", own.experts.num_experts
            yield own.experts, "map", MethodType(_jetmoe_map, own.experts)
            yield own.experts, "reduce", MethodType(_jetmoe_reduce, own.experts)


def routing(
    count: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """``[tokens, count]``: the weight of each token at each expert, 0 where it is not routed."""
    share = hidden.new_zeros(len(hidden), count)
    return share.scatter_add(1, top_k_index, top_k_weights.to(hidden.dtype))


def _llama4(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4 weights an expert's inputs: a token comes with the weight it would be routed with."""
    hidden = hidden.reshape(-1, self.hidden_dim)
    routed, logits = self.router(hidden)  # [tokens, experts], both
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


def _jetmoe(self: Any, layer_input: torch.Tensor) -> torch.Tensor:
    tokens = layer_input.reshape(-1, self.input_size)
    _, share = _jetmoe_routing(self.router, tokens)
    result = torch.zeros_like(tokens)
    for expert in range(self.router.num_experts):
        gate, inner = self.input_linear(tokens, expert).chunk(2, dim=-1)
        output = self.output_linear(self.activation(gate) * inner, expert)
        result = result + output * share[:, expert, None]
    bias: torch.Tensor = self.bias
    return result.view_as(layer_input) + bias


def _jetmoe_map(
    self: Any, layer_input: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries of all experts, ``[batch, length, experts, hidden]``, and the routing."""
    tokens = layer_input.reshape(-1, self.input_size)
    logits, share = _jetmoe_routing(self.router, tokens)
    queries = [self.input_linear(tokens, at) for at in range(self.num_experts)]
    return torch.stack(queries, 1).view(*layer_input.shape[:-1], len(queries), -1), logits, share


def _jetmoe_reduce(self: Any, attended: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """From what was attended to for each expert, ``[batch, length, experts, hidden]``."""
    batch, length = attended.shape[:2]
    result = attended.new_zeros(batch * length, self.input_size)
    rows = attended.flatten(2).flatten(0, 1)  # [tokens, experts · hidden], the tokens in order
    for expert, inner in enumerate(torch.split(rows, self.hidden_size, -1)):
        output = self.output_linear(inner, expert)
        result = result + output * share[:, expert, None]
    bias: torch.Tensor = self.bias
    return result.view(batch, length, self.input_size) + bias


def _jetmoe_routing(router: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's logits and the routing weights, ``[tokens, experts]`` both."""
    *_, logits = router(tokens)  # transformers' hooks on it return them, if they are asked for
    best, index = logits.topk(router.top_k, dim=1)
    return logits, routing(router.num_experts, tokens, index, best.softmax(1))


def _jetmoe_expert(self: Any, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    return functional.linear(inputs, self.weight[expert])


def _is_stacked(layer: Any) -> bool:
    """Whether the experts are those of transformers, not yet linears of their own."""
    return isinstance(layer.input_linear.weight, nn.Parameter)
