"""Which weights a model multiplies with what, seen from below: no graph, no finder, float64.

Below autograd every linear, einsum or attention is a few leaf products. Next to each parameter runs
a twin that holds the place of each element in it, and goes through the same views and copies: what
arrives at a product is known element by element, however it got there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import Batch

aten = torch.ops.aten
# Ops that hand on elements, whether or not in the same memory.
_SAME_ELEMENTS = {
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "clone", "detach",
    "expand", "index", "index_select", "lift_fresh", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Row(NamedTuple):
    """A row of a weight as the oracle knows it: the places of its elements in one parameter."""

    parameter: str
    places: tuple[int, ...]


class Matrix(NamedTuple):
    """A weight as the oracle knows it: its rows."""

    parameter: str
    rows: tuple[Row, ...]


class Oracle(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The gram of every matrix of weights that the model under it multiplies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.grams: dict[Matrix, Tensor] = {}
        self._names: list[str] = []
        self._twins: Any = WeakIdKeyDictionary()
        for at, (name, parameter) in enumerate(model.named_parameters()):
            self._names.append(name)
            places = torch.arange(parameter.numel()).view(parameter.shape)
            self._twins[parameter] = places + (at << 40)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        self._look(name, args, kwargs)
        result = _grouped(*args, **kwargs) if name == "_grouped_mm" else func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = tensors and tensors[0] in self._twins
        if known and name in _SAME_ELEMENTS and len([t for t in tensors if t in self._twins]) == 1:
            if name == "_to_copy":
                twin: Any = self._twins[tensors[0]]
            else:
                twin = func(*tree_map(self._twin, args), **tree_map(self._twin, kwargs))
            for one, other in zip(tree_leaves(result), tree_leaves(twin), strict=True):
                self._twins[one] = other
        return result

    def _twin(self, value: Any) -> Any:
        return self._twins.get(value, value) if isinstance(value, Tensor) else value

    def _look(self, name: str, args: Any, kwargs: Any) -> None:
        if name in ("mm", "bmm"):
            self._product(args[0], args[1])
        elif name in ("addmm", "addbmm", "baddbmm"):
            self._product(args[1], args[2])
        elif name in ("mv", "addmv"):
            *_, matrix, vector = args
            self._product(matrix, vector[:, None])
        elif name in ("_grouped_mm", "grouped_mm_fallback"):
            ends = args[2] if len(args) > 2 else kwargs["offs"]
            twin, start = self._twins[args[1]], 0
            for expert, end in enumerate(ends.tolist()):
                self._add(twin[expert].T, args[0][start:end])
                start = end

    def _product(self, left: Tensor, right: Tensor) -> None:
        if (left in self._twins) == (right in self._twins):
            return
        if right in self._twins:
            matrices, inputs = self._twins[right].mT, left
        else:
            matrices, inputs = self._twins[left], right.mT
        if matrices.dim() == 2:
            self._add(matrices, inputs)
            return
        for matrix, x in zip(matrices, inputs, strict=True):
            self._add(matrix, x)

    def _add(self, places: Tensor, inputs: Tensor) -> None:
        """``places`` [out, in] of the weight's elements met ``inputs`` [tokens, in]."""
        if not len(inputs):
            return
        x = inputs.double()
        matrix, gram = self.matrix(places, x.T @ x)
        self.grams[matrix] = self.grams.get(matrix, 0) + gram

    def matrix(self, places: Tensor, gram: Tensor) -> tuple[Matrix, Tensor]:
        """The matrix, and its gram, with its inputs in the order of the parameter."""
        order = places.amin(0).argsort()
        name = self._names[int(places.min()) >> 40]
        ordered = (places & ((1 << 40) - 1))[:, order].tolist()
        return Matrix(name, tuple(Row(name, tuple(row)) for row in ordered)), gram[order][:, order]


def _grouped(x: Tensor, stack: Tensor, offs: Tensor) -> Tensor:
    """torch's grouped_mm, which knows no float64."""
    starts, ends = [0, *offs.tolist()[:-1]], offs.tolist()
    parts = zip(starts, ends, stack, strict=True)
    return torch.cat([x[start:end] @ matrix for start, end, matrix in parts])


def oracle(model: nn.Module, batches: list[Batch]) -> dict[Matrix, Tensor]:
    """Every matrix of weights that the model multiplies, and its gram, float64."""
    model = copy.deepcopy(model).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    seen = Oracle(model)
    with calibration_mode(model):
        for batch in batches:
            args, kwargs = tree_map(_double, (batch.args, batch.kwargs))
            with seen:
                model(*args, **kwargs)
    return seen.grams


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def site_matrix(model: nn.Module, site: Any, gram: Tensor) -> tuple[Matrix, Tensor]:
    """A site as the oracle knows it."""
    at = next(i for i, p in enumerate(model.parameters()) if p is site.parameter)
    places = torch.arange(site.parameter.numel()).view(site.parameter.shape)
    start = site.parameter.storage_offset()
    view = places.contiguous().as_strided(
        site.view.shape, site.view.stride, site.view.offset - start
    )
    return Oracle(model).matrix(view + (at << 40), gram.double())


def linears_of(model: nn.Module) -> Iterator[str]:
    """The names of what hooks on nn.Linear would see."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{name}.weight"
