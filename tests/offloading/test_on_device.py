"""Graphs that were traced on the CPU say, and hold, everything of another device afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from magr_fx import ModelError
from magr_fx.passes.graphs.inline import AUTOCAST
from magr_fx.passes.graphs.trace import TracedBatch, attributes
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.on_device import on_device
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

META = torch.device("meta")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.inner.register_buffer("scale", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x * self.inner.get_buffer("scale"))
        there: torch.Tensor = y.to("cpu", torch.float32) + places + torch.tensor([1.0])
        return there


def traced(model: nn.Module, batches: list[torch.Tensor]) -> list[TracedBatch]:
    return trace_or_read(model.eval(), read_calib(batches, model), Tracing("export", False))


def devices(batches: list[TracedBatch]) -> set[torch.device]:
    """All that the graphs name, hold beside weights, and are given."""
    found: set[torch.device] = set()
    for batch in batches:
        graph_module = batch.trace.graph_module
        held: list[Any] = [*batch.values, *attributes(graph_module)]
        found |= {t.device for t in held if not isinstance(t, nn.Parameter)}
        for node in graph_module.graph.nodes:
            leaves = tree_leaves((node.args, node.kwargs))
            found |= {leaf for leaf in leaves if isinstance(leaf, torch.device)}
            found |= {torch.device(name) for name in node.meta.get(AUTOCAST, {})}
    return found


def test_everything_is_there() -> None:
    model = Model()
    inputs = torch.rand(3, 4)
    before = traced(model, [inputs, torch.rand(5, 4)])
    assert devices(before) == {torch.device("cpu")}
    nodes = [node for node in before[0].trace.graph_module.graph.nodes if AUTOCAST in node.meta]
    regions = [node.meta[AUTOCAST]["cpu"] for node in nodes]
    moved = on_device(before, META)
    assert devices(moved) == {META}
    assert [node.meta[AUTOCAST]["meta"] for node in nodes] == [
        ("meta", *region[1:]) for region in regions
    ]
    assert regions
    # The model, its weights and what was given stay where they are.
    kept: Any = model.inner.scale
    assert {kept.device, model.linear.weight.device, inputs.device} == {torch.device("cpu")}
    assert moved[0].trace.graph_module.get_parameter("model.linear.weight") is model.linear.weight


def test_what_two_traces_share_they_still_share() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> Any:
            self.calls.add_(1)  # type: ignore[operator]
            return self.linear(x)

    batches = traced(Counts(), [torch.rand(3, 4), torch.rand(2, 3, 4)])
    first, second = (batch.trace.graph_module for batch in batches)
    assert first is not second
    on_device(batches, META)
    assert first.get_buffer("model.calls") is second.get_buffer("model.calls")


def test_a_weight_under_another_name_is_refused() -> None:
    batches = traced(Model(), [torch.rand(3, 4)])
    graph_module = batches[0].trace.graph_module
    weight = graph_module.get_parameter("model.linear.weight")
    inner: Any = graph_module.get_submodule("model.inner")
    inner.scale = weight.detach()[0]
    with pytest.raises(ModelError, match=r"of shape \(4,\) through a tensor that is no parameter"):
        on_device(batches, META)
