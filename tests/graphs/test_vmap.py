"""torch.vmap in a model: masks are often made by it, and are run; weights in it are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, Formula, assert_gram, collect, hook_grams, weight
from tiny_models import activations
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchao.quantization import IntxWeightOnlyConfig
from toys import INT, changed, report_of, state

from magr_fx import CoverageError, MagRConfig, TraceError, magr_quantize, magr_transform
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.decisions import is_decision
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.graphs.vmap import in_transform, is_batched, unwrapped, vmap_depth
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.trace_batches import Tracing, trace_batches

SIZE = 8
CALIB = [activations(3, 7, SIZE, seed=1), activations(3, 7, SIZE, seed=2)]
Function = Callable[..., Any]


def masked_attention(m: Any, x: Tensor) -> Any:
    """Its mask is made by torch.vmap, one query at a time, from the values of the input."""
    length = x.shape[1]
    keys = torch.vmap(torch.vmap(lambda key, query: (key <= query) & m.on, (0, None)), (None, 0))(
        torch.arange(length), torch.arange(length)
    )
    seen = torch.vmap(lambda row: row[None] | torch.eye(length, dtype=torch.bool))(x[..., 0] > -1)
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), attn_mask=keys & seen))


def attention() -> Formula:
    torch.manual_seed(0)
    linears = {name: nn.Linear(SIZE, SIZE) for name in "qkvo"}
    return Formula(masked_attention, on=nn.Buffer(torch.tensor(True)), **linears).eval()


def analyse(model: nn.Module, tracer: str) -> Analysis:
    batches = read_calib(CALIB, model)
    with calibration_mode(model):
        traced = trace_batches(model, batches, Tracing(tracer))
    return Analysis(model, CALIB, batches, traced, find_linears([b.trace for b in traced], model))


@pytest.mark.parametrize("tracer", ["export", "make_fx"])
def test_grams_behind_a_mask_that_vmap_makes(tracer: str) -> None:
    model = attention()
    analysis = analyse(model, tracer)
    # torch 2.12 has it in make_fx's graph as well.
    inside = any(map(vmap_depth, analysis.traces[0].graph_module.graph.nodes))
    assert inside or tracer == "make_fx"
    expected, _ = hook_grams(model, CALIB)
    grams = collect(analysis)
    assert set(grams) == {f"{name}.weight" for name in "qkvo"}
    for name, shared in grams.items():
        assert_gram(shared.gram, expected[name])


def test_by_make_fx_what_vmap_makes_is_of_its_batch() -> None:
    """It is a constant of the graph, which is shared with no other batch."""
    assert len(analyse(attention(), "make_fx").traces) == 2
    assert len(analyse(attention(), "export").traces) == 1


@pytest.mark.parametrize("trace", ["export", "make_fx"])
@pytest.mark.parametrize("propagate", [False, True])
def test_a_model_with_such_a_mask_is_quantized(trace: str, propagate: bool) -> None:
    model = attention()
    with torch.no_grad():
        before = model(CALIB[0])
    magr_quantize(
        model,
        CALIB,
        IntxWeightOnlyConfig(weight_dtype=INT[4]),
        trace=trace,
        propagate=propagate,
        strict=True,
        progress=False,
    )
    assert len(report_of(model).rewritten) == 4
    with torch.no_grad():
        after = model(CALIB[0])
    assert 0 < float((after - before).norm() / before.norm()) < 0.3


def test_what_exists_inside_vmap_only_is_no_decision() -> None:
    given, found = torch.ones(2, 3), []

    def look(x: Tensor) -> Tensor:
        found.extend([is_decision(x > 0), is_batched(x), in_transform()])
        found.append(unwrapped(x).data_ptr() == given.data_ptr())
        return x

    torch.vmap(torch.vmap(look))(given)
    assert found == [False, True, True, True]
    assert is_decision(given > 0)
    assert not is_batched(given)
    assert not in_transform()
    assert unwrapped(given) is given


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
INSIDE: dict[str, Function] = {
    "inputs": lambda m, x: m.a(x) + torch.vmap(lambda one: F.linear(one, m.w))(x),
    "weights": lambda m, x: m.a(x) + torch.vmap(lambda w: F.linear(x, w))(m.stack).sum(0),
}


def ensemble(function: Function) -> Formula:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(SIZE, SIZE), "w": weight(SIZE, SIZE), "stack": weight(2, SIZE, SIZE)}
    return Formula(function, **parts).eval()


@pytest.mark.parametrize(
    "name",
    [
        "inputs",
        pytest.param(
            "weights",
            marks=pytest.mark.skipif(TORCH < (2, 13), reason="by torch 2.12 the model is refused"),
        ),
    ],
)
def test_a_weight_inside_vmap_is_left_alone_with_its_reason(name: str) -> None:
    model = ensemble(INSIDE[name])
    before = state(model)
    magr_transform(model, CALIB, MagRConfig(damping=1e-3), progress=False)
    assert changed(model, before) == ["a.weight"]
    own = "w" if name == "inputs" else "stack"
    reasons = {site.name: site.reason for site in report_of(model).skipped}
    assert "aten.linear inside torch.vmap" in reasons[own]
    with pytest.raises(CoverageError, match=rf"{own}: read by aten\.linear inside torch\.vmap"):
        magr_transform(model, CALIB, strict=True)


@pytest.mark.parametrize("name", INSIDE)
def test_make_fx_refuses_weights_inside_vmap(name: str) -> None:
    model = ensemble(INSIDE[name])
    before = state(model)
    with pytest.raises(TraceError, match=r"reads a weight inside torch\.vmap"):
        magr_transform(model, CALIB, trace="make_fx")
    assert changed(model, before) == []
    assert not in_transform()


def test_an_empty_weight_is_no_empty_value() -> None:
    """Both say that their memory is at 0; only a weight may not be read inside of torch.vmap."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.empty(0, 3))
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nothing = torch.empty(len(x), 0)
            y: torch.Tensor = torch.vmap(lambda row, none: row * 2 + none.sum())(x, nothing)
            z: torch.Tensor = self.layer(y) + self.none.sum()
            return z

    model = magr_transform(Model(), [torch.randn(20, 8)], trace="make_fx")
    assert [site.name for site in report_of(model).rewritten] == ["layer.weight"]
