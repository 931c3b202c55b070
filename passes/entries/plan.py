"""Plan a run on a model without weights: what it would rewrite, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from magr_fx.costs.planning import (
    Method,
    Shape,
    calibration_flops,
    gram_bytes,
    solve_flops,
    solver_bytes,
)
from magr_fx.passes.collecting.blocks import Block, read_by
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import FilterFn, Found, find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.resident import PlaceholderParameter
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing


@dataclass(frozen=True)
class Plan:
    """The sites and the number of blocks; bytes of the model as it is stored, and at their most of
    a block's weights, its grams, a solve, and the activations between two blocks; and FLOPs.
    """

    found: Found
    blocks: int
    model: int
    block: int
    grams: int
    solver: int
    boundary: int
    calibration: float
    solve: float

    @property
    def memory(self) -> int:
        """Bytes at the peak, without those of Python and its libraries (0.5 GB)."""
        return self.block + self.grams + self.solver + self.boundary


def plan(
    model: nn.Module,
    tokens: int,
    window: tuple[int, int],
    method: Method,
    *,
    filter_fn: FilterFn | None = None,
    routed: float = 1.0,
) -> Plan:
    """Trace a model without weights, and count its sites and the costs of a run.

    Args:
        model: on the meta device. Its parameters are replaced by CPU parameters without memory.
        tokens: the number of calibration tokens.
        window: ``[batch, length]`` of each batch of token ids.
        method: how the weights are solved.
        filter_fn: as for :func:`magr_fx.magr_transform`.
        routed: the share of the tokens that reach each expert of a stack.

    Raises:
        MagRError: the model cannot be traced, or has nothing to rewrite.
    """
    _reserve(model)
    with calibration_mode(model):
        batches = read_calib([torch.zeros(window, dtype=torch.long, device="cpu")], model)
        traced = trace_or_read(model, batches, Tracing("export", has_values=False))
        found = find_linears([traced[0].trace], model, filter_fn)
    run = CalibrationRun(traced, found.sites, propagate=method.search)
    steps = run.steps()
    shapes = {}
    for shared in run.grams:
        expert = "[" in shared.sites[0].name  # a matrix of a stack is named with its index
        rows = sum(site.shape[0] for site in shared.sites)
        shapes[shared] = Shape(rows, shared.sites[0].shape[1], routed if expert else 1.0)
    visited = [{node for block in step for node in block.nodes} for step in steps]
    together = [[shapes[one] for one in run.grams if one.pending & nodes] for nodes in visited]
    bytes_of = {id(p): p.nbytes for p in model.parameters()}
    boundary = max(_boundary_bytes(steps)) * tokens / math.prod(window)  # it was of one batch
    return Plan(
        found,
        len(steps),
        model=sum(bytes_of.values()),
        block=max(sum(bytes_of.get(id(t), 0) for t in read_by(step)) for step in steps),
        grams=max(gram_bytes(one, method) for one in together),
        solver=max(solver_bytes(shape, method) for shape in shapes.values()),
        boundary=int(boundary) * (1 + method.search),
        calibration=calibration_flops(shapes.values(), tokens, method),
        solve=solve_flops(shapes.values(), method),
    )


def _reserve(model: nn.Module) -> None:
    """Replace every parameter by a CPU parameter without memory, every meta buffer by zeros."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = PlaceholderParameter(parameter).parameter
                module._parameters[key] = known[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros_like(buffer, device="cpu")


def _boundary_bytes(steps: Sequence[list[Block]]) -> list[int]:
    """After each step: bytes of the traced batch's activations that later blocks read."""
    alive: dict[fx.Node, int] = {}
    sizes = []
    for block, last in ((block, block is step[-1]) for step in steps for block in step):
        for node in block.nodes:
            if node.op != "get_attr" and node in block.run:
                alive[node] = _bytes(node)
            for dead in block.dead_after.get(node, ()):
                alive.pop(dead, None)
        if last:
            sizes.append(sum(alive.values()))
    return sizes


def _bytes(node: fx.Node) -> int:
    """Of a node's tensor, at the sizes of the traced batch."""
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    sizes = (size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape)
    return math.prod(map(int, sizes)) * value.element_size()
