"""Mixture-of-experts layers in which each expert has its own nn.Linear, for quantizers.

Each class here replaces a layer of transformers with fused experts. Its forward takes the same
arguments and returns the same: for every token the weighted sum of the experts it is routed to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from magr_fx.passes.known_layers.transformers_private import activated

Expert = Callable[[int, torch.Tensor], torch.Tensor]  # expert's index, inputs → outputs


class UnfusedExperts(nn.Module):
    """The layers whose forward transformers takes from its table of expert implementations.

    Args:
        fused: the original layer without its stacks, for its gate, activation and norm.
        up: for each expert the linear to the gate and the inner activations, or to the inner
            activations alone if there is no gate.
        down: for each expert the linear from the inner activations to the outputs.
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
    """DBRX's experts, which have one linear for the gate and one for the inner activations.

    Args:
        activation: the activation function of the gate.
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
    """Llama 4's experts: each gets the same number of rows, already multiplied by routing weights.

    Args:
        activation: the activation function of the gate.
        up: for each expert the linear to the gate and the inner activations.
        down: for each expert the linear from the inner activations to the outputs.
    """

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
    """The sum of the experts' outputs ``[tokens, hidden]``, weighted by the routing.

    Under torch.compile every expert gets every token, with weight 0 if the token is not routed
    there, because a compiled graph cannot depend on the number of tokens of an expert. Under
    torch.export each expert gets its own tokens only, because their number is what a calibration
    counts.
    """
    result = torch.zeros_like(hidden)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        share = hidden.new_zeros(len(hidden), count + 1)  # the last: tokens without an expert
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
