"""The state between two steps, for each run of the model: values of each batch, and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from magr_fx.passes.collecting.boundary import Environment, boundary, restore
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.graphs.trace import (
    Trace,
    TracedBatch,
    attributes,
    is_mutation,
    written_in_place,
)


class Streams:
    """One run of the model over the calibration, or two side by side.

    Args:
        batches: the batches that are run.
        traces: all graphs. Each run has its own values of the buffers that they write in place.
        runs: 1, or 2: then the first is the quantized run, and the second the original one.

    Attributes:
        runs: for each run and each batch, the values that later blocks read.
    """

    def __init__(self, batches: Sequence[TracedBatch], traces: Iterable[Trace], runs: int) -> None:
        traces = list(traces)
        self._graphs = [batch.trace.graph_module.graph for batch in batches]
        self.runs = [[_inputs(batch) for batch in batches] for _ in range(runs)]
        self._stored = [t for trace in traces for t in attributes(trace.graph_module)]
        self._changed = written_in_place(traces)
        # The quantized run's values. The buffers themselves have those of the other run.
        self._other = [buffer.detach().clone() for buffer in self._changed]

    @torch.no_grad()
    def swap_buffers(self) -> None:
        """Exchange the values in the buffers with those of the other run."""
        for buffer, values in zip(self._changed, self._other, strict=True):
            kept = buffer.detach().clone()
            buffer.copy_(values)
            values.copy_(kept)

    def state(
        self, grams: Sequence[SharedGram], devices: Iterable[torch.device]
    ) -> partial[dict[str, Any]]:
        """A function that returns the state to resume from, see :func:`boundary`."""
        written = [*self._changed, *self._other]
        return partial(boundary, self.runs, grams, written, self._stored, devices)

    def restore(self, saved: Any, grams: Sequence[SharedGram], *, keep_spilled: bool) -> None:
        """Load a state of :meth:`state`; ``keep_spilled`` is as for :func:`restore`."""
        written = [*self._changed, *self._other]
        restore(
            saved, self.runs, self._graphs, grams, written, self._stored, keep_spilled=keep_spilled
        )


def _inputs(batch: TracedBatch) -> Environment:
    graph = batch.trace.graph_module.graph
    values = batch.values
    if any(is_mutation(node) for node in graph.nodes):
        # The model may change its inputs in place, and they are the caller's tensors.
        values = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in values)
    return dict[fx.Node, Any](zip(graph.find_nodes(op="placeholder"), values, strict=True))
