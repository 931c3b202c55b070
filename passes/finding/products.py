"""Recognise a node that multiplies a weight with an input, and how both lie in their operands."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from magr_fx.passes.finding.operands import Route, Rows, read_equation, tensordot_equation
from magr_fx.passes.graphs.torch_private import schema_of

aten = torch.ops.aten

# op → positions of its left and right operand, and whether the right one is stored transposed.
MATMULS: dict[object, tuple[int, int, bool]] = {
    aten.linear.default: (0, 1, True),
    aten.inner.default: (0, 1, True),
    aten.mm.default: (0, 1, False),
    aten.mv.default: (0, 1, False),
    aten.bmm.default: (0, 1, False),
    aten.matmul.default: (0, 1, False),
    aten.addmm.default: (1, 2, False),
    aten.addmv.default: (1, 2, False),
    aten.addbmm.default: (1, 2, False),
    aten.baddbmm.default: (1, 2, False),
}
# Ops on rows [tokens, in] sorted by expert, a stack [experts, in, out], and the ends of segments.
# By name: transformers registers its own op for dtypes and devices that torch's does not support.
GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
# Ops that multiply weights with inputs internally, where the inputs cannot be captured.
_OPAQUE = frozenset(
    {
        "aten::bilinear",
        "aten::chain_matmul",
        "aten::gru",
        "aten::gru_cell",
        "aten::linalg_multi_dot",
        "aten::lstm",
        "aten::lstm_cell",
        "aten::rnn_relu",
        "aten::rnn_relu_cell",
        "aten::rnn_tanh",
        "aten::rnn_tanh_cell",
    }
)


@dataclass(frozen=True)
class Layout:
    """How a weight lies in its operand: as ``[..., out, in]``, unless one of these says otherwise.

    Attributes:
        turned: whether it is ``[..., in, out]``.
        order: for einsum, the permutation after which the dimensions of the stack come first, then
            those of ``out``, then those of ``in``.
        stacked, out: how many of the permuted dimensions belong to the stack, and to ``out``.
    """

    turned: bool = False
    order: tuple[int, ...] | None = None
    stacked: int = 0
    out: int = 1

    def summed(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of an einsum operand that are summed over."""
        return tuple(sizes[dim] for dim in (self.order or ())[self.stacked + self.out :])

    def of(self, operand: torch.Tensor) -> torch.Tensor | None:
        """The operand as a view ``[..., out, in]``; None if there is no such view."""
        if self.order is not None:
            first = self.stacked + self.out
            ordered = _merged(operand.permute(self.order), first, operand.dim())
            if ordered is None:
                return None
            whole = _merged(ordered, self.stacked, first)
            # Dimensions of ``out`` that cannot be merged become a stack of matrices, all of which
            # are multiplied with the same input.
            return ordered if whole is None and not self.stacked else whole
        return operand.mT if self.turned and operand.dim() > 1 else operand


def _merged(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
    """A view with dimensions ``start`` to ``stop`` merged; None if their strides forbid it."""
    sizes = tensor.shape
    try:
        return tensor.view(*sizes[:start], sizes[start:stop].numel(), *sizes[stop:])
    except RuntimeError:
        return None


class Product(NamedTuple):
    """A weight, the input it is multiplied with, and how both lie in their operands."""

    weight: fx.Node
    input: fx.Node
    layout: Layout
    rows: Rows
    route: Route | None = None
    direct: bool = False  # aten.linear, which torchao's tensors support

    def stacks_like(self, dims: int) -> bool:
        """Whether the first ``dims`` dimensions of the weight, in order, are the stack.

        Also if they are the first of ``out``: every row is then multiplied with each matrix.
        """
        order = self.layout.order
        return order is None or (
            order[:dims] == tuple(range(dims)) and self.layout.stacked in (0, dims)
        )


def is_product(node: fx.Node) -> bool:
    """Whether the node multiplies matrices."""
    return (
        node.target in MATMULS
        or node.target in (aten.einsum.default, aten.tensordot.default)
        or _schema_name(node) in GROUPED | _OPAQUE
    )


def product_of(node: fx.Node, weights: Container[fx.Node]) -> Product | None:
    """The product of exactly one of ``weights`` and another value; None if the node is none."""
    if node.target in (aten.einsum.default, aten.tensordot.default):
        return _einsum(*_equation(node), weights)
    if _schema_name(node) in GROUPED:
        return _grouped(node, weights)
    if node.target not in MATMULS:
        return None
    left, right, transposed = MATMULS[node.target]
    pair = _pair(node.args[left], node.args[right], weights)
    # If the weight is the bias too, the product is not its only use.
    if pair is None or node.args.count(pair[0]) != 1:
        return None
    weight, other, side = pair
    if node.target is aten.inner.default and _dims(weight) > 2:
        return None  # each matrix of the stack is multiplied with all rows
    # Y = A·B. As B the weight is stored [in, out], or [out, in] where the op transposes it. As A it
    # is [out, in], and the tokens are B's columns, or its rows where the op transposes B.
    return Product(
        weight,
        other,
        Layout(turned=side == 1 and not transposed),
        Rows(columns=side == 0 and not transposed),
        direct=side == 1 and node.target is aten.linear.default,
    )


def _pair(
    left: object, right: object, weights: Container[fx.Node]
) -> tuple[fx.Node, fx.Node, int] | None:
    """(weight, other, side of the weight) if exactly one of the two is a weight, else None."""
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if (left in weights) == (right in weights):
        return None
    return (left, right, 0) if left in weights else (right, left, 1)


def _equation(node: fx.Node) -> tuple[str, object]:
    """The einsum equation of an einsum or tensordot node, and the operands."""
    if node.target is aten.einsum.default:
        return str(node.args[0]), node.args[1]
    left, right, *summed = node.args
    dims = _dims(left), _dims(right)
    return tensordot_equation(dims, *summed), (left, right)  # type: ignore[arg-type]


def _einsum(equation: str, operands: object, weights: Container[fx.Node]) -> Product | None:
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    pair = _pair(operands[0], operands[1], weights)
    if pair is None:
        return None
    weight, other, side = pair
    dims = [_dims(operand) for operand in operands]
    found = read_equation(equation, side, (dims[0], dims[1]))
    if found is None:
        return None
    layout = Layout(order=found.weight, stacked=found.stacked, out=found.out)
    if layout.summed(_sizes(weight)) != found.rows.sizes(_sizes(other))[-found.rows.summed :]:
        return None  # a dimension of size 1 is broadcast
    return Product(weight, other, layout, found.rows)


def _grouped(node: fx.Node, weights: Container[fx.Node]) -> Product | None:
    inputs, stack, *rest = node.args
    ends = rest[0] if rest else node.kwargs.get("offs")
    if not (
        isinstance(inputs, fx.Node) and isinstance(stack, fx.Node) and isinstance(ends, fx.Node)
    ):
        return None
    if inputs in weights or stack not in weights or (_dims(inputs), _dims(stack)) != (2, 3):
        return None
    return Product(stack, inputs, Layout(turned=True), Rows(), Route(ends, ends=True))


def _sizes(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _dims(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _schema_name(node: fx.Node) -> str:
    target = node.target
    schema = schema_of(target)
    return "" if schema is None else str(schema.name)
