"""Cut a traced graph into blocks (a transformer's layers), which are worked on one at a time."""

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

_ALIASES = VIEWS | COPIES  # some copies, such as aten.to, return their input if nothing changes


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive nodes of one trace.

    ``label`` is the layer's module path and what started the block within the layer, with a count
    of the blocks of the trace that have both in common. ``nodes`` are in running order. Those not
    in ``run`` are not run: only their inputs are needed. After a node of ``dead_after``, no later
    node reads the values listed for it.
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
    """The blocks of a graph in running order: the nodes that the inputs of the calls depend on.

    A block starts where the module path enters another layer (``model.layers.3``). Nodes between
    two layers belong to the first of them. Nodes that no call depends on, such as the logits of a
    tied head, are left out.

    Args:
        trace: the graph.
        calls: the matmuls whose inputs are captured.
        before: nodes that start another block of the same layer, each with a mark. Blocks of other
            traces with the same layer and mark belong to the same step.
        reads: for the nodes of some calls, further nodes whose values are read just before them.
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
        if not inside and (layer != current or node in before):  # a vmap region is not cut
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
    """The steps of a run: each is the list of blocks, of one or more traces, that are run next.

    Each trace keeps its own order. Traces that contain the same layer (for instance text with and
    without an image) run it in the same step, so that only one layer has to be in memory. If their
    orders contradict each other, a layer takes several steps.
    """
    queues = [list(blocks) for blocks in blocks_of_traces if blocks]
    while queues:
        heads = [queue[0].label for queue in queues]
        later = {block.label for queue in queues for block in queue[1:]}
        label = next((head for head in heads if head not in later), heads[0])
        yield [queue.pop(0) for queue in queues if queue[0].label == label]
        queues = [queue for queue in queues if queue]


def _ancestors(trace: Trace, calls: set[fx.Node], inputs: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """All nodes that have to run to compute the inputs of the calls."""
    order = {node: at for at, node in enumerate(trace.graph_module.graph.nodes)}
    last = max(map(order.__getitem__, calls), default=-1)
    # Their effects are not edges of the graph; before the last call they may change an input.
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
    """Each numbered module on the node's path, outermost first: (path of its container, path)."""
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
    """The containers whose items become layers: no item has more than half of the calls.

    Sequential(model, head), for instance, is not one, so the layers inside the model are used.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for node in calls:
        for container, item in _numbered(node):
            counts[container][item] += 1
    return {c for c, items in counts.items() if max(items.values()) * 2 <= items.total()}


def read_by(blocks: Iterable[Block]) -> list[torch.Tensor]:
    """The model's tensors that the blocks read, directly or through views and possible copies."""
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
