"""Propagation and holdout: what is collected, against runs of the really quantized model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import targets
import torch
from graph_helpers import Formula, analyse, assert_drift, assert_gram, call, weight
from targets import ASYMMETRIC, SYMMETRIC, intx
from tiny_models import activations, text_calib, tiny_llama
from torch import Tensor, fx, nn
from torch.nn import functional
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    PerGroup,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor
from toys import INT, WIDTH, Shapes, changed, mlp, recorded_inputs, report_of, state, vectors

from magr_fx import MagRConfig, MagRPass, magr_quantize, magr_transform
from magr_fx.errors import CalibrationError
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.handover.target import describe
from magr_fx.passes.rewriting import solve_sites as solve_sites_module

INT3 = intx(3, SYMMETRIC, None)
solve_sites: Any = solve_sites_module  # what it has imported is looked up as its own
pytestmark = pytest.mark.usefixtures("one_thread")


def deep() -> nn.Sequential:
    """Three linears and what comes between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 16)
    ).eval()


class Watch:
    """Copies of every gram, by the names of its sites, as the solver is given it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grams: dict[str, SharedGram] = {}
        solve = solve_sites.quantized_weights

        def watched(shared: SharedGram, *args: Any) -> Any:
            kept = SharedGram(
                shared.sites,
                gram=copy.deepcopy(shared.gram),
                drift=copy.deepcopy(shared.drift),
                held=copy.deepcopy(shared.held),
                tokens=int(shared.tokens),
            )
            self.grams.update((site.name, kept) for site in shared.sites)
            return solve(shared, *args)

        monkeypatch.setattr(solve_sites, "quantized_weights", watched)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def inputs_of(model: nn.Module, calib: list[Any]) -> dict[str, list[Tensor]]:
    """weight → what each batch brings to its nn.Linear, [tokens, in] in float64."""
    with recorded_inputs(model) as inputs:
        for batch in calib:
            call(model, batch)
    return {f"{name}.weight": tokens for name, tokens in inputs.items()}


def split(batches: list[Tensor], holdout: float) -> tuple[Tensor, Tensor]:
    """The first tokens of every batch, and the last."""
    cut = [len(x) - int(len(x) * holdout) for x in batches]
    first = torch.cat([x[:at] for x, at in zip(batches, cut, strict=True)])
    return first, torch.cat([x[at:] for x, at in zip(batches, cut, strict=True)])


def assert_collected(
    watch: Watch, finished: nn.Module, original: nn.Module, calib: list[Any], holdout: float
) -> None:
    """Gram, drift and what was held are those of the finished model's own run."""
    after, before = inputs_of(finished, calib), inputs_of(original, calib)
    assert set(watch.grams) == set(after) == set(before)
    moved = []
    for name, shared in watch.grams.items():
        used, held = split(after[name], holdout)
        was, _ = split(before[name], holdout)
        gram = used.T @ used
        assert_gram(shared.gram, gram, 1e-4)
        assert shared.tokens == len(used)
        assert shared.drift is not None
        missing = used.T @ (was - used)
        off = (shared.drift.double() - missing).abs().max()
        assert float(off) <= 1e-4 * float(gram.abs().max())
        moved.append(float(missing.abs().max() / gram.abs().max()))
        if len(held):
            assert_gram(shared.held, held.T @ held, 1e-4)
        else:
            assert shared.held is None
    # The first input is the model's own; the others have drifted by far more than the tolerance.
    assert moved[0] == 0
    assert max(moved[1:]) > 1e-2


# ---- the activations are the quantized model's


@pytest.mark.parametrize("holdout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("target", "rounding"),
    [
        (INT3, "nearest"),
        (INT3, "gptq"),
        (intx(2, ASYMMETRIC, 16), "gptq"),
        (targets.ONE_STEP[0], "nearest"),
        (Int8DynamicActivationIntxWeightConfig(INT[2], PerGroup(16)), "gptq"),
        (Int8DynamicActivationIntxWeightConfig(INT[2], PerGroup(16)), "nearest"),
    ],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_grams_and_drift_are_those_of_the_quantized_model(
    target: Any, rounding: str, holdout: float, watch: Watch
) -> None:
    original, calib = deep(), vectors(40, 24, 7)
    if target is targets.ONE_STEP[0]:  # its eight bits hardly lose anything: make it lose
        with torch.no_grad():
            original.get_parameter("0.weight")[0, 0] = 60.0
    model = copy.deepcopy(original)
    magr_quantize(model, calib, target, rounding=rounding, holdout=holdout)
    assert_collected(watch, model, original, calib, holdout)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.slow_unless("nearest")
def test_llamas_grams_and_drift_are_those_of_the_quantized_model(
    rounding: str, watch: Watch
) -> None:
    original, calib = tiny_llama(), text_calib()
    model = copy.deepcopy(original)
    magr_quantize(model, calib, INT3, rounding=rounding, holdout=0.1)
    assert len({id(shared) for shared in watch.grams.values()}) == 9
    assert_collected(watch, model, original, calib, 0.1)


def test_activations_that_are_quantized_too_are_propagated(watch: Watch) -> None:
    """Its weights lose next to nothing: what drifts is what the activations lose."""
    target = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    original, calib = deep(), vectors(40, 24)
    model = copy.deepcopy(original)
    magr_quantize(model, calib, target, holdout=0)
    used, weights_only = inputs_of(model, calib), copy.deepcopy(original)
    with torch.no_grad():
        for at in (0, 2, 4):
            name = f"{at}.weight"
            weights_only.get_parameter(name).copy_(model.get_parameter(name).dequantize())
    lossless = inputs_of(weights_only, calib)
    x, y = torch.cat(used[name]), torch.cat(lossless[name])
    assert_gram(watch.grams[name].gram, x.T @ x, 1e-4)
    gram = watch.grams[name].gram
    assert gram is not None
    ours = (gram.double() - x.T @ x).abs().max()
    assert float(ours) < 0.05 * float((gram.double() - y.T @ y).abs().max())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_without_propagation_the_activations_are_the_original_models(
    rounding: str, watch: Watch
) -> None:
    model, calib = deep(), vectors(40, 24)
    before = inputs_of(model, calib)
    magr_quantize(model, calib, INT3, rounding=rounding, propagate=False)
    assert set(watch.grams) == set(before)
    for name, batches in before.items():
        used, held = split(batches, 0.1)
        shared = watch.grams[name]
        assert_gram(shared.gram, used.T @ used)
        assert_gram(shared.held, held.T @ held)
        assert shared.drift is None


def test_propagation_serves_the_outputs() -> None:
    """What it is for: the whole model's outputs, on inputs that no weight was fitted to."""
    calib, other = vectors(300, 200), vectors(1, 1, 1, 200)[3]
    losses = []
    for propagate in (False, True):
        original = deep()
        model = magr_quantize(
            copy.deepcopy(original), calib, intx(2, SYMMETRIC, None), rounding="gptq",
            propagate=propagate,
        )  # fmt: skip
        with torch.no_grad():
            losses.append(float((model(other) - original(other)).norm()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.slow
def test_llama_rewritten_then_quantized_is_llama_quantized(propagate: bool) -> None:
    two_steps = magr_transform(tiny_llama(), text_calib(), target=INT3, propagate=propagate)
    quantize_(two_steps, INT3)
    model = magr_quantize(tiny_llama(), text_calib(), INT3, propagate=propagate)
    count = 0
    for name, parameter in model.named_parameters():
        other = two_steps.get_parameter(name)
        if isinstance(parameter, TorchAOBaseTensor):
            count += 1
            parameter, other = parameter.dequantize(), other.dequantize()
        assert torch.equal(parameter, other), name
    assert count == 15


def test_the_pass_propagates_as_magr_transform_does() -> None:
    model, eager, calib = deep(), deep(), vectors(40, 24)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (calib[0],), dynamic_shapes=({0: batch},))
    graph_module: fx.GraphModule = exported.module()
    MagRPass(calib, target=INT3, holdout=0.2)(graph_module)
    magr_transform(eager, calib, target=INT3, holdout=0.2)
    assert changed(model, state(eager)) == []
    flat = magr_transform(deep(), calib, target=INT3, propagate=False, holdout=0.2)
    assert changed(model, state(flat)) == ["2.weight", "4.weight"]


def test_a_fixed_alpha_propagates_where_it_is_asked_to(watch: Watch) -> None:
    calib, config = vectors(40, 24), MagRConfig(alpha="published")
    magr_transform(deep(), calib, config, target=INT3)
    assert watch.grams == {}  # the target only says what the groups are
    model = magr_transform(deep(), calib, config, target=INT3, propagate=True, holdout=0)
    quantize_(model, INT3)
    assert_collected(watch, model, deep(), calib, 0)


# ---- weights that no nn.Linear holds


def test_every_slice_of_a_fused_weight_is_seen_quantized(watch: Watch) -> None:
    model, calib = Shapes(), vectors(40, 24)
    with torch.no_grad():
        old = state(model)
        magr_transform(model, calib, target=INT3, propagate=True, holdout=0)

        def worth(matrix: Tensor) -> Tensor:
            return targets.worth(matrix.contiguous(), INT3).float()

        def run(transposed: Tensor, first: Tensor, last: Tensor) -> list[Tensor]:
            hidden = torch.cat(calib) @ transposed.T
            return [hidden, hidden.relu(), hidden @ first.T + hidden.relu() @ last.T]

        quantized = run(
            worth(model.transposed.T), worth(model.fused[:WIDTH]), worth(model.fused[2 * WIDTH :])
        )
        original = run(old["transposed"].T, old["fused"][:WIDTH], old["fused"][2 * WIDTH :])
        rewritten = run(model.transposed.T, model.fused[:WIDTH], model.fused[2 * WIDTH :])
    names = ["fused[0:32]", "fused[64:96]", "strided"]
    for name, now, was, unquantized in zip(names, quantized, original, rewritten, strict=True):
        used, drift = now.double(), watch.grams[name].drift
        assert_gram(watch.grams[name].gram, used.T @ used, 1e-4)
        assert drift is not None
        wanted = used.T @ (was.double() - used)
        assert float((drift.double() - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
        off = unquantized.double()
        assert float((off.T @ off - used.T @ used).norm() / (used.T @ used).norm()) > 1e-2
    assert torch.equal(model.fused[WIDTH : 2 * WIDTH], old["fused"][WIDTH : 2 * WIDTH])


def early(m: Formula, x: Tensor) -> Any:
    """Takes the views of its weights before anything is computed."""
    turned, (first, last) = m.turned.T, m.fused.chunk(2)
    x = functional.linear(x, turned).tanh()
    x = functional.linear(functional.linear(x, first).tanh(), last).tanh()
    return functional.linear(x, m.head)


def test_views_that_are_taken_early_are_of_the_quantized_weights(watch: Watch) -> None:
    model = Formula(
        early, turned=weight(WIDTH, 24, seed=1), fused=weight(48, 24, seed=2), head=weight(8, 24)
    )
    calib = vectors(60, 24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
        magr_transform(model, calib, target=INT3, propagate=True, holdout=0)
        x = torch.cat(calib)
        for name, matrix in (
            ("turned", model.turned.T),
            ("fused[0:24]", model.fused[:24]),
            ("fused[24:48]", model.fused[24:]),
        ):
            used = x.double()
            assert_gram(watch.grams[name].gram, used.T @ used, 1e-4)
            x = (x @ targets.worth(matrix.contiguous(), INT3).float().T).tanh()
    used = x.double()
    assert_gram(watch.grams["head"].gram, used.T @ used, 1e-4)


def test_views_that_depend_on_a_batchs_size_are_of_the_quantized_weights(watch: Watch) -> None:
    def function(m: Formula, x: Tensor) -> Any:
        expanded = m.matrix.T.expand(x.shape[0], -1, -1)
        return m.head(torch.bmm(m.first(x).tanh(), expanded).tanh())

    model = Formula(
        function, first=nn.Linear(WIDTH, 24), matrix=weight(24, 24), head=nn.Linear(24, 8)
    )
    calib = [vectors(30)[0].view(3, 10, WIDTH), vectors(20)[0].view(2, 10, WIDTH)]
    magr_transform(model, calib, target=INT3, propagate=True, holdout=0)
    assert "matrix" in watch.grams
    with torch.no_grad():
        hidden = torch.cat(calib).flatten(0, 1)
        for matrix, bias in ((model.first.weight, model.first.bias), (model.matrix, 0)):
            used = hidden.double()
            hidden = (hidden @ targets.worth(matrix, INT3).float().T + bias).tanh()
            name = "first.weight" if matrix is model.first.weight else "matrix"
            assert_gram(watch.grams[name].gram, used.T @ used, 1e-4)
    assert_gram(watch.grams["head.weight"].gram, (hidden.T @ hidden).double(), 1e-4)


def test_every_matrix_of_a_stack_is_seen_quantized(watch: Watch) -> None:
    model = Formula(
        lambda m, x: m.head(torch.bmm(x, m.experts).tanh().sum(0)),
        experts=weight(2, WIDTH, 24),
        head=nn.Linear(24, 8),
    )
    x = activations(2, 40, WIDTH, seed=1)
    magr_transform(model, [x], target=INT3, propagate=True, holdout=0)
    assert len(watch.grams) == 3
    with torch.no_grad():
        outputs = [
            one @ targets.worth(matrix.T.contiguous(), INT3).float().T
            for one, matrix in zip(x, model.experts, strict=True)
        ]
        hidden = torch.stack(outputs).tanh().sum(0).double()
    assert_gram(watch.grams["head.weight"].gram, hidden.T @ hidden, 1e-4)


def test_a_weight_with_two_parameter_objects_is_seen_quantized(watch: Watch) -> None:
    model = Formula(
        lambda m, x: m.head(m.two(m.one(x).tanh()).tanh()),
        one=nn.Linear(WIDTH, WIDTH),
        two=nn.Linear(WIDTH, WIDTH),
        head=nn.Linear(WIDTH, 8),
    )
    model.two.weight = nn.Parameter(model.one.weight.data)  # another object, the same memory
    calib = vectors(40, 24)
    original = copy.deepcopy(model)
    magr_quantize(model, calib, INT3, rounding="gptq", holdout=0)
    with torch.no_grad():  # the first call came before the weight was known
        hidden = model.two(original.one(torch.cat(calib)).tanh()).tanh().double()
    assert_gram(watch.grams["head.weight"].gram, hidden.T @ hidden, 1e-4)


# ---- holdout


@pytest.mark.parametrize("propagate", [False, True])
def test_what_is_used_and_what_is_held_are_all_tokens(propagate: bool) -> None:
    calib = vectors(40, 24, 5)
    analysis = analyse(mlp(), calib)

    def collected(holdout: float) -> list[SharedGram]:
        run = CalibrationRun(
            analysis.traced, analysis.found.sites, propagate=propagate, holdout=holdout
        )
        with torch.no_grad():
            return [copy.copy(one) for many in run.collect(progress=False) for one in many]

    for whole, part in zip(collected(0.0), collected(0.25), strict=True):
        assert (int(whole.tokens), int(part.tokens)) == (69, 30 + 18 + 4)
        assert part.held is not None
        assert whole.held is None
        assert_gram(part.collected + part.held, whole.collected.double())
        assert part.held.any()
        assert (part.drift is not None) == propagate


def test_padding_counts_neither_here_nor_there() -> None:
    shared = SharedGram(analyse(mlp(), vectors()).found.sites[:1])
    x = activations(20, WIDTH)
    keep = torch.arange(20) % 3 > 0
    x[~keep] = torch.nan
    shared.add(x, keep.nonzero().squeeze(1), original=x + 1, holdout=0.3)
    used, held = torch.split(x[keep].double(), [10, 3])  # 3 is three tenths of the 13, rounded down
    assert_gram(shared.gram, used.T @ used)
    assert_gram(shared.held, held.T @ held)
    assert_drift(shared.drift, used.T @ torch.ones_like(used))
    assert (int(shared.tokens), int(shared.held_tokens)) == (10, 3)


def test_without_holdout_the_held_errors_are_unknown_and_every_token_counts() -> None:
    for holdout, tokens in ((0.0, 64), (0.1, 64 - 4 - 2)):
        report = report_of(magr_quantize(mlp(), vectors(40, 24), INT3, holdout=holdout))
        for site in report.rewritten:
            assert site.quantization is not None
            assert math.isnan(site.quantization.held) == (holdout == 0)
            assert math.isnan(site.quantization.held_alone) == (holdout == 0)
            assert site.tokens == tokens


def test_nothing_is_held_where_the_target_takes_no_part() -> None:
    for options in ({}, {"config": MagRConfig(alpha=1e-3), "target": INT3}):
        report = report_of(magr_transform(mlp(), vectors(40, 24), holdout=0.5, **options))
        assert {site.tokens for site in report.rewritten} == {64}
        assert {site.quantization for site in report.rewritten} == {None}


# ---- what goes wrong in the middle


def failing_at(number: int, error: BaseException) -> Callable[..., Any]:
    """quantized_weights, but for one gram."""
    solve, calls = solve_sites.quantized_weights, iter(range(1, 1000))

    def failing(*args: Any) -> Any:
        if next(calls) == number:
            raise error
        return solve(*args)

    return failing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_gptq_has_changed_nothing(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = deep()
    before, objects = state(model), [id(p) for p in model.parameters()]
    monkeypatch.setattr(solve_sites, "quantized_weights", failing_at(2, error))
    with caplog.at_level(logging.ERROR, "magr_fx"), pytest.raises(type(error)):
        magr_quantize(model, vectors(), INT3, rounding="gptq")
    assert changed(model, before) == []
    assert [id(p) for p in model.parameters()] == objects
    assert "magr_report" not in vars(model)
    assert "interrupted: nothing was changed" in caplog.text


def test_an_interrupted_run_to_the_nearest_names_what_is_rewritten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = deep()
    before = state(model)
    monkeypatch.setattr(solve_sites, "quantized_weights", failing_at(3, KeyboardInterrupt()))
    with caplog.at_level(logging.ERROR, "magr_fx"), pytest.raises(KeyboardInterrupt):
        magr_quantize(model, vectors(), INT3)
    assert changed(model, before) == ["0.weight", "2.weight"]
    assert [site.name for site in report_of(model).sites] == ["0.weight", "2.weight"]
    assert "interrupted after rewriting 2 sites: 0.weight, 2.weight" in caplog.text


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_gram_that_fails_leaves_its_sites_to_torchao_alone(
    rounding: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, watch = deep(), Watch(monkeypatch)
    error = CalibrationError("too large")
    monkeypatch.setattr(solve_sites, "quantized_weights", failing_at(2, error))
    magr_quantize(model, vectors(), INT3, rounding=rounding, holdout=0)
    report = report_of(model)
    assert [(s.name, s.reason) for s in report.failed] == [
        ("2.weight", "CalibrationError: too large")
    ]
    assert "2.weight failed" in caplog.text
    plain = targets.quantized(deep().get_parameter("2.weight"), INT3).weight
    got = model.get_parameter("2.weight")
    assert torch.equal(got.dequantize(), plain.dequantize())
    assert set(watch.grams) == {"0.weight", "4.weight"}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_run_leaves_buffers_modes_and_random_numbers_alone(rounding: str) -> None:
    class Counted(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = deep()
            self.dropout = nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            output: Tensor = self.inner(self.dropout(x))
            return output

    model = Counted().train()
    modes, seed = [module.training for module in model.modules()], torch.get_rng_state()
    magr_quantize(model, vectors(), INT3, rounding=rounding)
    assert model.calls == 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), seed)


def test_buffers_that_the_forward_changes_are_the_same_for_both_runs(watch: Watch) -> None:
    """The run through the quantized weights and the original one each start from the batch."""

    def function(m: Any, x: Tensor) -> Any:
        m.total += x.abs().mean()
        x = m.one(x) / m.total
        m.total += x.abs().mean()
        return m.two(x / m.total)

    model = Formula(function, one=nn.Linear(WIDTH, WIDTH), two=nn.Linear(WIDTH, 8))
    model.register_buffer("total", torch.ones(()))
    original, calib = copy.deepcopy(model), vectors(40)
    magr_quantize(model, calib, INT3, holdout=0)
    (used,) = inputs_of(model, calib)["two.weight"]
    (was,) = inputs_of(original, calib)["two.weight"]
    assert_gram(watch.grams["two.weight"].gram, used.T @ used, 1e-4)
    drift = watch.grams["two.weight"].drift
    assert drift is not None
    wanted = used.T @ (was - used)
    assert float((drift.double() - wanted).abs().max()) < 1e-4 * float((used.T @ used).max())


# ---- what two runs have to agree on


class Routed(nn.Module):
    """A gate decides which tokens the second weight sees."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.gate, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        result: Tensor = self.b(h[self.choose(self.gate(h)[:, 0])])
        return result


def captured(monkeypatch: pytest.MonkeyPatch) -> dict[str, SharedGram]:
    """Every shared gram that is solved from here on, by the names of its sites."""
    found: dict[str, SharedGram] = {}
    solve = solve_sites.quantized_weights

    def solve_and_keep(shared: SharedGram, *args: Any) -> Any:
        for site in shared.sites:
            found[site.name] = copy.copy(shared)  # its matrices outlive free_matrices
        return solve(shared, *args)

    monkeypatch.setattr(solve_sites, "quantized_weights", solve_and_keep)
    return found


def test_the_quantized_run_routes_as_the_original_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Routed(lambda score: score.topk(16)[1]), vectors(64)[0]
    with torch.no_grad():
        first = torch.relu(model.a(x))
        kept = first[model.gate(first)[:, 0].topk(16)[1]].double()
    seen = captured(monkeypatch)
    magr_quantize(model, [x], INT3, holdout=0.0)
    with torch.no_grad():
        chosen = (model.gate(torch.relu(model.a(x)))[:, 0]).topk(16)[1]
        quantized = torch.relu(model.a(x)).double()
    # The tokens that the original chose, in its order, as the quantized layer makes them.
    order = torch.tensor([int((first.double() == token).all(-1).nonzero()[0, 0]) for token in kept])
    assert not torch.equal(chosen, order), "the quantized gate should choose others here"
    now = quantized[order]
    assert_gram(seen["b.weight"].gram, now.T @ now)
    assert_drift(seen["b.weight"].drift, now.T @ (kept - now))


def test_the_quantized_run_draws_the_same_noise(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(torch.relu(self.a(x)) + 10 * torch.randn_like(x))
            return result

    seen = captured(monkeypatch)
    magr_quantize(Noisy().to(device), vectors(64), INT3, holdout=0.0)
    shared = seen["b.weight"]
    assert shared.gram is not None
    assert shared.drift is not None
    # Other noise would make the drift as large as the gram.
    assert shared.drift.diagonal().abs().sum() < 0.1 * shared.gram.diagonal().sum()


def test_devices_that_the_model_is_not_on_are_not_asked_for_their_random_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To ask is to set up a context, some hundred MiB on each GPU of the machine."""

    def asked(*_: Any) -> Any:
        raise AssertionError("a GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, asked)
    one, two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    noisy = Formula(lambda m, x: m.b(m.a(x) + torch.rand_like(x)), a=one, b=two)
    magr_quantize(noisy, vectors(64), INT3)
    assert [row.outcome for row in report_of(noisy).sites] == ["rewritten"] * 2


def test_traces_that_differ_by_a_layer_stay_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("side", "a", "b")})
                for _ in range(3)
            )

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            for layer in self.layers:
                x = x if y is None else x + layer["side"](x * y)  # type: ignore[index]
                x = layer["b"](torch.relu(layer["a"](x)))  # type: ignore[index]
            return x

    model = Optional()
    x = vectors(40, 24)
    calib: list[Any] = [x[0], (x[1], vectors(24)[0]), x[1]]
    seen = captured(monkeypatch)
    magr_quantize(model, calib, INT3, holdout=0.0)
    with recorded_inputs(model) as inputs, torch.no_grad():
        for batch in calib:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    for name, tokens in inputs.items():
        every = torch.cat(tokens)
        assert_gram(seen[f"{name}.weight"].gram, every.T @ every)


def test_a_failed_site_goes_on_as_torchao_will_quantize_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(
        solve_sites, "quantized_weights", failing_at(1, CalibrationError("singular"))
    )
    seen = captured(monkeypatch)
    magr_quantize(model, vectors(), INT3, holdout=0.0)
    assert [site.name for site in report_of(model).failed] == ["0.weight"]
    with recorded_inputs(model) as inputs, torch.no_grad():
        for batch in vectors():
            model(batch)
    every = torch.cat(inputs["2"])
    assert_gram(seen["2.weight"].gram, every.T @ every)
