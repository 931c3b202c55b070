"""Plain modules of a few hundred weights, and what a test wants to know about any module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_models import activations
from torch import Tensor, nn
from torch.nn import functional

from magr_fx import MagRReport

WIDTH = 32
INT = {bits: getattr(torch, f"int{bits}") for bits in range(1, 9)}  # no stubs know torch.int4


def mlp(*, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Sites 0.weight [48, 32] and 2.weight [16, 48]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 16))
    return model.to(dtype).eval()


def vectors(*rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches [rows, 32] with correlated columns, as activations have them."""
    mix = activations(WIDTH, WIDTH, seed=99) * torch.logspace(0, -1, WIDTH)[:, None]
    rows = rows or (40, 24)
    return [(activations(n, WIDTH, seed=i) @ mix).to(dtype) for i, n in enumerate(rows)]


class Shapes(nn.Module):
    """Weights that nn.Linear does not hold: stored transposed, fused in one parameter, raw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposed = nn.Parameter(torch.randn(WIDTH, 24) / 6)  # [in, out], as in GPT-2
        self.fused = nn.Parameter(torch.randn(3 * WIDTH, 24) / 5)  # three [32, 24]; one is unused
        self.strided = nn.Parameter((torch.randn(WIDTH, 16) / 6).T)  # [16, 32], column-major

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.transposed
        first = functional.linear(x, self.fused[:WIDTH])
        last = functional.linear(functional.relu(x), self.fused[2 * WIDTH :])
        return functional.linear(first + last, self.strided)


class Overflows(nn.Module):
    """Three linears, and an exponential before one of them."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "middle", "last"):
            linear: Any = getattr(self, name)
            x = linear(x.exp() if name == self.where else x)
        return x


def report_of(model: nn.Module) -> MagRReport:
    report: Any = model.magr_report
    assert isinstance(report, MagRReport)
    return report


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """The names of the parameters and buffers that are no longer bitwise what they were."""
    now = state(model)
    assert now.keys() == before.keys()
    return [name for name in before if not _same_bits(now[name], before[name])]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes, where NaN equals NaN.
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


@contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every nn.Linear is given while the model runs: name → [tokens, in] in float64."""
    inputs: dict[str, list[Tensor]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].detach().reshape(-1, args[0].shape[-1])
            inputs.setdefault(name, []).append(tokens.double())

        return hook

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_pre_hook(record(name)) for name, module in linears]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def grams(model: nn.Module, calib: list[Any]) -> dict[str, Tensor]:
    """XᵀX of every nn.Linear's inputs, float64, from an ordinary run of the model."""
    with recorded_inputs(model) as inputs, torch.no_grad():
        for batch in calib:
            model(batch)
    stacked = {name: torch.cat(tokens) for name, tokens in inputs.items()}
    return {name: x.T @ x for name, x in stacked.items()}
