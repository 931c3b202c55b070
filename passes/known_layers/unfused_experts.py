"""Mixture-of-experts layers whose experts are linears of their own, as quantizers want them.

Each stands in for one of transformers' layers with fused experts, has its forward's arguments, and
computes what it did: every token by the experts that it is routed to, weighted by the routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from magr_fx.passes.known_layers.transformers_private import activated

Expert = Callable[[int, torch.Tensor], torch.Tensor]  # which, tokens → tokens


class UnfusedExperts(nn.Module):
    """Experts that take their forward from transformers' table, with their stacks as linears.

    Args:
        fused: what is left of the original layer, without its stacks: how it gates.
        up: for each expert the linear to the gate and the inner activations, or to the latter.
        down: for each expert the linear back.
    """

    def __init__(self, fused: nn.Module, up: list[nn.Linear], down: list[nn.Linear]) -> None:
        super().__init__()
        self.fused: Any = fused
        self.up_proj, self.down_proj = nn.ModuleList(up), nn.ModuleList(down)

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        count = len(self.up_proj)
        return _routed(self._expert, count, hidden, top_k_index, top_k_weights)

    def _expert(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.up_proj[expert](tokens)
        outer: torch.Tensor = self.down_proj[expert](activated(self.fused, inner))
        return self.fused.post_expert_norm(outer) if self.fused.has_post_expert_norm else outer


class UnfusedDbrxExperts(nn.Module):
    """DBRX's experts, whose gate and inner activations have a linear each.

    Args:
        activation: of the gate.
        gate, up, down: the linears of each expert.
    """

    def __init__(
        self,
        activation: nn.Module,
        gate: list[nn.Linear],
        up: list[nn.Linear],
        down: list[nn.Linear],
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w1, self.v1 = nn.ModuleList(gate), nn.ModuleList(up)
        self.w2 = nn.ModuleList(down)

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        count = len(self.w1)
        result = _routed(self._expert, count, tokens, top_k_index, top_k_weights)
        return result.view(hidden.shape[0], -1, hidden.shape[-1])

    def _expert(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.w1[expert](tokens)) * self.v1[expert](tokens)
        outer: torch.Tensor = self.w2[expert](inner)
        return outer


class UnfusedLlama4Experts(nn.Module):
    """Llama 4's experts: each is given as many rows, which the routing has weighted already."""

    def __init__(self, activation: nn.Module, up: list[nn.Linear], down: list[nn.Linear]) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj, self.down_proj = nn.ModuleList(up), nn.ModuleList(down)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        results = []
        parts = hidden.chunk(len(self.down_proj))
        for part, up, down in zip(parts, self.gate_up_proj, self.down_proj, strict=True):
            gate, inner = up(part).chunk(2, dim=-1)
            results.append(down(inner * self.activation(gate)))
        return torch.cat(results)


def _routed(
    expert: Expert,
    count: int,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of what the experts make of the tokens ``[tokens, hidden]``.

    Compiled, every expert works on every token, since a graph cannot depend on how many tokens an
    expert gets; what was not routed there has no weight. Not so exported: who counts the tokens
    of each expert should see them.
    """
    result = torch.zeros_like(hidden)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        share = hidden.new_zeros(len(hidden), count + 1)  # one more: what is routed to nobody
        index = top_k_index.clamp(max=count)
        share = share.scatter_add(1, index, top_k_weights.to(hidden.dtype))
        for at in range(count):
            result = result + expert(at, hidden) * share[:, at, None]
        return result
    for at in range(count):
        tokens, place = (top_k_index == at).nonzero(as_tuple=True)
        if len(tokens):
            part = expert(at, hidden[tokens]) * top_k_weights[tokens, place, None]
            result.index_add_(0, tokens, part.to(result.dtype))
    return result
