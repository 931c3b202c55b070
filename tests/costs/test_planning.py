"""The formulas against what is really there: tensors, operations, the run itself."""

from __future__ import annotations

import functools
import gc
import math
import re
from dataclasses import astuple, replace
from itertools import accumulate, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, done
from operation_counter import OperationCounter
from targets import ASYMMETRIC, intx
from tiny_directories import largest_layer, save_model, save_text
from tiny_models import activations, tiny_llama, tiny_mixtral, tiny_qwen2, token_ids
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from magr_fx import MagRConfig
from magr_fx.command_line.plan_directory import plan_directory
from magr_fx.config import QuantizeOptions
from magr_fx.costs import planning
from magr_fx.costs.measure_rates import measured_rates
from magr_fx.costs.planning import Costs, Method, Rates, Shape, Work
from magr_fx.model_files.model_directory import read_directory
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.entries.plan import Plan, plan
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.handover.target import Target
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.rewriting.ledger import Ledger
from magr_fx.passes.rewriting.quantized_weights import quantized_weights
from magr_fx.passes.rewriting.solve_sites import solve_and_rewrite
from magr_fx.passes.tracing.trace_batches import trace_batches
from magr_fx.reporting.report import MagRReport
from magr_fx.reporting.report_files import read_report

WINDOW = (4, 16)
ALONE = Method(search=False, propagate=False)
METHODS = [ALONE, Method()]
TINY = [tiny_llama, tiny_qwen2]


def meta(make: Any, **options: Any) -> Any:
    model = make(**options)
    with torch.device("meta"):
        return type(model)(model.config).eval()


@functools.cache
def planned(make: Any, method: Method, tokens: int = 128) -> Plan:
    return plan(meta(make), tokens, WINDOW, method)


@pytest.mark.parametrize("make", TINY)
def test_forward_is_what_a_counter_counts(make: Any) -> None:
    model = make(attn_implementation="eager")  # in products that the counter knows
    layers = model.model.layers
    # Only what something that is rewritten reads is run: here no head, and not the last product.
    last = 2 * 64 * model.config.hidden_size * model.config.intermediate_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(token_ids(*WINDOW), use_cache=False)
    assert len(layers) == 2
    counted = counter.get_total_flops() - (0 if make is tiny_llama else last)
    found = planned(make, ALONE, tokens=2 * 64).costs
    # Of the counter's products those that turn positions into angles are not the weights'.
    assert found.forward.products / 2 == pytest.approx(counted, rel=0.005)
    assert found.passes == 2
    model = make()  # its attention is one operation
    with OperationCounter() as operations, torch.no_grad():
        model.model(token_ids(*WINDOW), use_cache=False)
    # Traced, the mask and the angles are other operations than in eager mode.
    elementwise = operations.work.elementwise
    assert found.forward.elementwise / 2 == pytest.approx(elementwise, rel=0.25)


def size_of(values: Any) -> int:
    tensors = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("method", METHODS, ids=["alone", "for a target"])
@pytest.mark.parametrize("make", TINY)
def test_grams_and_boundaries_are_as_large_as_the_real_ones(make: Any, method: Method) -> None:
    model, calib = make(), [token_ids(*WINDOW, seed=1), token_ids(*WINDOW, seed=2)]
    with calibration_mode(model):
        traced = trace_batches(model, read_calib(calib, model))
        sites = find_linears([traced[0].trace], model).sites
        holdout = 0.1 if method.held else 0.0
        run = CalibrationRun(traced, sites, propagate=method.propagate, holdout=holdout)
        grams, boundaries, states = [], [], []

        def save(_: int, boundary: Any, last: bool) -> None:
            states.append(size_of(boundary()["streams"]))
            alive = (env.items() for stream in boundary.args[0] for env in stream)
            boundaries.append(
                size_of([v for env in alive for node, v in env if node.op != "placeholder"])
            )

        steps = run.collect(save=save)
        finished = next(steps, None)
        while finished is not None:
            sites = [site for shared in finished for site in shared.sites]
            alive = [m for g in run.grams for m in (g.gram, g.drift, g.held) if m is not None]
            grams.append(sum(m.numel() * m.element_size() for m in alive))
            try:
                finished = steps.send({s.parameter: s.parameter.detach() * 0.9 for s in sites})
            except StopIteration:
                finished = None
    costs = planned(make, method).costs
    assert costs.grams == max(grams)
    assert costs.boundary == pytest.approx(max(boundaries), rel=0.2)
    assert costs.state == pytest.approx(sum(states) / len(states), rel=0.2)
    assert len(states) == costs.steps == planned(make, method).blocks


def test_blocks_are_as_large_as_a_layer_or_the_embedding(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=3)
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    table = model.model.embed_tokens.weight.numel() * 4
    costs = planned(tiny_llama, ALONE).costs
    norm = model.model.norm.weight.numel() * 4
    assert layer <= costs.block <= layer + table + norm
    assert largest_layer(read_directory(save_model(tmp_path, model))) == layer
    assert costs.model == sum(p.numel() for p in tiny_llama().parameters()) * 4


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_solves_take_about_the_operations_that_are_predicted(
    rounding: str, group_size: int | None
) -> None:
    """Roughly: how many steps there are is the data's to say; factorisations exactly."""
    site, shared = solvable()
    target = Target(intx(3, ASYMMETRIC, group_size), QuantizeOptions(rounding=rounding))
    config = MagRConfig(alpha="auto", group_size=group_size)
    with OperationCounter() as counter:
        quantized_weights(shared, config, target)
    method = Method(groups=group_size is not None, gptq=rounding == "gptq")
    predicted = planning.solve_work([Shape(*site.shape)], method)
    assert_about(counter.work, predicted)
    assert counter.work.factors == pytest.approx(predicted.factors)


def test_a_solve_for_one_alpha_takes_about_what_is_predicted() -> None:
    site, shared = solvable()
    config = MagRConfig(tol=0, max_steps=planning.STEPS)
    ledger = Ledger(MagRReport(config))
    with OperationCounter() as counter:
        solve_and_rewrite([shared], config, ledger)
    assert [(row.outcome, row.steps) for row in ledger.rows] == [("rewritten", planning.STEPS)]
    predicted = planning.solve_work([Shape(*site.shape)], ALONE)
    assert_about(counter.work, predicted)
    # The second factorisation is for a ρ that need not change.
    assert predicted.factors - 1.01 * 128**3 < counter.work.factors < 1.01 * predicted.factors


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("rows", [128, 768])  # many candidates are rounded at once; few are
def test_solves_take_about_the_memory_that_is_predicted(rows: int, rounding: str) -> None:
    columns = 512
    weight = nn.Parameter(activations(rows, columns, seed=3) / 20, requires_grad=False)
    site: Any = SimpleNamespace(shape=weight.shape, parameter=weight, weight=weight)
    shared, x = SharedGram([site]), activations(1200, columns) * torch.linspace(0.1, 3, columns)
    shared.add(x, None, original=x + 0.01 * activations(1200, columns, seed=5), holdout=0.1)
    target = Target(intx(3, ASYMMETRIC, None), QuantizeOptions(rounding=rounding))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        quantized_weights(shared, MagRConfig(alpha="auto"), target)
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in changes))
    predicted = planning.solver_bytes(Shape(rows, columns), Method(gptq=rounding == "gptq"))
    assert 0.8 < peak / predicted < 1.25


def test_grams_take_what_is_predicted() -> None:
    """From 256 inputs on a part of each gram is the mirror image of another."""
    for inputs in (128, 256):
        site: Any = SimpleNamespace(shape=(8, inputs), parameter=torch.empty(0))
        shared, x = SharedGram([site]), activations(600, inputs)
        with OperationCounter() as counter:
            shared.add(x, None, original=x, holdout=0.1)
        predicted = planning.gram_work([Shape(8, inputs)], 600, Method())
        # No drift is taken of the tokens that are held out.
        assert counter.work.products == pytest.approx(predicted.products, rel=0.1)


def solvable() -> tuple[Any, SharedGram]:
    """A weight ``[256, 128]``, and what was taken of its inputs."""
    site = largest_site(tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1))
    shared = SharedGram([site])
    x = activations(600, 128) * torch.linspace(0.1, 3, 128)
    shared.add(x, None, original=x + 0.01 * activations(600, 128, seed=5), holdout=0.1)
    return site, shared


def assert_about(counted: Work, predicted: Work) -> None:
    assert 1 / 1.5 < counted.products / predicted.products < 1.5
    assert 1 / 1.5 < counted.elementwise / predicted.elementwise < 1.5


def largest_site(model: Any) -> Any:
    with calibration_mode(model):
        traced = trace_batches(model, read_calib([token_ids(2, 8)], model))
        found = find_linears([traced[0].trace], model).sites
    return next(site for site in found if site.name.endswith("up_proj.weight"))


def test_formulas_by_hand() -> None:
    shapes = [Shape(12, 8), Shape(6, 4, calls=0.25, problems=3)]
    assert planning.weight_bytes(shapes, 2) == 2 * (96 + 72)
    assert planning.gram_bytes(shapes, ALONE) == 2 * 4 * (64 + 3 * 16)
    assert planning.gram_bytes(shapes, Method()) == 3 * 4 * (64 + 3 * 16)
    assert planning.forward_flops(shapes, 10) == 2 * 10 * 96 + 2 * 10 * 0.25 * 72
    alone, both = (planning.gram_work(shapes, 10, method, batches=2) for method in METHODS)
    assert alone.products == 2 * 10 * 64 + 2 * 10 * 0.25 * 48
    assert both.products == 2 * alone.products
    assert alone.elementwise == 10 * 8 + 10 * 0.25 * 12
    assert both.elementwise == 2 * alone.elementwise + 4 * 2 * (96 + 72)
    assert planning.gram_work([Shape(1, 256)], 10, ALONE).products == 5 / 8 * 2 * 10 * 256**2
    assert planning.boundary_bytes(32, 100, 2, ALONE) == 6400
    assert planning.boundary_bytes(32, 100, 2, Method()) == 12_800
    assert planning.attention_flops(3, 32, 100, 16) == 4 * 3 * 32 * 100 * 16
    assert planning.disk_bytes(100, 3, 7) == 314
    assert (planning.passes(ALONE), planning.passes(Method())) == (2, 3)
    search = planning.solve_work(shapes, Method())
    for dearer in (Method(groups=True), Method(gptq=True)):
        assert planning.solve_work(shapes, dearer).products > search.products
        assert planning.solve_work(shapes, dearer).elementwise > search.elementwise
    assert search.products > planning.solve_work(shapes, ALONE).products
    # Eigenvalues, a factorisation and an inverse, and the drift's factorisation.
    assert search.factors == pytest.approx((4 / 3 + 1 + 1 / 3) * (8**3 + 3 * 4**3))
    still = planning.solve_work(shapes, Method(propagate=False))
    assert search.factors - still.factors == pytest.approx((8**3 + 3 * 4**3) / 3)
    # Llama-70B's down projection, as benchmarks/README.md has it: 25 GB with weight and gram.
    large = planning.solver_bytes(Shape(8192, 28672), ALONE)
    assert 14e9 < large < 25e9
    # With GPTQ one matrix more; of few rows many candidates are rounded at once, which is more yet.
    many = planning.solver_bytes(Shape(4096, 16), Method(gptq=True))
    assert many == 4 * 16**2 + planning.solver_bytes(Shape(4096, 16), Method())
    few = planning.solver_bytes(Shape(64, 16), Method(gptq=True))
    assert few == 8 * 16**2 + 4 * 13 * 64 * 16 + 7 * 15 * 64 * 16


def test_time_is_operations_by_rate_and_bytes_by_speed() -> None:
    costs = Costs(
        forward=Work(products=10.0, elementwise=4.0), passes=3, gram=Work(products=4.0),
        solve=Work(8.0, 3.0, 12.0), model=100, block=1, grams=2, solver=3, boundary=4, disk=58,
        steps=8, state=70,
    )  # fmt: skip
    assert costs.memory == 10
    rates = Rates(forward=5.0, solve=2.0, factors=1.0, elementwise=4.0, disk=10.0)
    assert costs.seconds(rates) == {
        "forward": 3 * (2.0 + 1.0),
        "grams": 2.0,
        "solve": 4.0 + 3.0 + 3.0,
        "disk": (5 * 100 + 50) / 10,
        "states": pytest.approx(
            70 * 76 / 30 / 10
        ),  # one in 30 of the 76 seconds that all else takes
    }
    assert replace(costs, steps=2).states(rates) == 70  # but after the last step
    assert costs.solve.flops == 11.0
    faster = costs.seconds(rates.with_products(20.0))
    assert (faster["solve"], faster["disk"]) == (1.0, costs.seconds(rates)["disk"])
    assert planning.readable(0, "B") == "0 B"
    assert planning.readable(999.9, "B") == "1e+03 B"
    assert planning.readable(2.5e15, "FLOP") == "2.50 PFLOP"


def test_depth_adds_work_and_no_memory() -> None:
    few, many = (
        plan(meta(tiny_llama, num_hidden_layers=n), 128, WINDOW, Method()).costs for n in (3, 6)
    )
    assert (few.block, few.grams, few.solver) == (many.block, many.grams, many.solver)
    assert few.boundary == many.boundary
    head = planning.solve_work([Shape(64, 32)], Method()) * -1
    for kind in ("products", "factors", "elementwise"):
        more, less = (getattr(costs.solve + head, kind) for costs in (many, few))
        assert more / less == pytest.approx(2)
    assert many.forward.elementwise / few.forward.elementwise == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize(
    "method",
    [ALONE, Method(), Method(groups=True), Method(gptq=True)],
    ids=["alone", "search", "groups", "gptq"],
)
def test_time_grows_with_rows_and_width_as_its_kinds_do(method: Method) -> None:
    """Twice the rows: all but the factorisations double. Twice the inputs: 4, 8 and 2 times."""

    def work(rows: int, inputs: int) -> Work:
        return planning.solve_work([Shape(rows, inputs)], method)

    one, taller, wider = work(96, 64), work(192, 64), work(96, 128)
    assert taller == Work(2 * one.products, one.factors, 2 * one.elementwise)
    assert (wider.products, wider.elementwise) == (4 * one.products, 2 * one.elementwise)
    assert wider.factors == pytest.approx(8 * one.factors)
    assert work(96, 64) * 3 == planning.solve_work([Shape(96, 64, problems=3)], method)
    # Each piece of the rows factorises anew what a search needs; but not what it has for all.
    rows, pieces = 4 * 2048, 4
    once = (1 / 3) * (method.propagate + 2 * method.gptq) + (2 / 3) * method.gptq
    times = pieces if method.search else 1
    each = 1 / 3 + (1 if method.search else 2)
    assert work(rows, 2048).factors == pytest.approx((times * each + once) * 2048**3)
    # Narrow layers are slower for their size: there what goes with the square tells.
    rates = Rates(forward=1e11, solve=1e11, factors=3e10, elementwise=2e9, disk=1e9)
    narrow, wide = (work(n, n).seconds(rates, products=rates.solve) for n in (256, 1024))
    assert 4**2 < wide / narrow < 4**3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_work_by_the_time_that_it_takes(dtype: torch.dtype) -> None:
    ticks = count()  # a clock on which everything takes a second
    found = measured_rates(Shape(96, 64), dtype, 32, clock=lambda: float(next(ticks)))
    assert found.forward == 2 * 32 * 96 * 64
    assert found.solve == 2 * 96 * 64 * 64
    assert found.factors == pytest.approx(64**3 / 3)
    assert found.elementwise == 6 * 96 * 64
    here = measured_rates(Shape(10_000, 64), dtype, 32)
    assert all(0 < rate < 1e18 for rate in astuple(here))


def test_experts_count_by_the_tokens_that_reach_them() -> None:
    every = plan(meta(tiny_mixtral), 128, WINDOW, ALONE, routed=1.0).costs
    half = plan(meta(tiny_mixtral), 128, WINDOW, ALONE, routed=0.5).costs
    experts = 2 * 4 * 3 * 2.0 * 128 * 32 * 48
    assert every.forward.products - half.forward.products == pytest.approx(experts / 2)
    assert half.solve == every.solve


def test_the_plan_is_what_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned with a hole in the place of every weight, which nobody may have read."""
    here = Rates(forward=3e9, solve=2e9, factors=1e9, elementwise=4e9, disk=1e9)
    monkeypatch.setattr("magr_fx.command_line.plan_directory.measured_rates", lambda *_: here)
    source = save_model(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    text = save_text(tmp_path / "text.txt")
    skip = ("--skip", "*.k_proj")
    done("transform", source, tmp_path / "out", "--calib", text, *INT3, *SMALL, *skip)
    ran = read_report(tmp_path / "out")
    file = source / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))  # NaN, every one
    shown = done("plan", source, *INT3, *SMALL, *skip, "--tflops", "0.001").output
    target = intx(3, ASYMMETRIC, None)
    found = plan_directory(str(source), target, tokens=128, length=16, skip=("*.k_proj",), rate=1e9)
    assert str(found) == shown.rstrip("\n")
    assert [site.name for site in found.plan.sites] == [site.name for site in ran.rewritten]
    skipped = [(site.name, site.reason) for site in ran.skipped]
    assert [(r.name, r.reason) for r in found.plan.rejections] == skipped
    assert "rewritten: 6 sites with 7,168 parameters, in" in shown
    assert "model.layers.*.mlp.gate_proj.weight 48x32" in shown
    assert re.search(r"lm_head\.weight 64x32: left out by filter_fn", shown)
    assert re.search(r"^time: about [\d.]+ s, with products at 1\.00 GFLOP/s", shown, re.MULTILINE)
    assert "factorisations at 500.00 MFLOP/s, elementwise operations at 2.00 Gop/s" in shown
    costs = found.plan.costs
    work = costs.forward * costs.passes + costs.gram + costs.solve
    seconds = costs.seconds(found.rates)
    assert math.isclose(
        seconds["forward"] + seconds["grams"] + seconds["solve"],
        work.products / 1e9 + work.factors / 0.5e9 + work.elementwise / 2e9,
    )
    shown = done("plan", source, *INT3, *SMALL, *skip).output
    assert "products at 3.00 GFLOP/s in torch.float32 and 2.00 GFLOP/s in float32" in shown
