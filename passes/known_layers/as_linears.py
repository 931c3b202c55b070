"""Replace modules that quantizers ignore by equivalent modules with nn.Linear.

transformers' Conv1D (GPT-2) stores its weight as ``[in, out]``. Fused experts are stacks of
matrices in one parameter. A quantizer for nn.Linear finds neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from magr_fx.passes.known_layers.all_experts import is_experts
from magr_fx.passes.known_layers.expert_modules import (
    UnfusedDbrxExperts,
    UnfusedExperts,
    UnfusedLlama4Experts,
)

Model = TypeVar("Model", bound=nn.Module)


class ParameterMatrix(NamedTuple):
    """A weight inside a parameter, and the name of the linear that will hold it.

    Attributes:
        parameter: the parameter that holds the weight.
        matrix: the weight ``[out, in]``, a view of the parameter.
        path: the linear's name in the new module; empty if the new module is the linear itself.
    """

    parameter: nn.Parameter
    matrix: torch.Tensor
    path: str


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A module that can be replaced by an equivalent one with linears.

    Attributes:
        name: the module's name in the model.
        module: the module.
        weights: all of its weights that become linears.
        build: makes the new module, and may remove the weights from the old one.
    """

    name: str
    module: nn.Module
    weights: list[ParameterMatrix]
    build: Callable[[], nn.Module]


def as_linears(model: Model) -> Model:
    """Replace every Conv1D and every layer of fused experts by modules with nn.Linear, in place.

    The outputs do not change, except for rounding errors of sums in another order.
    ``magr_quantize`` does this to the modules that it quantizes. Before you load the
    ``state_dict`` of such a model, call this function on the new model.

    Returns:
        ``model``, or its replacement if ``model`` itself is such a module.
    """
    root: nn.Module = model
    for rebuilt in list(rebuildable(model)):
        new = replace_module(model, rebuilt)
        root = new if rebuilt.module is model else root
    return root  # type: ignore[return-value]


def rebuildable(model: nn.Module) -> Iterator[Rebuilt]:
    """Every module of the model that can be replaced by one with linears."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, Conv1D):
            yield _conv1d(name, module)
        elif kind == "FalconLinear":  # a subclass of nn.Linear that computes x @ W.T
            yield _same_linear(name, module)
        elif is_experts(module):
            yield _experts(name, module)
        elif kind == "DbrxExperts":
            yield _dbrx(name, module)
        elif kind == "Llama4TextExperts":
            yield _llama4(name, module)


def replace_module(model: nn.Module, rebuilt: Rebuilt) -> nn.Module:
    """Build the new module, put it wherever the model holds the old one, and return it."""
    new = rebuilt.build().train(rebuilt.module.training)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # a module may have several names
            if child is rebuilt.module:
                setattr(parent, key, new)
    return new


def _conv1d(name: str, module: Conv1D) -> Rebuilt:
    weight: nn.Parameter = module.weight
    held = ParameterMatrix(weight, weight.detach().T, "")
    return Rebuilt(name, module, [held], lambda: _linear(weight, weight.T, module.bias))


def _same_linear(name: str, module: nn.Module) -> Rebuilt:
    weight: Any = module.weight
    bias: Any = module.bias

    def build() -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight, linear.bias = weight, bias
        return linear

    return Rebuilt(name, module, [ParameterMatrix(weight, weight.detach(), "")], build)


def _experts(name: str, module: nn.Module) -> Rebuilt:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = {first: "up_proj", "down_proj": "down_proj"}
    transposed = bool(module.is_transposed)

    def build() -> nn.Module:
        lists = [_linears(module, key, transposed=transposed, bias=f"{key}_bias") for key in names]
        return UnfusedExperts(module, *lists)

    return Rebuilt(name, module, _weights(module, names, transposed=transposed), build)


def _dbrx(name: str, module: nn.Module) -> Rebuilt:
    inner: Any = module.mlp
    weights = []
    for key in ("w1", "v1", "w2"):  # [experts · inner, hidden]
        parameter = getattr(inner, key)
        stack = parameter.detach().unflatten(0, (module.num_experts, -1))
        matrices = [matrix.T if key == "w2" else matrix for matrix in stack]
        weights += [ParameterMatrix(parameter, m, f"{key}.{at}") for at, m in enumerate(matrices)]

    def build() -> nn.Module:
        made: dict[str, list[nn.Linear]] = {}
        for key in ("w1", "v1", "w2"):
            own = [held for held in weights if held.path.startswith(f"{key}.")]
            made[key] = [_linear(held.parameter, held.matrix, None) for held in own]
            setattr(inner, key, None)
        return UnfusedDbrxExperts(inner.activation_fn, made["w1"], made["v1"], made["w2"])

    return Rebuilt(name, module, weights, build)


def _llama4(name: str, module: nn.Module) -> Rebuilt:
    names = {"gate_up_proj": "gate_up_proj", "down_proj": "down_proj"}

    def build() -> nn.Module:
        lists = [_linears(module, key, transposed=True) for key in names]
        return UnfusedLlama4Experts(module.act_fn, *lists)  # type: ignore[arg-type]

    return Rebuilt(name, module, _weights(module, names, transposed=True), build)


def _weights(
    module: nn.Module, names: dict[str, str], *, transposed: bool
) -> list[ParameterMatrix]:
    """The matrices ``[out, in]`` of the stacks, with the names of their linears.

    Args:
        module: the layer of experts.
        names: name of each stack → name of its list of linears in the new module.
        transposed: whether the matrices of the stacks are ``[in, out]``.
    """
    return [
        ParameterMatrix(getattr(module, key), matrix.T if transposed else matrix, f"{new}.{at}")
        for key, new in names.items()
        for at, matrix in enumerate(getattr(module, key).detach().unbind(0))
    ]


def _linears(module: nn.Module, key: str, *, transposed: bool, bias: str = "") -> list[nn.Linear]:
    """Make the matrices of a stack into linears, and remove the stack from the module."""
    stack: nn.Parameter = getattr(module, key)
    biases = getattr(module, bias, None) if bias else None
    linears = [
        _linear(stack, matrix.T if transposed else matrix, None if biases is None else biases, at)
        for at, matrix in enumerate(stack.unbind(0))
    ]
    setattr(module, key, None)
    if biases is not None:
        setattr(module, bias, None)
    return linears


def _linear(
    like: nn.Parameter, weight: torch.Tensor, bias: nn.Parameter | None, row: int | None = None
) -> nn.Linear:
    """A linear with a copy of ``weight`` ``[out, in]``, and with ``bias``, or a row of it.

    The linear's weight requires a gradient if ``like`` does.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    copy = weight.detach().clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(copy, like.requires_grad)
    if bias is not None:
        own = bias if row is None else nn.Parameter(bias.detach()[row].clone(), bias.requires_grad)
        linear.bias = own
    return linear
