"""Check whether an exported graph is valid for an input, by its traced shapes and its guards."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from magr_fx.passes.graphs.torch_private import expression_of, statically_known_true
from magr_fx.passes.graphs.trace import GUARDS


def fits(graph_module: fx.GraphModule, values: tuple[Any, ...]) -> bool:
    """Whether the graph is valid for these placeholder values, by its shapes and its guards."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(values):
        return False
    sizes: dict[Any, int] = {}  # the size that each symbol has in these values
    pairs = zip(placeholders, values, strict=True)
    if not all(_fits(node.meta.get("val"), value, sizes) for node, value in pairs):
        return False
    guards = getattr(graph_module, GUARDS, None)
    try:
        if guards is not None:
            guards(*values)
    except AssertionError:  # what torch.export's guards raise
        return False
    return True


def _fits(traced: Any, value: Any, sizes: dict[Any, int]) -> bool:
    """Whether a value has the traced dtype and sizes; ``sizes`` is what symbols stand for."""
    if not isinstance(traced, torch.Tensor):
        return True
    if not isinstance(value, torch.Tensor):
        return False
    if (traced.dtype, traced.dim()) != (value.dtype, value.dim()):
        return False
    for size, given in zip(traced.shape, value.shape, strict=True):
        expected: int = size
        if isinstance(size, torch.SymInt):
            expected = sizes.setdefault(expression_of(size), given)
            # It was traced as "2 or more": a size of 1 would broadcast or squeeze differently.
            if given < 2 and statically_known_true(size >= 2):
                return False
        if expected != given:
            return False
    return True
