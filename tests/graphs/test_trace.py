"""Tracing: every batch on a graph that is right for it, and a model that is left as it was."""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import Analysis, Formula, architecture, call, trace, weight
from tiny_models import ARCHITECTURES, activations, text_calib, tiny_llama, tiny_t5
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from toys import WIDTH, report_of

from magr_fx import magr_transform
from magr_fx.errors import CalibrationError, TraceError
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import (
    TracedBatch,
    attribute,
    buffers_kept,
    calibration_mode,
    unwrap,
)
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.input_fit import fits
from magr_fx.passes.tracing.trace_batches import Tracing, input_names, trace_batches


def traces_of(traced: list[TracedBatch]) -> int:
    return len({batch.trace for batch in traced})


def assert_runs_rightly(model: nn.Module, calib: list[Any], traced: list[TracedBatch]) -> None:
    """Every batch gives on its graph what the model itself gives."""
    for batch, item in zip(traced, calib, strict=True):
        expected = call(model, item)
        with torch.no_grad():
            outputs = batch.trace.graph_module(*batch.values)
        torch.testing.assert_close(outputs, expected)


# ---- which batches share a trace


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.slow_unless("bert", "vit")
def test_one_trace_for_uneven_batches_and_lengths(name: str) -> None:
    analysis = architecture(name)
    assert len(analysis.traced) > 1
    assert traces_of(analysis.traced) == 1
    assert_runs_rightly(analysis.model, analysis.calib, analysis.traced)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.slow_unless("bert", "vit")
def test_the_graphs_parameters_are_the_models_own(name: str) -> None:
    analysis = architecture(name)
    own = set(analysis.model.parameters())
    graph_module = analysis.traced[0].trace.graph_module
    assert set(graph_module.parameters()) == own
    read = {
        value
        for node in graph_module.graph.nodes
        if isinstance(value := attribute(analysis.traced[0].trace, node), nn.Parameter)
    }
    assert read <= own
    assert {site.parameter for site in analysis.found.sites} <= read


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(8, 6)


def x(*shape: int, seed: int = 0) -> Tensor:
    return activations(*shape, 8, seed=seed)


# name → (function, calibration, number of traces)
SPECIALISING: dict[str, tuple[Callable[..., Any], list[Any], int]] = {
    "batch of one": (lambda m, x: m.a(x), [x(2, 5), x(1, 5), x(1, 7), x(4, 3)], 2),
    "length of one": (lambda m, x: m.a(x), [x(2, 1), x(2, 5), x(3, 1), x(3, 4)], 2),
    "no rows": (
        lambda m, x, y: m.a(x).sum() + m.a(y).sum(),
        [(x(2, 5), x(4, 3)), (x(0, 5), x(4, 3)), (x(3, 4), x(2, 5))],
        2,
    ),
    "branch on a length": (
        lambda m, x: m.a(x) if x.shape[1] > 8 else m.b(x),
        [x(2, 9), x(2, 8), x(3, 10), x(4, 2)],
        2,
    ),
    "branch on parity": (
        lambda m, x: m.a(x) if x.shape[1] % 2 else m.b(x),
        [x(2, 9), x(2, 8), x(3, 7), x(4, 2)],
        2,
    ),
    "branch on equal sizes": (
        lambda m, x: m.a(x) if x.shape[0] == x.shape[1] else m.b(x),
        [x(3, 5), x(4, 4), x(5, 5), x(2, 9)],
        2,
    ),
    "divisible length": (
        lambda m, x: m.a(x.reshape(x.shape[0], 4, -1)[..., :8]),
        [x(3, 8), x(2, 12), x(3, 4)],
        2,  # one where the slice is all there is
    ),
    "length as a constant": (
        lambda m, x: m.a(x) * int(x.shape[1]),
        [x(2, 5), x(3, 5), x(2, 7), x(4, 7)],
        2,
    ),
    "broadcast between inputs": (
        lambda m, x, y: m.a(x + y),
        [(x(3, 4), x(3, 4)), (x(3, 1), x(3, 4)), (x(3, 4), x(3, 1)), (x(5, 6), x(5, 6))],
        3,
    ),
    "lengths that agree by chance": (
        lambda m, x, y: m.a(torch.cat([x, y], 1)),
        [(x(3, 4), x(3, 4)), (x(3, 3), x(3, 4)), (x(3, 4), x(3, 2))],
        1,
    ),
    "squeeze": (lambda m, x: m.a(x.squeeze(1)), [x(3, 2), x(3, 1), x(2, 5)], 2),
    "one tensor twice": (
        lambda m, x, y: m.a(x) if x is y else m.a(x) + m.b(y),
        [(x(3, 4),) * 2, (x(3, 4), x(3, 4, seed=1)), (x(2, 5),) * 2],
        2,
    ),
    "dtypes": (
        lambda m, x: m.a(x.float()),
        [x(2, 5), x(2, 5).double(), x(3, 4), x(3, 4).to(torch.int64)],
        3,
    ),
    "ranks": (lambda m, x: m.a(x), [x(2, 5), x(5), x(2, 3, 4), x(3, 7)], 3),
    "numbers": (lambda m, x, n: m.a(x) * n, [(x(2, 5), 2), (x(2, 5), 3), (x(3, 4), 2)], 2),
    "true is not one": (
        lambda m, x, n: m.a(x) if n is True else m.b(x),
        [(x(2, 5), True), (x(2, 5), 1), (x(2, 5), 1.0)],
        3,
    ),
    "structure": (
        lambda m, xs: m.a(sum(xs)),
        [([x(2, 5), x(2, 5)],), ([x(2, 5)],), ((x(2, 5),),)],
        3,
    ),
    "additional arguments": (
        lambda m, *xs: m.a(sum(xs)),
        [(x(2, 5),), (x(2, 5), x(2, 5)), (x(3, 4), x(3, 4))],
        2,
    ),
}


@pytest.mark.parametrize("name", sorted(SPECIALISING))
@pytest.mark.slow_if("divisible length")
def test_a_batch_that_no_trace_fits_is_traced_again(name: str) -> None:
    function, calib, number = SPECIALISING[name]
    model = Formula(function, a=linear(), b=linear(1))
    _, traced = trace(model, calib)
    assert traces_of(traced) == number
    assert [batch.index for batch in traced] == list(range(len(calib)))
    assert_runs_rightly(model, calib, traced)


def test_arrays_are_told_apart_by_more_than_what_they_print() -> None:
    """NumPy prints the ends of a long array; the trace has frozen its middle."""
    scales = [np.zeros(3000), np.zeros(3000)]
    scales[1][1500] = 1
    assert repr(scales[0]) == repr(scales[1])
    model = Formula(lambda m, x, scale: m.a(x) * float(scale[1500]), a=linear())
    calib = [(x(2, 5), scales[0]), (x(2, 5), scales[1]), (x(3, 4), scales[0])]
    _, traced = trace(model, calib)
    assert traces_of(traced) == 2
    assert_runs_rightly(model, calib, traced)


def test_equal_plain_constants_share_a_trace() -> None:
    class Side(enum.Enum):
        LEFT = "left"
        RIGHT = "right"

    model = Formula(lambda m, x, *constants: m.a(x), a=linear())
    constants = (None, "text", 1.5, torch.float32, torch.device("cpu"), Side.LEFT)
    _, traced = trace(model, [(x(2, 5), *constants), (x(3, 4), *constants)])
    assert traces_of(traced) == 1
    _, traced = trace(model, [(x(2, 5), Side.LEFT), (x(2, 5), Side.RIGHT)])
    assert traces_of(traced) == 2


def test_keyword_sets_have_a_trace_each() -> None:

    class Maybe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            return self.a(x) if mask is None else self.a(x) * mask[..., None]

    model = Maybe()
    calib = [
        x(2, 6),
        {"mask": activations(2, 6), "x": x(2, 6)},
        {"x": x(3, 4), "mask": activations(3, 4)},
        {"x": x(3, 4)},
    ]
    _, traced = trace(model, calib)
    assert traces_of(traced) == 2
    assert traced[0].trace is traced[3].trace
    assert traced[1].trace.input_names == ("x", "mask")
    assert_runs_rightly(model, calib, traced)


def test_self_attention_is_not_run_on_three_inputs() -> None:
    """nn.MultiheadAttention asks whether query, key and value are one tensor."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    same, query, other = x(3, 5, seed=1), x(3, 5, seed=2), x(3, 5, seed=3)
    calib = [(same, same, same), (query, other, same), (query, same, same)]
    _, traced = trace(model, calib)
    assert traces_of(traced) == 3
    assert_runs_rightly(model, calib, traced)


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Any = None, scale: Any = None) -> Any:
        return self.b(x) * math.prod(w[..., None] for w in (mask, scale) if w is not None)


@pytest.mark.parametrize(
    ("calib", "open_dims"),
    [
        ([activations(4, 6, WIDTH)], [{0}]),
        ([activations(4, 6, WIDTH), activations(5, 6, WIDTH)], [{0}]),
        ([activations(4, 6, WIDTH), activations(4, 7, WIDTH)], [{0, 1}]),
        ([{"x": activations(4, 6, WIDTH), "mask": torch.ones(4, 6).tril()}], [{0, 1}, {0, 1}]),
        ([{"x": activations(4, 6, WIDTH), "scale": torch.ones(4, 6)}], [{0}, {0}]),
    ],
    ids=["one size", "rows differ", "lengths differ", "tokens of a mask", "no mask"],
)
def test_only_sizes_that_are_needed_are_open(calib: list[Any], open_dims: list[set[int]]) -> None:
    """Each one that is costs time to trace."""

    model = Weighed()
    with calibration_mode(model):
        traced = trace_batches(model, read_calib(calib, model))
    (trace,) = {batch.trace for batch in traced}
    nodes = trace.graph_module.graph.find_nodes(op="placeholder")
    sizes = [node.meta["val"].shape for node in nodes]
    found = [{at for at, n in enumerate(shape) if isinstance(n, torch.SymInt)} for shape in sizes]
    assert found == open_dims


def test_fits_looks_at_number_kind_and_shape() -> None:
    model = Formula(lambda m, x, y: m.a(x) + m.a(y), a=linear())
    _, (traced, _) = trace(model, [(x(3, 5), x(3, 5, seed=1)), (x(4, 6), x(4, 6))])
    graph_module = traced.trace.graph_module
    assert fits(graph_module, (x(2, 7), x(2, 7)))
    assert not fits(graph_module, (x(2, 7),))
    assert not fits(graph_module, (x(2, 7), 3))
    assert not fits(graph_module, (x(2, 7), x(7)))
    assert not fits(graph_module, (x(2, 7), x(2, 6)))
    assert not fits(graph_module, (x(2, 7), x(2, 7).double()))
    assert not fits(graph_module, (activations(2, 7, 9), activations(2, 7, 9)))


def test_fits_knows_static_sizes_without_guards() -> None:
    """A graph that was exported elsewhere may have no guards."""
    graph_module = torch.export.export(linear(), (x(3, 5),)).module(check_guards=False)
    assert not hasattr(graph_module, "_guards_fn")
    assert fits(graph_module, (x(3, 5, seed=1),))
    assert not fits(graph_module, (x(3, 4),))
    assert not fits(graph_module, (x(2, 5),))


# ---- signatures


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor, *, shift: Tensor | None = None, **more: Any) -> dict[str, Any]:
        for value in (shift, *more.values()):
            x = x if value is None else x + value
        return {"y": self.a(x), "nothing": None, "nested": [x.sum(), "text"]}


def test_keyword_signatures() -> None:
    model = Keywords()
    calib = [
        {"x": x(2, 5), "shift": x(2, 5, seed=1), "bias": x(2, 5, seed=2), "aaa": x(2, 5, seed=3)},
        {"x": x(3, 4), "shift": x(3, 4, seed=1), "bias": x(3, 4, seed=2), "aaa": x(3, 4, seed=3)},
        {"x": x(3, 4), "shift": None},
        {"x": x(3, 4)},
    ]
    _, traced = trace(model, calib)
    assert traces_of(traced) == 3
    assert traced[0].trace.input_names == ("x", "shift", "aaa", "bias")
    assert_runs_rightly(model, calib, traced)
    arguments = {"x": x(1), "more": {"aaa": [x(1), x(1)], "bias": 3}}
    assert input_names(arguments) == ("x", "aaa", "aaa", "bias")


def test_variable_arguments_and_outputs_without_a_tensor() -> None:
    model = Formula(lambda m, *xs: (m.a(xs[0]), None)[1], a=linear())
    _, traced = trace(model, [(x(2, 5), x(3, 4))])
    assert traced[0].trace.input_names == ("inputs", "inputs")
    assert traced[0].trace.graph_module(*traced[0].values) == []


def test_nested_arguments() -> None:
    model = Formula(lambda m, x, o: m.a(x) + o["shift"][0], a=linear())
    calib = [
        (x(2, 5), {"shift": [activations(2, 5, 6)]}),
        (x(3, 4), {"shift": [activations(3, 4, 6)]}),
    ]
    _, traced = trace(model, calib)
    assert traces_of(traced) == 1
    assert_runs_rightly(model, calib, traced)


@pytest.mark.parametrize(
    "item", [(x(2, 5), x(2, 5)), {"y": x(2, 5)}, {"input": x(2, 5), "z": 1}, ()]
)
def test_arguments_that_do_not_fit(item: Any) -> None:
    with pytest.raises(
        CalibrationError, match=r"batch 1 does not fit Linear\.forward: .*A tensor is taken as"
    ):
        trace(linear(), [x(2, 5), item])


def test_a_compiled_model_is_unwrapped() -> None:
    model = linear()
    compiled = torch.compile(model)
    assert unwrap(compiled) is model  # type: ignore[arg-type]
    assert unwrap(model) is model
    model._orig_mod = "not a module"  # type: ignore[assignment]
    assert unwrap(model) is model


# ---- errors


class Undecided(nn.Module):
    """Control flow that depends on values, and state that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = linear(), nn.Dropout()
        self.register_buffer("count", torch.zeros(1))
        self.count: Tensor
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(x)
        return self.a(x) if x.sum() > 0 else x


@pytest.mark.parametrize("tracer", ["export", "make_fx"])
def test_a_traced_or_refused_model_is_as_it_was(tracer: str) -> None:
    model = Undecided().train()
    model.drop.eval()
    parameters, weights = list(model.parameters()), model.a.weight.clone()
    given = x(2, 5).abs()
    kept = given.clone()
    batches = read_calib([given], model)
    message = r"trace Undecided with calibration batch 0: \w+.*tensor va"
    with calibration_mode(model):
        if tracer == "export":
            with pytest.raises(TraceError, match=message):
                trace_batches(model, batches, Tracing(tracer))
        else:
            (traced,) = trace_batches(model, batches, Tracing(tracer))
            assert "not" not in traced.trace.refusal
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model.a.weight, weights, rtol=0, atol=0)
    torch.testing.assert_close(given, kept, rtol=0, atol=0)
    assert (model.training, model.a.training, model.drop.training) == (True, True, False)
    assert model.count.item() == 0
    assert type(model.count) is Tensor


def test_the_models_own_error_names_model_and_batch() -> None:
    model = Formula(lambda m, x: m.a(x), a=linear())
    with pytest.raises(TraceError, match="cannot trace Formula with calibration batch 1: Runtime"):
        trace(model, [x(2, 5), activations(2, 5, 7)])


# ---- what is put back


def mixed_model() -> nn.Sequential:
    """Modules in either mode, and configs with either answer to use_cache."""
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    model = nn.Sequential(linear(), nn.Dropout().eval(), normed)
    caching, cacheless = tiny_llama(num_hidden_layers=1).train(), tiny_t5()
    cacheless.config.use_cache = False
    return model.append(caching).append(cacheless)


def configs(model: nn.Module) -> list[Any]:
    return [getattr(module, "config", None) for module in model.modules()]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that calibration may not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "caches": [getattr(config, "use_cache", None) for config in configs(model)],
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "gradients": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fastpath", [False, True])
def test_calibration_mode_restores_every_state(fails: bool, fastpath: bool) -> None:
    model = mixed_model()
    usual = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    before = state(model)
    assert set(before["modes"]) == {True, False}
    assert set(before["caches"]) == {True, False, None}
    with contextlib.suppress(KeyboardInterrupt), calibration_mode(model):
        inside = state(model)
        assert not any(inside["modes"])
        assert not any(inside["caches"])
        assert not inside["fast path"]
        assert not inside["gradients"]
        torch.rand(3)
        if fails:
            raise KeyboardInterrupt
    assert state(model) == before
    torch.backends.mha.set_fastpath_enabled(usual)


def test_calibration_mode_restores_the_devices_random_state(device: torch.device) -> None:
    get_state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    model = linear().to(device)
    state = get_state()
    with calibration_mode(model):
        torch.rand(3, device=device)
        assert not torch.equal(get_state(), state)
    assert torch.equal(get_state(), state)


def test_tracing_draws_no_global_random_numbers() -> None:
    model = Formula(lambda m, x: m.a(x + torch.rand_like(x)), a=linear())
    random = torch.get_rng_state()
    analysis = through_all_steps(model, [x(2, 5)])
    assert torch.equal(torch.get_rng_state(), random)
    assert analysis.found.sites[0].name == "a.weight"


def through_all_steps(model: nn.Module, calib: list[Any]) -> Analysis:
    """Trace, check and collect, as magr_transform does."""
    batches = read_calib(calib, model)
    with calibration_mode(model):
        traced = trace_batches(model, batches)
        found = find_linears(dict.fromkeys(b.trace for b in traced), model)
        run = CalibrationRun(traced, found.sites)
        run.check(progress=False)
        assert len(list(chain.from_iterable(run.collect(progress=False)))) == len(run.grams)
    return Analysis(model, calib, batches, traced, found)


def counts(m: Any, x: Tensor) -> Any:
    m.count += 1
    m.history[:, 0].mul_(2).add_(m.count)
    return m.a(x) + m.count


def assigns(m: Any, x: Tensor) -> Any:
    m.count = m.count + 1
    return m.a(x) + m.count


def normalises(m: Any, x: Tensor) -> Any:
    return m.a(F.batch_norm(x, m.mean, m.variance, training=True))


def writes_to_a_parameter(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        m.centre.mul_(0.5)
    return m.a(x + m.centre)


def registers(m: Any, x: Tensor) -> Any:
    m.register_buffer("positions", torch.arange(x.shape[0]).float())
    return m.a(x + m.positions[:, None])


def remembers(m: Any, x: Tensor) -> Any:
    m.last, m.calls = x, m.calls + 1
    return m.a(x)


@pytest.mark.parametrize(
    "function", [counts, assigns, normalises, writes_to_a_parameter, registers, remembers]
)
def test_state_that_forward_changes_is_put_back(function: Callable[..., Tensor]) -> None:
    model = Formula(function, a=linear(), centre=weight(8), last=None, calls=0)
    for name, value in {"count": torch.ones(1), "history": activations(3, 2)}.items():
        model.register_buffer(name, value)
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("variance", torch.ones(8))
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    objects = {name: id(b) for name, b in [*model.named_buffers(), *model.named_parameters()]}
    calib = [activations(4, 8, seed=1), activations(4, 8, seed=2)]
    through_all_steps(model, calib)
    assert {n: id(b) for n, b in [*model.named_buffers(), *model.named_parameters()]} == objects
    for tensor, saved in before.values():
        torch.testing.assert_close(tensor, saved, rtol=0, atol=0)
    assert (model.last, model.calls) == (None, 0)
    call(model, calib[0])
    changed = any(not torch.equal(tensor, saved) for tensor, saved in before.values())
    replaced = objects.items() != {n: id(b) for n, b in model.named_buffers()}.items()
    assert changed or replaced, "the model is one that changes its own state"


def test_buffers_are_put_back_after_an_error() -> None:
    model = Formula(counts, a=linear())
    model.register_buffer("count", torch.ones(1))
    model.register_buffer("history", activations(3, 2))
    _, traced = trace(model, [x(2, 5)])
    saved = model.history.clone()

    def run_and_fail() -> None:
        with torch.no_grad(), buffers_kept([traced[0].trace]):
            traced[0].trace.graph_module(*traced[0].values)
            assert model.count.item() == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_and_fail()
    assert model.count.item() == 1
    torch.testing.assert_close(model.history, saved, rtol=0, atol=0)


def test_the_callers_inputs_are_not_changed() -> None:
    model = Formula(
        lambda m, x: m.b(m.a(x.mul_(2)).relu_() + x.zero_()[..., :6]), a=linear(), b=nn.Linear(6, 2)
    )
    calib = [x(2, 5, seed=1), x(3, 4, seed=2)]
    copies = [item.clone() for item in calib]
    through_all_steps(model, calib)
    for item, copy in zip(calib, copies, strict=True):
        torch.testing.assert_close(item, copy, rtol=0, atol=0)


def test_the_model_is_traced_in_evaluation_mode() -> None:
    """Dropout would change the activations from one run to the next."""
    model = tiny_llama(attention_dropout=0.5, num_hidden_layers=1).train()
    calib = text_calib()
    _, traced = trace(model, calib)
    assert model.training
    model.eval()
    assert_runs_rightly(model, calib, traced)


# ---- what tracing must not leave behind


class Unwritable(nn.Module):
    """Reads a buffer whose elements share one place in memory, and one that holds a NaN."""

    repeated: Tensor
    gap: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("repeated", torch.zeros(1).expand(8))
        self.register_buffer("gap", torch.tensor([1.0, float("nan")]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x + self.repeated.sum() + self.gap[0])
        return y


def test_buffers_that_cannot_be_written_are_no_obstacle() -> None:
    model = Unwritable()
    before = model.linear.weight.detach().clone()
    magr_transform(model, [activations(8, 4)])
    assert not torch.equal(model.linear.weight, before)
    assert model.get_buffer("gap").isnan().tolist() == [False, True]


class Lazy(nn.Module):
    """Makes a layer when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.second is None:
            self.second = nn.Linear(4, 4)
        y: Tensor = self.second(self.first(x))
        return y


def test_parameters_made_while_tracing_are_refused_and_taken_away() -> None:
    model = Lazy()
    with pytest.raises(TraceError, match="forward creates parameters; run the model on one input"):
        magr_transform(model, [activations(8, 4)])
    assert [name for name, _ in model.named_parameters()] == ["first.weight", "first.bias"]
    model = Lazy()
    model(activations(8, 4))
    magr_transform(model, [activations(8, 4)])
    assert len(report_of(model).rewritten) == 2


class Notes:
    """An argument that is no tensor, and that forward writes to."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


def test_the_callers_objects_are_not_written_to() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, notes: Notes) -> Tensor:
            notes.kept.append(x)
            y: Tensor = self.linear(x)
            return y

    notes = Notes()
    magr_transform(Writing(), [(activations(8, 4), notes)])
    assert notes.kept == []
