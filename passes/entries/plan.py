"""model without weights → what a run on it would do and cost: traced and looked at, not run."""

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
    Work,
    attention_flops,
    disk_bytes,
    gram_bytes,
    gram_work,
    passes,
    solve_work,
    solver_bytes,
)
from magr_fx.passes.collecting.blocks import Block, read_by
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import FilterFn, Rejection, Site, find_linears
from magr_fx.passes.graphs.torch_private import OpOverload
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.resident import PlaceholderParameter
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Plan:
    """What would be rewritten, what not and why, in how many blocks, and what that costs.

    ``largest`` is the largest of the stacked weights that are solved as one problem.
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
    """Trace a model that has no weights, and count.

    Args:
        model: on the meta device; it gets parameters on the CPU that take up no memory.
        tokens: of the calibration.
        window: ``[batch, length]`` of each batch of token ids.
        method: how it is solved.
        filter_fn: as for :func:`magr_fx.magr_transform`.
        routed: the share of the tokens that reach each expert of a stack.
        stored: bytes of the weights on the disk; None counts the model's own.
        copies: of them that the disk holds at most, beside those.

    Raises:
        MagRError: the model cannot be traced, or has nothing to rewrite.
    """
    reserve(model)
    example = torch.zeros(window, dtype=torch.long, device="cpu")
    with calibration_mode(model):
        batches = read_calib([example], model)
        traced = trace_or_read(model, batches, Tracing("export", has_values=False))
        found = find_linears([traced[0].trace], model, filter_fn)
    run = CalibrationRun(traced, found.sites, propagate=method.propagate)
    steps = run.steps()
    share = tokens / (window[0] * window[1])  # of the one batch that was traced
    all_shapes = [_shape(shared, routed) for shared in run.grams]
    grams = max(
        gram_bytes([_shape(shared, routed) for shared in alive], method)
        for alive in _alive_together(steps, run.grams)
    )
    item = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    total = stored or sum(item.values())
    rewritten = {call.node for shared in run.grams for s in shared.sites for call in s.calls}
    alive = _alive(steps, rewritten)
    boundary = int(max(sum(sizes) for sizes in alive) * share) * (1 + method.propagate)
    states = [alike + differing * (1 + method.propagate) for alike, differing in alive]
    return Plan(
        found.sites,
        found.rejections,
        len(steps),
        Costs(
            forward=_forward(steps, run.grams, routed, window[0] * window[1]) * share,
            passes=passes(method),
            gram=gram_work(all_shapes, tokens, method, batches=math.ceil(share)),
            solve=solve_work(all_shapes, method),
            model=total,
            block=max(sum(item.get(id(t), 0) for t in read_by(step)) for step in steps),
            grams=grams,
            solver=max(solver_bytes(shape, method) for shape in all_shapes),
            boundary=boundary,
            disk=disk_bytes(total, copies, boundary),
            steps=len(steps),
            state=int(sum(states) / len(states) * share),
        ),
        max(all_shapes, key=lambda shape: shape.rows * shape.inputs),
    )


def reserve(model: nn.Module) -> None:
    """Give every parameter and buffer an address on the CPU, with no memory behind it."""
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


def _alive_together(
    steps: Sequence[list[Block]], grams: list[SharedGram]
) -> list[list[SharedGram]]:
    """Which grams there are in each step: from their first activation to their last."""
    visited = [{node for block in step for node in block.nodes} for step in steps]
    alive: list[list[SharedGram]] = [[] for _ in steps]
    for shared in grams:
        taken = [at for at, nodes in enumerate(visited) if nodes & shared.pending]
        for at in range(taken[0], taken[-1] + 1):
            alive[at].append(shared)
    return alive


def _shape(shared: SharedGram, routed: float) -> Shape:
    expert = "[" in shared.sites[0].name
    rows = sum(site.shape[0] for site in shared.sites)
    return Shape(rows, shared.sites[0].shape[1], routed if expert else 1.0)


def _alive(steps: Sequence[list[Block]], rewritten: set[fx.Node]) -> list[tuple[int, int]]:
    """Bytes of the values that later blocks read, after each step, for the traced batch.

    First of those that are the same before and after weights are quantized, then of the others:
    those that come from a matmul that reads one, ``rewritten``, and are no decision.
    """
    alive: dict[fx.Node, int] = {}
    differing = set(rewritten)
    sizes = []
    for step in steps:
        for block in step:
            for node in block.nodes:
                if not differing.isdisjoint(node.all_input_nodes) and not _is_decision(node):
                    differing.add(node)
                if node.op != "get_attr" and node in block.run:
                    alive[node] = _bytes(node)
                for dead in block.dead_after.get(node, ()):
                    alive.pop(dead, None)
        other = sum(size for node, size in alive.items() if node in differing)
        sizes.append((sum(alive.values()) - other, other))
    return sizes


def _is_decision(node: fx.Node) -> bool:
    """Whether it is of whole numbers, which the quantized run takes from the original one."""
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _forward(
    steps: Sequence[list[Block]], grams: list[SharedGram], routed: float, tokens: int
) -> Work:
    """The traced batch in what is run: linears, attention, experts, and whatever is elementwise."""
    products = elementwise = 0.0
    for block in (block for step in steps for block in step):
        for node in filter(block.run.__contains__, block.nodes):
            if node.target is _LINEAR:
                inputs = node.all_input_nodes[0].meta["val"].shape[-1]
                products += 2.0 * _numel(node) * _hint(inputs)
            elif node.target is _ATTENTION:
                query, key = (argument.meta["val"] for argument in node.all_input_nodes[:2])
                batch, heads, length, size = map(_hint, query.shape)
                products += attention_flops(1, heads * size, batch * length, _hint(key.shape[-2]))
            elif isinstance(node.target, OpOverload) and not node.target.is_view:
                values = [n for n in node.all_input_nodes if n.op != "get_attr"]
                elementwise += max(map(_numel, [node, *values]))  # a sum's is what it sums
    for shared in grams:
        for site in shared.sites:
            if all(call.node.target is not _LINEAR for call in site.calls):
                expert = routed if "[" in site.name else 1.0
                products += 2.0 * tokens * expert * site.shape[0] * site.shape[1]
    return Work(products=products, elementwise=elementwise)


def _bytes(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return _numel(node) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _numel(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    size = 1
    for dim in value.shape if isinstance(value, torch.Tensor) else ():
        size *= _hint(dim)
    return size


def _hint(size: Any) -> int:
    """A size of the traced batch, which is dynamic in the graph."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
