"""graph node → the product of a weight and an input that it computes, if it is one."""

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
# Rows sorted by expert, [tokens, in], a stack [experts, in, out], and where each segment ends.
# By name: transformers registers its own for dtypes and devices that torch's does not serve.
GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
# Ops that multiply weights with inputs somewhere inside, where no one takes the inputs.
_INSIDE = frozenset(
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
    """How a weight lies in its operand: as ``[..., in, out]`` where ``turned``, or for einsum.

    Attributes:
        turned: whether the last two dimensions change places.
        order: einsum's permutation to those of the stack, of ``out`` and of ``in``.
        stacked, out: how many of the permuted dimensions are the stack's, and ``out``'s.
    """

    turned: bool = False
    order: tuple[int, ...] | None = None
    stacked: int = 0
    out: int = 1

    def summed(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Of an einsum operand's sizes, those that are summed over."""
        return tuple(sizes[dim] for dim in (self.order or ())[self.stacked + self.out :])

    def of(self, operand: torch.Tensor) -> torch.Tensor | None:
        """The operand as ``[..., out, in]``, in the same memory; None where that cannot be."""
        if self.order is not None:
            first = self.stacked + self.out
            ordered = _merged(operand.permute(self.order), first, operand.dim())
            if ordered is None:
                return None
            whole = _merged(ordered, self.stacked, first)
            # Rows that do not lie one after the other: a matrix for each of those that do, all of
            # which meet the same input.
            return ordered if whole is None and not self.stacked else whole
        return operand.mT if self.turned and operand.dim() > 1 else operand


def _merged(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
    """A view with these dimensions as one; None where they do not lie one after the other."""
    sizes = tensor.shape
    try:
        return tensor.view(*sizes[:start], sizes[start:stop].numel(), *sizes[stop:])
    except RuntimeError:
        return None


class Product(NamedTuple):
    """A weight, the input that it is multiplied with, and how both lie in their operands."""

    weight: fx.Node
    input: fx.Node
    layout: Layout
    rows: Rows
    route: Route | None = None
    direct: bool = False  # aten.linear: what torchao's tensors can run

    def stacks_like(self, dims: int) -> bool:
        """Whether the first ``dims`` dimensions of the weight, in order, are the stack.

        Or the first of ``out``: then every row meets each of the matrices.
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
        or _schema_name(node) in GROUPED | _INSIDE
    )


def product_of(node: fx.Node, weights: Container[fx.Node]) -> Product | None:
    """The product of exactly one of ``weights`` and one other value; None where it is none."""
    if node.target in (aten.einsum.default, aten.tensordot.default):
        return _einsum(*_equation(node), weights)
    if _schema_name(node) in GROUPED:
        return _grouped(node, weights)
    if node.target not in MATMULS:
        return None
    left, right, transposed = MATMULS[node.target]
    pair = _pair(node.args[left], node.args[right], weights)
    # Where the weight is the bias as well, the product is not its only use.
    if pair is None or node.args.count(pair[0]) != 1:
        return None
    weight, other, side = pair
    if node.target is aten.inner.default and _dims(weight) > 2:
        return None  # every matrix of the stack meets every row
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
    """(weight, other, the weight's side), where exactly one of the two is a weight."""
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if (left in weights) == (right in weights):
        return None
    return (left, right, 0) if left in weights else (right, left, 1)


def _equation(node: fx.Node) -> tuple[str, object]:
    """What an einsum or tensordot computes, and the operands."""
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
        return None  # a dimension of 1 is repeated
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
