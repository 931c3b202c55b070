"""Two rows of a large batch, where a graph and its model agree on these only if they do on all.

A graph with an open number of rows is one function, whatever that number is. So is a model whose
code looks at no tensor's values: it takes the same way for other rows. What is left to chance is
which values a row happens to have. So there have to be many, and of a kind that each row has:
pixels, not tokens, padding or masks, of which the first rows may have none.
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

MANY = 2**14  # values in a row; of fewer, all rows are quickly computed


@dataclass(frozen=True)
class TwoRows:
    """Inputs of two rows for a graph and for its model, of which only the first is the same.

    So what the rows of a batch have of one another is a difference between the two as well.

    Attributes:
        of_graph, of_model: the bound arguments of ``forward``, flattened.
        dims: for each output the dimension that its rows are in; None: it has none.
    """

    of_graph: list[Any]
    of_model: list[Any]
    dims: list[int | None]

    def shared(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of the outputs for either, what is of the row that both have.

        Raises:
            ValueError: there are not as many as the graph has.
        """
        return [
            output if dim is None else output.chunk(2, dim)[0]
            for output, dim in zip(outputs, self.dims, strict=True)
        ]


def two_rows(graph_module: fx.GraphModule, leaves: list[Any], spec: TreeSpec) -> TwoRows | None:
    """Two rows of the input for each, or None where all of it has to be compared.

    Args:
        graph_module: by torch.export.
        leaves, spec: the bound arguments of ``forward``, flattened.
    """
    tensors = _tensors(leaves)
    if not _are_large(tensors) or not all(map(_is_measured, tensors)):
        return None
    names = {name for name, _ in named_leaves(tree_unflatten(leaves, spec))}
    names |= {name for call in graph_module.meta.get(CALLS, ()) for name, _ in call.arguments}
    if any("mask" in name or "padding" in name for name in names):
        return None
    if any(is_random(node) for node in all_nodes(graph_module)):
        return None  # which numbers a row gets depends on how many rows there are
    dims = _dims_of_rows(graph_module)
    few = [_rows_of(leaves, rows) for rows in ([0, 1], [0, 2])]
    if dims is None or not all(fits(graph_module, tuple(_tensors(chosen))) for chosen in few):
        return None
    return TwoRows(few[0], few[1], dims)


def _are_large(tensors: list[torch.Tensor]) -> bool:
    """Whether all have the same number of rows, more than two, and these many values."""
    rows = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(rows) != 1 or min(rows) < 3:
        return False
    return sum(tensor[0].numel() for tensor in tensors) >= MANY


def _is_measured(tensor: torch.Tensor) -> bool:
    """Whether the values are no indices, no flags and no mask, which are whole numbers or inf."""
    return tensor.is_floating_point() and bool((tensor != tensor.round()).any())


def _dims_of_rows(graph_module: fx.GraphModule) -> list[int | None] | None:
    """Where each output of the graph has its rows; None for an output that has none.

    None for all of them, unless each input has an open number of rows in its first dimension only,
    and each output in one at most.
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
    """The leaves with these rows only; what is one tensor stays one."""
    chosen = {id(tensor): tensor[rows] for tensor in _tensors(leaves)}
    return [chosen.get(id(leaf), leaf) for leaf in leaves]


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
