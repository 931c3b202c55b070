"""Choose two rows of a large batch that are enough to compare an exported graph with its model.

A graph with a dynamic number of rows is one function for every number of rows. So is a model whose
code reads no tensor's values: it takes the same branches for other rows. Only the values of the
chosen rows are left to chance. So a row must have many values, of a kind that every row has: pixels
are, but not tokens, padding or masks, which may first occur in later rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from magr_fx.passes.graphs.decisions import is_random
from magr_fx.passes.graphs.module_calls import CALLS, named_leaves
from magr_fx.passes.graphs.torch_private import TreeSpec, expression_of, tree_leaves, tree_unflatten
from magr_fx.passes.graphs.trace import all_nodes
from magr_fx.passes.tracing.input_fit import fits

MIN_VALUES = 2**14  # values in a row; with fewer, all rows are computed quickly


@dataclass(frozen=True)
class TwoRows:
    """Two rows of input for a graph, and two for its model; only the first row is the same.

    So the outputs also differ if the output of one row depends on the other row.

    Attributes:
        of_graph, of_model: the bound arguments of ``forward``, flattened.
        dims: for each output, the dimension of its rows; None if it has no rows.
    """

    of_graph: list[Any]
    of_model: list[Any]
    dims: list[int | None]

    def shared(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The part of the outputs, of the graph or the model, that belongs to the shared row.

        Raises:
            ValueError: the number of outputs is not that of the graph.
        """
        return [
            output if dim is None else output.chunk(2, dim)[0]
            for output, dim in zip(outputs, self.dims, strict=True)
        ]


def two_rows(graph_module: fx.GraphModule, leaves: list[Any], spec: TreeSpec) -> TwoRows | None:
    """Two rows of the input for each, or None if all rows have to be compared.

    Args:
        graph_module: made by torch.export.
        leaves, spec: the bound arguments of ``forward``, flattened.
    """
    tensors = _tensors(leaves)
    if not _have_many_values(tensors) or not all(map(_has_fractions, tensors)):
        return None
    names = {name for name, _ in named_leaves(tree_unflatten(leaves, spec))}
    names |= {name for call in graph_module.meta.get(CALLS, ()) for name, _ in call.arguments}
    if any("mask" in name or "padding" in name for name in names):
        return None
    if any(is_random(node) for node in all_nodes(graph_module)):
        return None  # a row's random numbers depend on the number of rows
    dims = _dims_of_rows(graph_module)
    few = [_rows_of(leaves, rows) for rows in ([0, 1], [0, 2])]
    if dims is None or not all(fits(graph_module, tuple(_tensors(chosen))) for chosen in few):
        return None
    return TwoRows(few[0], few[1], dims)


def _have_many_values(tensors: list[torch.Tensor]) -> bool:
    """Whether all have the same number of rows, over two, and ``MIN_VALUES`` values in a row."""
    rows = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(rows) != 1 or min(rows) < 3:
        return False
    return sum(tensor[0].numel() for tensor in tensors) >= MIN_VALUES


def _has_fractions(tensor: torch.Tensor) -> bool:
    """Whether it has fractions: indices, flags and masks hold whole numbers and inf only."""
    return tensor.is_floating_point() and bool((tensor != tensor.round()).any())


def _dims_of_rows(graph_module: fx.GraphModule) -> list[int | None] | None:
    """The dimension of the rows in each output of the graph; None for an output without rows.

    None instead of the list unless the number of rows is dynamic, is the first size of every input
    and no other size of it, and is at most one size of each output.
    """
    inputs = [_shape(node) for node in graph_module.graph.find_nodes(op="placeholder")]
    outputs = [_shape(node) for node in tree_leaves(graph_module.graph.output_node().args)]
    if not inputs or not inputs[0]:
        return None
    rows = _symbols(inputs[0][0])
    of_inputs = [_dims_with(rows, shape) for shape in inputs]
    of_outputs = [_dims_with(rows, shape) for shape in outputs]
    if len(rows) != 1 or any(found != [0] for found in of_inputs):
        return None
    if any(len(found) > 1 for found in of_outputs):
        return None
    return [found[0] if found else None for found in of_outputs]


def _dims_with(rows: set[Any], shape: tuple[Any, ...]) -> list[int]:
    return [dim for dim, size in enumerate(shape) if rows & _symbols(size)]


def _symbols(size: Any) -> set[Any]:
    return set(expression_of(size).free_symbols) if isinstance(size, torch.SymInt) else set()


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _rows_of(leaves: list[Any], rows: list[int]) -> list[Any]:
    """The leaves with these rows only; a tensor that occurs twice stays one tensor."""
    chosen = {id(tensor): tensor[rows] for tensor in _tensors(leaves)}
    return [chosen.get(id(leaf), leaf) for leaf in leaves]


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
