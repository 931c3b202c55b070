"""MagR on a plain module: an nn.Linear, a raw parameter in F.linear, and ``x @ W.T``. Ten seconds.

    python examples/any_module.py

No transformers, no nn.Linear needed: the pass sees the traced graph, so it finds every weight that
meets an input in a matmul. torchao's quantized tensors are pickier (they run in F.linear only), and
what they cannot take is in the report, neither rewritten nor quantized.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, quantize_

from magr_fx import magr_quantize, magr_transform

WIDTH, HIDDEN, OUT = 128, 256, 64
TARGET = IntxWeightOnlyConfig(weight_dtype=torch.int3)  # type: ignore[attr-defined]


class Plain(nn.Module):
    """Three matmuls, written in three ways."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.mix = nn.Parameter(torch.empty(HIDDEN, HIDDEN))
        self.down = nn.Parameter(torch.empty(OUT, HIDDEN))
        with torch.no_grad():
            for weight in (self.up.weight, self.mix, self.down):
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
                # A few large weights, as trained models have them: they stretch the integer grid.
                large = torch.rand(weight.shape, generator=generator) < 0.005
                weight[large] *= 6

    def forward(self, x: Tensor) -> Tensor:  # x: [..., WIDTH]
        x = functional.silu(self.up(x))
        x = functional.silu(functional.linear(x, self.mix))
        return x @ self.down.T


def inputs(generator: torch.Generator, tokens: int) -> Tensor:
    """Correlated features, as activations are: most of their energy lies in a few directions."""
    basis = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    spectrum = torch.arange(1, WIDTH + 1).pow(-1.0)
    return torch.randn(tokens, WIDTH, generator=generator) * spectrum @ basis


@torch.no_grad()
def error(candidate: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Relative output error, ‖y' − y‖ / ‖y‖."""
    y = original(x)
    return float((candidate(x) - y).norm() / y.norm())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Plain(generator).eval()
    calib = [inputs(generator, 1024) for _ in range(4)]
    heldout = inputs(generator, 2048)

    rewritten = magr_transform(copy.deepcopy(model), calib)
    print("magr_transform rewrites all three:\n")
    print(rewritten.magr_report)

    # The same two weights on both sides: torchao takes the raw parameter by its name.
    alone = copy.deepcopy(model)
    quantize_(alone, FqnToConfig({"up": TARGET, "mix": TARGET}), filter_fn=None)
    quantized = magr_quantize(copy.deepcopy(model), calib, TARGET)
    print("\nmagr_quantize leaves out what torchao cannot run:\n")
    print(quantized.magr_report)

    print("\nrelative output error on held-out inputs, 3 bits per channel:")
    print(f"  rewritten, not quantized           {error(rewritten, model, heldout):.1%}")
    print(f"  torchao alone                      {error(alone, model, heldout):.1%}")
    print(f"  magr_quantize                      {error(quantized, model, heldout):.1%}")


if __name__ == "__main__":
    main()
