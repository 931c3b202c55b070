"""Where a weight lies in memory: replay the views of a parameter, and write through the result.

The operand of a weight matmul is the parameter itself or a view of it (transposed, sliced, chunked,
expanded). Replaying these views on the parameter gives the strides and the offset of the weight. A
strided view with these reads and writes exactly its elements, however they are stored.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from magr_fx.passes.graphs.torch_private import expression_of, tree_leaves, tree_map_only

aten = torch.ops.aten

# Ops that return a view of their first argument, so that the parameter can be written through it.
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


# Views whose sizes may come from the input, such as the batch that a weight is expanded over.
RESIZES = frozenset(
    {aten.expand.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default}
)


@dataclass(frozen=True)
class WeightView:
    """A weight ``[out, in]`` as a shape, strides and an offset in a parameter's storage.

    Two weights are the same if their views are equal, whatever their names are. Offset and strides
    count elements. ``storage`` is the address of the storage.
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
        """Whether this is the whole parameter, as it is stored."""
        return parameter.dim() == 2 and WeightView.of(parameter) == self

    def name(self, parameter: torch.Tensor) -> str:
        """The part of the parameter that this is, an index like ``[64:128]``; ``""``: all."""
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


def unread_parts(
    parameter: torch.Tensor, views: Collection[WeightView]
) -> list[tuple[str, tuple[int, ...]]]:
    """The parts of a parameter along its first dimension that no view reads: index and shape.

    Such a part is, for example, an expert that no token was sent to.
    """
    if sum(view.shape[0] * view.shape[1] for view in views) >= parameter.numel():
        return []
    read = torch.zeros(parameter.numel(), dtype=torch.bool, device="cpu")
    for view in views:
        offset = view.offset - int(parameter.storage_offset())
        read.as_strided(view.shape, view.stride, offset).fill_(True)
    rows = read.as_strided(parameter.shape, parameter.stride()).flatten(1).any(1)
    if parameter.dim() > 2:
        unread = (~rows).nonzero().flatten().tolist()
        return [(f"[{row}]", tuple(parameter.shape[1:])) for row in unread]
    # Matrices stacked along the rows: of the height of those that are read, if it is one height.
    heights = {_rows_of(view, parameter) for view in views}
    each = heights.pop() if len(heights) == 1 else 0
    runs: list[tuple[int, int]] = []
    for row in (~rows).nonzero().flatten().tolist():
        joined = bool(runs) and runs[-1][1] == row and (not each or row % each != 0)
        runs.append((runs.pop()[0] if joined else row, row + 1))
    return [(f"[{a}:{b}]", (b - a, parameter.shape[1])) for a, b in runs]


def _rows_of(view: WeightView, parameter: torch.Tensor) -> int:
    """How many rows of a parameter ``[rows, columns]`` a view spans."""
    start = int(parameter.storage_offset())
    first, last = (_index(at - start, parameter)[0] for at in (view.offset, view.last))
    return last - first + 1


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
    marks = torch.zeros(end - start + 1, dtype=torch.bool, device="cpu")
    marks.as_strided(first.shape, first.stride, first.offset - start).fill_(True)
    return bool(marks.as_strided(second.shape, second.stride, second.offset - start).any())


def replay(
    parameter: torch.Tensor, chain: tuple[fx.Node, ...], *, picked: bool = False
) -> torch.Tensor | None:
    """The result of a chain of nodes as a view of the parameter; None if it is no view of it.

    Copies are left out. Dynamic sizes that the weight is expanded over are replaced by 1.

    Args:
        parameter: the tensor that the chain starts from.
        chain: the nodes.
        picked: whether the parameter is one of the matrices that an index picks from a stack. Then
            the leading dimensions have other sizes in the graph.
    """
    value: Any = parameter.detach()
    for node in chain:
        if node.target in COPIES:
            continue
        inputs = (node.args[1:], node.kwargs)
        if node.target not in RESIZES and any(isinstance(a, fx.Node) for a in tree_leaves(inputs)):
            return None  # the elements that it reads depend on the input's shape
        args, kwargs = tree_map_only(fx.Node, _smallest, inputs)
        try:
            value = node.target(value, *args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError):
            return None
    if not isinstance(value, torch.Tensor) or value.dtype != parameter.dtype:
        return None
    shared = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    return value if shared and _has_traced_shape(value, chain, picked=picked) else None


def _smallest(size: fx.Node) -> int:
    """The value of a size of the graph if every dynamic size is 1."""
    value = size.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return 1
    expression = expression_of(value)
    try:
        return max(1, int(expression.subs(dict.fromkeys(expression.free_symbols, 1))))
    except (TypeError, ZeroDivisionError):  # undefined at 1; the result's sizes are checked
        return 1


def picked_matrices(
    parameter: torch.Tensor, stack: tuple[fx.Node, ...], chain: tuple[fx.Node, ...], dims: int
) -> list[tuple[tuple[int, ...], torch.Tensor | None]]:
    """Each matrix of a stack that an index picks from: its position, and its operand or None.

    The operand is the view of the matrix that enters the matmul; None if it is no view.

    Args:
        parameter: the parameter that holds the stack.
        stack: the nodes from the parameter to the stack, ``[matrices, ...]``.
        chain: the nodes from the picked matrices, ``[*index, ...]``, to the operand.
        dims: the number of dimensions of the index.
    """
    matrices = replay(parameter, stack)
    if matrices is None:
        return [((), None)]
    alone = [matrix[(None,) * dims] for matrix in matrices.unbind(0)]
    return [((at,), replay(matrix, chain, picked=True)) for at, matrix in enumerate(alone)]


def _has_traced_shape(value: torch.Tensor, chain: tuple[fx.Node, ...], *, picked: bool) -> bool:
    """Whether the matrix has the traced sizes: only dynamic leading sizes were replaced by 1.

    A dynamic size may have a fixed size as a factor, if the weight is only expanded over both: all
    of their input meets one matrix then.
    """
    traced = chain[-1].meta.get("val") if chain else None
    if not isinstance(traced, torch.Tensor):
        return True
    if traced.dim() != value.dim() or not _equal(traced.shape[-2:], value.shape[-2:]):
        return False
    leading = zip(traced.shape[:-2], value.shape[:-2], value.stride()[:-2], strict=True)
    return picked or all(
        size == 1 or stride == 0 if isinstance(expected, torch.SymInt) else size == expected
        for expected, size, stride in leading
    )


def _equal(traced: Sequence[int | torch.SymInt], sizes: Sequence[int]) -> bool:
    """Whether the traced sizes are these, and none of them is dynamic."""
    return all(
        isinstance(one, int) and one == other for one, other in zip(traced, sizes, strict=True)
    )


def matrices(weight: torch.Tensor) -> list[tuple[tuple[int, ...], WeightView]]:
    """The distinct matrices of a stack ``[..., out, in]``, each with its batch index.

    A batch dimension that the weight is only expanded over has the index -1: the whole batch of
    the input is multiplied with one matrix.
    """
    ranges = [
        [-1] if size == 1 or stride == 0 else list(range(size))
        for size, stride in zip(weight.shape[:-2], weight.stride()[:-2], strict=True)
    ]
    return [
        (index, WeightView.of(weight[tuple(max(i, 0) for i in index)]))
        for index in itertools.product(*ranges)
    ]
