"""Model without weights → the sites a run would rewrite, and its costs; no forward pass is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from magr_fx.costs.planning import (
    Costs,
    Method,
    Shape,
    forward_flops,
    gram_bytes,
    gram_flops,
    solve_flops,
    solver_bytes,
)
from magr_fx.passes.collecting.blocks import Block, read_by
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import FilterFn, Rejection, Site, find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.resident import PlaceholderParameter
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        sites: the weights that it would rewrite.
        rejections: the weights that it would leave as they are, each with the reason.
        blocks: the number of blocks that are worked on one after the other.
        costs: time and memory.
        largest: the largest weight, by the number of its elements.
    """

    sites: list[Site]
    rejections: list[Rejection]
    blocks: int
    costs: Costs
    largest: Shape


def plan(
    model: nn.Module,
    tokens: int,
    window: tuple[int, int],
    method: Method,
    *,
    filter_fn: FilterFn | None = None,
    routed: float = 1.0,
    stored: int | None = None,
    copies: int = 2,
) -> Plan:
    """Trace a model without weights, and count its sites and the costs of a run.

    Args:
        model: on the meta device. Its parameters are replaced by CPU parameters without memory.
        tokens: the number of calibration tokens.
        window: ``[batch, length]`` of each batch of token ids.
        method: how the weights are solved.
        filter_fn: as for :func:`magr_fx.magr_transform`.
        routed: the share of the tokens that reach each expert of a stack.
        stored: bytes of the weights on the disk; None counts the model's parameters.
        copies: the largest number of copies of the weights on the disk, not counting the model.

    Raises:
        MagRError: the model cannot be traced, or has nothing to rewrite.
    """
    _reserve(model)
    example = torch.zeros(window, dtype=torch.long, device="cpu")
    with calibration_mode(model):
        traced = trace_or_read(
            model, read_calib([example], model), Tracing("export", has_values=False)
        )
        found = find_linears([traced[0].trace], model, filter_fn)
    run = CalibrationRun(traced, found.sites, propagate=method.search)
    steps = run.steps()
    shapes = {id(shared): _shape(shared, routed) for shared in run.grams}
    every = list(shapes.values())
    batches = tokens / math.prod(window)  # the boundary was measured on one
    boundary = int(max(_boundary_bytes(steps)) * batches) * method.runs
    bytes_of = {id(p): p.nbytes for p in model.parameters()}
    total = stored or sum(bytes_of.values())
    costs = Costs(
        forward=forward_flops(every, tokens, method),
        gram=gram_flops(every, tokens, method),
        solve=solve_flops(every, method),
        model=total,
        block=max(sum(bytes_of.get(id(t), 0) for t in read_by(step)) for step in steps),
        grams=max(
            gram_bytes([shapes[id(shared)] for shared in alive], method)
            for alive in _grams_in_memory(steps, run.grams)
        ),
        solver=max(solver_bytes(shape, method) for shape in every),
        boundary=boundary,
        disk=copies * total + 2 * boundary,  # a saved state is kept until the next is complete
    )
    largest = max(every, key=lambda shape: shape.rows * shape.inputs)
    return Plan(found.sites, found.rejections, len(steps), costs, largest)


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


def _shape(shared: SharedGram, routed: float) -> Shape:
    """Rows of all the sites of a gram, their inputs, and the share of the tokens they read."""
    rows = sum(site.shape[0] for site in shared.sites)
    of_a_stack = "[" in shared.sites[0].name  # a matrix of a stack is named with its index
    return Shape(rows, shared.sites[0].shape[1], routed if of_a_stack else 1.0)


def _grams_in_memory(
    steps: Sequence[list[Block]], grams: list[SharedGram]
) -> list[list[SharedGram]]:
    """The grams in memory in each step: a gram is kept from its first activation to its last."""
    visited = [{node for block in step for node in block.nodes} for step in steps]
    alive: list[list[SharedGram]] = [[] for _ in steps]
    for shared in grams:
        taken = [at for at, nodes in enumerate(visited) if nodes & shared.pending]
        for at in range(taken[0], taken[-1] + 1):
            alive[at].append(shared)
    return alive


def _boundary_bytes(steps: Sequence[list[Block]]) -> list[int]:
    """After each step: bytes of the traced batch's activations that later blocks read."""
    alive: dict[fx.Node, int] = {}
    sizes = []
    for step in steps:
        for block in step:
            for node in block.nodes:
                if node.op != "get_attr" and node in block.run:
                    alive[node] = _bytes(node)
                for dead in block.dead_after.get(node, ()):
                    alive.pop(dead, None)
        sizes.append(sum(alive.values()))
    return sizes


def _bytes(node: fx.Node) -> int:
    """Bytes of a node's tensor for the traced batch; a symbolic size counts with its hint."""
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    sizes = (size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape)
    return math.prod(map(int, sizes)) * value.element_size()
