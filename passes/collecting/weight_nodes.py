"""The nodes that read a weight, or are computed from weights alone, and how to recompute them.

Weights and their views are not kept between blocks, because they would keep the memory of weights
that are offloaded by then. After a weight is replaced by a quantized one, the nodes computed from
it are recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from magr_fx.passes.collecting.runner import Runner
from magr_fx.passes.graphs.trace import Trace, attribute, is_mutation
from magr_fx.passes.graphs.unsupported_weights import is_plain
from magr_fx.passes.graphs.weight_views import VIEWS, WeightView

Replaced = Mapping[WeightView, torch.Tensor]  # quantized tensors to read in place of parameters


class WeightNodes:
    """Which nodes of the traced graphs read weights, or are computed from weights alone.

    Args:
        traces: the graphs.
        replaceable: whether weights will be replaced; if not, only views are looked for.
    """

    def __init__(self, traces: Iterable[Trace], *, replaceable: bool) -> None:
        self._reads: dict[fx.Node, WeightView] = {}  # a parameter, as it is stored
        self._made_of: dict[fx.Node, set[WeightView]] = {}
        self._views: set[fx.Node] = set()  # views of one parameter
        self._as_stored: dict[nn.Parameter, WeightView] = {}  # before they are loaded
        for trace in traces:
            self._find_views(trace)
            if replaceable:
                self._find_reads(trace)

    def by_view(self, replacements: Mapping[nn.Parameter, torch.Tensor]) -> Replaced:
        """The replacements, by keys that do not change when a weight is loaded to a device."""
        return {self._as_stored[p]: value for p, value in replacements.items()}

    def is_recomputed(self, node: fx.Node) -> bool:
        """Whether the node is run again in each block that needs it, and its value is not kept."""
        return node.op == "get_attr" or node in self._views

    def views_among(self, nodes: Iterable[fx.Node], *, but: set[fx.Node]) -> list[fx.Node]:
        """The views of weights among ``nodes``, each once, without those in ``but``."""
        return [n for n in dict.fromkeys(nodes) if n in self._views and n not in but]

    def replacement(self, node: fx.Node, replaced: Replaced) -> torch.Tensor | None:
        """The replacement of the parameter that the node reads; None if there is none."""
        view = self._reads.get(node)
        return None if view is None else replaced.get(view)

    def is_made_of(self, node: fx.Node, replaced: Replaced) -> bool:
        """Whether the node is computed from a weight that is replaced."""
        return not self._made_of.get(node, set()).isdisjoint(replaced)

    def value(self, node: fx.Node, runner: Runner, replaced: Replaced) -> Any:
        """The value of a node that is a tensor of the model, or a view of one."""
        instead = self.replacement(node, replaced)
        if instead is not None:
            return instead
        runner.env = {n: self.value(n, runner, replaced) for n in node.all_input_nodes}
        return runner.run_node(node)

    def recompute(
        self, node: fx.Node, env: Mapping[fx.Node, Any], runner: Runner, replaced: Replaced
    ) -> Any:
        """The value of a view or cast from an earlier block, computed from replaced weights."""
        instead = self.replacement(node, replaced)
        if instead is not None:
            return instead
        if node.op != "get_attr" and node not in self._made_of:
            return env[node]  # a size
        runner.env = {s: self.recompute(s, env, runner, replaced) for s in node.all_input_nodes}
        return runner.run_node(node)

    def _find_views(self, trace: Trace) -> None:
        for node in trace.graph_module.graph.nodes:
            sources = node.all_input_nodes
            if node.target not in VIEWS or len(sources) != 1:
                continue
            (source,) = sources
            if source in self._views or isinstance(attribute(trace, source), nn.Parameter):
                self._views.add(node)

    def _find_reads(self, trace: Trace) -> None:
        for node in trace.graph_module.graph.nodes:
            stored, made_of = attribute(trace, node), set[WeightView]()
            if isinstance(stored, nn.Parameter) and is_plain(stored) and stored.dim() >= 2:
                self._reads[node] = self._as_stored[stored] = WeightView.of(stored)
                made_of = {self._reads[node]}
            elif not is_mutation(node) and all(map(self._is_weight_or_size, node.all_input_nodes)):
                made_of = set().union(
                    *(self._made_of.get(source, set()) for source in node.all_input_nodes)
                )
            if made_of:
                self._made_of[node] = made_of

    def _is_weight_or_size(self, node: fx.Node) -> bool:
        return node in self._made_of or isinstance(node.meta.get("val"), (int, torch.SymInt))
