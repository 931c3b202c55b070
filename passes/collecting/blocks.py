"""Cut a traced graph into blocks (a transformer's layers), so that one is worked on at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import torch
from torch import fx

from magr_fx.passes.finding.weight_uses import Call
from magr_fx.passes.graphs.trace import Trace, attribute, is_mutation
from magr_fx.passes.graphs.vmap import vmap_depth
from magr_fx.passes.graphs.weight_views import COPIES, VIEWS

_ALIASES = VIEWS | COPIES  # some copies are none where there is nothing to change


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive nodes of one trace.

    ``label`` is the layer's module path, what started the block within the layer, and how often
    the trace came back to both. ``nodes`` are in
    running order; those not in ``run`` are only visited: their inputs matter, their result does
    not. After a node has run, nobody reads the values ``dead_after[node]`` again.
    """

    trace: Trace
    label: tuple[str, Hashable]
    nodes: tuple[fx.Node, ...]
    run: frozenset[fx.Node]
    dead_after: dict[fx.Node, list[fx.Node]]


def cut_into_blocks(
    trace: Trace,
    calls: Sequence[Call],
    *,
    before: Mapping[fx.Node, Hashable] = MappingProxyType({}),
    reads: Mapping[fx.Node, Sequence[fx.Node]] = MappingProxyType({}),
) -> list[Block]:
    """The part of the graph that the inputs of the calls depend on, in running order.

    A block starts where the module path enters another layer (``model.layers.3``); what lies
    between two layers belongs to the one before it. What no call depends on, such as the logits
    of a tied head, is not run at all.

    Args:
        trace: the graph.
        calls: the matmuls whose inputs are wanted.
        before: nodes that start another block of the same layer, and what the blocks of other
            traces that belong to the same step have in common with it.
        reads: for some calls' nodes, what else is looked at just before them.
    """
    visited = {call.node for call in calls}
    looked_at: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for call in calls:
        looked_at[call.node].extend((*call.reads, *reads.get(call.node, ())))
    run = _ancestors(trace, visited, chain.from_iterable(looked_at.values()))
    kept = run | visited
    containers = _containers_of_layers(visited)
    pieces: list[tuple[tuple[str, Hashable], list[fx.Node]]] = [(("", None), [])]
    vmaps = 0
    for node in trace.graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr") or node not in kept:
            continue
        current = pieces[-1][0][0]
        layer = next((item for c, item in _numbered(node) if c in containers), current)
        inside, vmaps = vmaps, vmaps + vmap_depth(node)
        if not inside and (layer != current or node in before):  # a region of vmap runs as one
            pieces.append(((layer, before.get(node)), []))
        pieces[-1][1].append(node)
    pieces = [(name, nodes) for name, nodes in pieces if nodes]

    last_reader = {
        value: node
        for _, nodes in pieces
        for node in nodes
        for value in (node, *node.all_input_nodes, *looked_at.get(node, ()))
    }
    dead_after: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for value, reader in last_reader.items():
        dead_after[reader].append(value)
    times: Counter[tuple[str, Hashable]] = Counter()
    blocks = []
    for piece, nodes in pieces:
        (layer, mark), times[piece] = piece, times[piece] + 1
        stored = dict.fromkeys(
            value
            for node in nodes
            for value in (*node.all_input_nodes, *looked_at.get(node, ()))
            if value.op == "get_attr"
        )
        label = (layer, times[piece] if mark is None else (mark, times[piece]))
        blocks.append(Block(trace, label, (*stored, *nodes), run.union(stored), dead_after))
    return blocks


def in_step(blocks_of_traces: Iterable[Sequence[Block]]) -> Iterator[list[Block]]:
    """Blocks to be run next, one or more traces at a time, so that one layer is alive at a time.

    Each trace keeps its own order. Traces that come to the same layer (text with and without an
    image, say) do it in the same step; where their orders contradict each other they take turns.
    """
    queues = [list(blocks) for blocks in blocks_of_traces if blocks]
    while queues:
        heads = [queue[0].label for queue in queues]
        later = {block.label for queue in queues for block in queue[1:]}
        label = next((head for head in heads if head not in later), heads[0])
        yield [queue.pop(0) for queue in queues if queue[0].label == label]
        queues = [queue for queue in queues if queue]


def _ancestors(trace: Trace, calls: set[fx.Node], inputs: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Everything that has to run so that the inputs of the calls are right."""
    order = {node: at for at, node in enumerate(trace.graph_module.graph.nodes)}
    last = max(map(order.__getitem__, calls), default=-1)
    # These have no reader that the graph shows; before the last call they may matter.
    unread = (n for n in order if is_mutation(n) or vmap_depth(n))
    pending = [*inputs, *(n for n in unread if order[n] < last)]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return frozenset(found)


def _numbered(node: fx.Node) -> list[tuple[str, str]]:
    """Each numbered module on the node's path, outermost first: (its container, itself)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return []
    parts = list(stack.values())[-1][0].split(".")
    return [
        (".".join(parts[:at]), ".".join(parts[: at + 1]))
        for at, part in enumerate(parts)
        if part.isdigit()
    ]


def _containers_of_layers(calls: Iterable[fx.Node]) -> set[str]:
    """The containers that cut well: no item holds more than half of the container's calls.

    Sequential(model, head) does not, and leaves the cutting to the layers inside the model.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for node in calls:
        for container, item in _numbered(node):
            counts[container][item] += 1
    return {c for c, items in counts.items() if max(items.values()) * 2 <= items.total()}


def read_by(blocks: Iterable[Block]) -> list[torch.Tensor]:
    """The stored tensors that the blocks read, or something that may share their memory."""
    found: dict[int, torch.Tensor] = {}
    for block in blocks:
        for node in block.nodes:
            for value in (node, *node.all_input_nodes):
                tensor = attribute(block.trace, _origin(value))
                if tensor is not None:
                    found[id(tensor)] = tensor
    return list(found.values())


def _origin(value: fx.Node) -> fx.Node:
    while value.target in _ALIASES and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value
