"""Where a weight lies in memory: follow views from a parameter, write back through them.

A weight meets its matmul as the parameter itself or as some view of it (transposed, sliced,
chunked, expanded). Replaying those views on the parameter gives its strides and offset; a strided
view made from them later reads and writes exactly those elements, however they are stored.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

# Ops that return a view of their first argument, and so keep the way back to the parameter.
VIEWS = frozenset(
    {
        aten.adjoint.default,
        aten.alias.default,
        aten.chunk.default,
        aten.detach.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.matrix_H.default,
        aten.mH.default,
        aten.mT.default,
        aten.movedim.int,
        aten.narrow.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.t.default,
        aten.tensor_split.sections,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
        operator.getitem,  # one of a chunk's, split's or unbind's views
    }
)
# Ops that copy values without changing which element is which: casts and layout changes.
COPIES = frozenset(
    {
        aten._to_copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
    }
)


# Views whose sizes may be those of the input: a batch that the weight is repeated over.
_RESIZES = frozenset(
    {aten.expand.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default}
)


@dataclass(frozen=True)
class WeightView:
    """``out`` × ``in`` elements of a parameter's storage, as strides and an offset.

    Two weights are the same weight when their views are equal, whatever their names are.
    """

    storage: int
    offset: int
    shape: tuple[int, int]
    stride: tuple[int, int]

    @property
    def last(self) -> int:
        """The storage offset of the last element."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    @classmethod
    def of(cls, matrix: torch.Tensor) -> WeightView:
        return cls(
            matrix.untyped_storage().data_ptr(),
            int(matrix.storage_offset()),
            (matrix.shape[0], matrix.shape[1]),
            (matrix.stride(0), matrix.stride(1)),
        )

    def on(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, in]`` as a view that shares the parameter's memory."""
        return parameter.detach().as_strided(self.shape, self.stride, self.offset)

    def covers(self, parameter: torch.Tensor) -> bool:
        """Whether this is the parameter itself, as it is stored."""
        return parameter.dim() == 2 and WeightView.of(parameter) == self

    def name(self, parameter: torch.Tensor) -> str:
        """Which part of the parameter this is, as an index: ``""`` for all of it, ``[64:128]``."""
        if parameter.numel() == self.shape[0] * self.shape[1]:
            return ""
        start = int(parameter.storage_offset())
        first, final = (_index(at - start, parameter) for at in (self.offset, self.last))
        parts = [
            str(a) if a == b and n > 1 else ":" if (a, b) == (0, n - 1) else f"{a}:{b + 1}"
            for a, b, n in zip(first, final, parameter.shape, strict=True)
        ]
        while parts and parts[-1] == ":":
            parts.pop()
        return f"[{', '.join(parts)}]"


def _index(offset: int, parameter: torch.Tensor) -> list[int]:
    """The index of the element at ``offset`` in a parameter that is stored without gaps."""
    index = [0] * parameter.dim()
    strides = parameter.stride()
    for dim in sorted(range(parameter.dim()), key=strides.__getitem__, reverse=True):
        if parameter.shape[dim] > 1 and strides[dim] > 0:
            index[dim], offset = divmod(offset, strides[dim])
    return index


def overlap(first: WeightView, second: WeightView) -> bool:
    """Whether two different views share an element."""
    if first.storage != second.storage:
        return False
    start, end = min(first.offset, second.offset), max(first.last, second.last)
    if max(first.offset, second.offset) > min(first.last, second.last):
        return False
    marks = torch.zeros(end - start + 1, dtype=torch.bool)
    marks.as_strided(first.shape, first.stride, first.offset - start).fill_(True)
    return bool(marks.as_strided(second.shape, second.stride, second.offset - start).any())


def replay(parameter: torch.Tensor, chain: tuple[fx.Node, ...]) -> torch.Tensor | None:
    """The chain's result as a view of the parameter, or None where it is no view of it.

    Copies are left out. The sizes of a batch that the weight is expanded over are taken as 1.
    """
    value: Any = parameter.detach()
    for node in chain:
        if node.target in COPIES:
            continue
        inputs = (node.args[1:], node.kwargs)
        if node.target not in _RESIZES and any(isinstance(a, fx.Node) for a in tree_leaves(inputs)):
            return None  # which elements it reads depends on the input's shape
        args, kwargs = tree_map_only(fx.Node, lambda _: 1, inputs)
        try:
            value = node.target(value, *args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError):
            return None
    if not isinstance(value, torch.Tensor) or value.dtype != parameter.dtype:
        return None
    shared = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    return value if shared and _has_traced_shape(value, chain) else None


def _has_traced_shape(value: torch.Tensor, chain: tuple[fx.Node, ...]) -> bool:
    """Whether only batch sizes were taken as 1: the matrix itself is as large as in the graph."""
    traced = chain[-1].meta.get("val") if chain else None
    if not isinstance(traced, torch.Tensor):
        return True
    sizes = [1 if isinstance(size, torch.SymInt) else size for size in traced.shape]
    fixed = all(isinstance(size, int) for size in traced.shape[-2:])
    return fixed and sizes == list(value.shape)


def matrices(weight: torch.Tensor) -> list[tuple[tuple[int, ...], WeightView]]:
    """The distinct matrices of a stack ``[..., out, in]``, each with its batch index.

    A batch dimension that the weight is merely expanded over has index -1: all of the input's
    batch meets one matrix.
    """
    ranges = [
        [-1] if size == 1 or stride == 0 else list(range(size))
        for size, stride in zip(weight.shape[:-2], weight.stride()[:-2], strict=True)
    ]
    return [
        (index, WeightView.of(weight[tuple(max(i, 0) for i in index)]))
        for index in itertools.product(*ranges)
    ]
