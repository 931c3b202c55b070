"""magr_transform end to end: what it keeps, what it rewrites, and what it says about it."""

from __future__ import annotations

import copy
import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from targets import ASYMMETRIC, intx
from tiny_models import text_calib, tiny_llama
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from toys import INT, WIDTH, Shapes, changed, grams, mlp, report_of, state, vectors

from magr_fx import (
    CalibrationError,
    ConfigError,
    MagRConfig,
    magr_quantize,
    magr_transform,
    solve_magr,
)
from magr_fx.api import quantize_apart
from magr_fx.config import QuantizeOptions
from magr_fx.iterations.solution import Solution, Status
from magr_fx.passes.handover.target import Target
from magr_fx.passes.rewriting import solve_sites
from magr_fx.passes.rewriting.pipeline import resolve_config
from magr_fx.passes.rewriting.request import Request

LinAlgError: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm())


def weight_of(model: nn.Module, linear: str) -> Tensor:
    return model.get_parameter(f"{linear}.weight").detach()


# What is kept.


def test_the_model_and_its_parameters_stay_the_same_objects() -> None:
    model = Shapes()
    model.fused.requires_grad_(False)
    names = ("transposed", "fused", "strided")

    def traits() -> list[Any]:
        return [
            (id(p), p.data_ptr(), p.dtype, p.device, p.shape, p.stride(), p.requires_grad, p.grad)
            for p in map(model.get_parameter, names)
        ]

    before, values = traits(), state(model)
    assert magr_transform(model, vectors()) is model
    assert traits() == before
    assert not model.strided.is_contiguous()
    assert changed(model, values) == list(names)


def test_mixed_training_modes_and_requires_grad_are_kept() -> None:
    first = mlp()
    model = nn.Sequential(first, nn.Dropout(0.5), nn.Linear(16, 4))
    first.eval()
    model[1].train()
    model[2].weight.requires_grad_(False)
    model.training = True
    modes = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    assert set(modes) == set(grads) == {True, False}
    magr_transform(model, vectors())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    model(vectors()[0]).sum().backward()  # and it can be trained on
    assert first.get_parameter("0.weight").grad is not None


def test_no_random_number_is_drawn() -> None:
    model, calib = nn.Sequential(mlp(), nn.Dropout(0.5)).train(), vectors()
    before = torch.get_rng_state()
    magr_transform(model, calib)
    assert torch.equal(torch.get_rng_state(), before)


# What is rewritten.


def test_llama_keeps_its_outputs_and_loses_its_largest_magnitudes() -> None:
    original = tiny_llama()
    model = magr_transform(copy.deepcopy(original), text_calib())
    report = report_of(model)
    assert len(report.rewritten) == 15
    reference = grams(original, text_calib())
    for site in report.rewritten:
        linear = site.name.removesuffix(".weight")
        old, new = weight_of(original, linear).double(), weight_of(model, linear).double()
        gram = reference[linear]

        def energy(matrix: Tensor, gram: Tensor = gram) -> float:
            return float((matrix @ gram * matrix).sum())

        assert site.output_error == pytest.approx((energy(new - old) / energy(old)) ** 0.5, 1e-3)
        assert site.output_error < 0.1
        assert site.tokens == 14 + 27 + 10
        assert torch.tensor(site.channel_max_before).equal(old.abs().amax(1).float())
        assert torch.tensor(site.channel_max_after).equal(new.abs().amax(1).float())
        assert new.abs().max() < old.abs().max()

        largest = float(torch.linalg.eigvalsh(gram)[-1])
        for row, start in zip(new.numpy(), old.numpy(), strict=True):
            penalty = 1e-2 * largest * float((start.astype("float64") ** 2).mean() ** 0.5)
            before = oracles.objective(start, start, gram.numpy(), penalty, len(row))
            after = oracles.objective(row, start, gram.numpy(), penalty, len(row))
            assert after <= before
    with torch.no_grad():
        for ids in text_calib():
            assert relative(model(ids).logits, original(ids).logits) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_solved_in_float32_and_kept(dtype: torch.dtype) -> None:
    original, calib = mlp(dtype=dtype), vectors(dtype=dtype)
    model = magr_transform(copy.deepcopy(original), calib, MagRConfig.published())
    assert {p.dtype for p in model.parameters()} == {dtype}
    reference = grams(original, calib)
    for linear, gram in reference.items():
        old, new = weight_of(original, linear), weight_of(model, linear)
        wanted = solve_magr(old.float(), gram, solver="pgd").weight
        # One rounding to the weight's dtype apart, and what float32 leaves open.
        assert relative(new.float(), wanted) < max(torch.finfo(dtype).eps, 1e-5)
        assert new.abs().max() < old.abs().max()
    with torch.no_grad():
        assert relative(model(calib[0]), original(calib[0])) < 0.05


def test_weights_stored_transposed_and_as_slices_are_rewritten_where_they_are() -> None:
    model, calib = Shapes(), vectors()
    old = state(model)
    # Whose iterates, unlike the stopping ones of admm, depend smoothly on rounding.
    magr_transform(model, calib, MagRConfig.published())
    assert sorted(site.name for site in report_of(model).rewritten) == [
        "fused[0:32]",
        "fused[64:96]",
        "strided",
        "transposed",
    ]
    x = torch.cat(calib)
    hidden = x @ old["transposed"]
    first, last = old["fused"][:WIDTH], old["fused"][2 * WIDTH :]
    joined = hidden @ first.T + hidden.relu() @ last.T
    for inputs, before, after in (
        (x, old["transposed"].T, model.transposed.T),
        (hidden, first, model.fused[:WIDTH]),
        (hidden.relu(), last, model.fused[2 * WIDTH :]),
        (joined, old["strided"], model.strided),
    ):
        wanted = solve_magr(before, inputs.T @ inputs, solver="pgd").weight
        torch.testing.assert_close(after.detach(), wanted, rtol=0, atol=1e-5)
        assert relative(wanted, before) > 1e-3
    assert torch.equal(model.fused[WIDTH : 2 * WIDTH], old["fused"][WIDTH : 2 * WIDTH])


def test_groups_follow_the_target() -> None:
    target = IntxWeightOnlyConfig(weight_dtype=INT[4], granularity=PerGroup(16))
    original, calib = mlp(), vectors()
    config = MagRConfig(alpha="published", solver="pgd")
    model = magr_transform(copy.deepcopy(original), calib, config, target=target)
    assert report_of(model).config == MagRConfig(alpha="published", group_size=16, solver="pgd")
    assert report_of(model).target == ""  # nothing is quantized yet
    for linear, gram in grams(original, calib).items():
        old, new = weight_of(original, linear), weight_of(model, linear)
        wanted = solve_magr(old, gram, alpha=1e-4, group_size=16, solver="pgd").weight
        torch.testing.assert_close(new, wanted, rtol=0, atol=1e-5)
        whole_rows = solve_magr(old, gram, alpha=1e-4, solver="pgd").weight
        assert relative(new, whole_rows) > 1e-3


def test_groups_that_contradict_the_target_are_refused_before_the_model_is_looked_at() -> None:
    target = IntxWeightOnlyConfig(granularity=PerGroup(16))
    with pytest.raises(ConfigError, match="is 8 but the target quantizes groups of 16"):
        magr_transform(mlp(), iter(()), MagRConfig(group_size=8), target=target)
    with pytest.raises(ConfigError, match="is 8 but the target quantizes whole rows"):
        magr_transform(mlp(), iter(()), MagRConfig(group_size=8), target=Int8WeightOnlyConfig())


def test_damping_is_solved_with_and_not_reported_with() -> None:
    original, calib = mlp(), vectors()
    model = magr_transform(
        copy.deepcopy(original), calib, MagRConfig(alpha="published", damping=0.3)
    )
    for site, (linear, gram) in zip(
        report_of(model).rewritten, grams(original, calib).items(), strict=True
    ):
        old, new = weight_of(original, linear), weight_of(model, linear)
        damped = gram + 0.3 * gram.diagonal().mean() * torch.eye(len(gram))
        wanted = solve_magr(old, damped).weight
        torch.testing.assert_close(new, wanted, rtol=0, atol=1e-5)
        assert relative(solve_magr(old, gram).weight, wanted) > 1e-3
        moved = (new - old).double()
        error = (moved @ gram * moved).sum() / (old.double() @ gram * old.double()).sum()
        assert site.output_error == pytest.approx(float(error) ** 0.5, 1e-3)


def test_the_same_bits_every_time() -> None:
    one, other = mlp(), mlp()
    magr_transform(one, vectors())
    magr_transform(other, (batch for batch in vectors()))  # a generator is read once
    assert changed(other, state(one)) == []
    assert changed(mlp(), state(one)) == ["0.weight", "2.weight"]


def test_a_data_loader_is_a_calibration() -> None:
    inputs = torch.cat(vectors(40, 24))
    batches = DataLoader(TensorDataset(inputs), batch_size=24)
    one = magr_transform(mlp(), batches)
    other = magr_transform(mlp(), [inputs[:24], inputs[24:48], inputs[48:]])
    assert report_of(one).batches == 3
    assert changed(one, state(other)) == []


def test_what_filter_fn_leaves_out_is_untouched_and_reported() -> None:
    asked: list[tuple[type[nn.Module], str]] = []

    def only_the_last(module: nn.Module, name: str) -> bool:
        asked.append((type(module), name))
        return name == "2"

    model = mlp()
    before = state(model)
    magr_transform(model, vectors(), filter_fn=only_the_last)
    assert changed(model, before) == ["2.weight"]
    assert asked == [(nn.Linear, "0"), (nn.Linear, "2")]
    assert [(s.name, s.reason) for s in report_of(model).skipped] == [
        ("0.weight", "left out by filter_fn")
    ]


# What can go wrong in the middle.


def failing_at(call: int, error: BaseException) -> Callable[..., Solution]:
    """solve_magr, but for one call."""
    calls = iter(range(1, 1000))

    def solve(*args: Any, **options: Any) -> Solution:
        if next(calls) == call:
            raise error
        return solve_magr(*args, **options)

    return solve


class Counted(nn.Module):
    """Four linears in a row and a buffer that every forward changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of a kernel")])
def test_an_interrupted_run_says_exactly_what_it_has_rewritten(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counted().train()
    before = state(model)
    monkeypatch.setattr(solve_sites, "solve_magr", failing_at(3, error))
    with pytest.raises(type(error)) as caught:
        magr_transform(model, vectors())
    assert caught.value is error  # and its traceback, which holds every frame, is still alive
    names = ["layers.0.weight", "layers.1.weight"]
    assert [site.name for site in report_of(model).sites] == names
    assert changed(model, before) == names  # so the counter has its old value, too
    assert all(module.training for module in model.modules())
    assert "interrupted after rewriting 2 sites: layers.0.weight, layers.1.weight" in caplog.text


def test_an_interruption_between_the_sites_of_one_gram_is_reported_as_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(WIDTH, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = self.query(x) + self.key(x) + self.value(x)
            return total

    def write(site: Any, weight: Tensor) -> None:
        if site.name == "value.weight":
            raise KeyboardInterrupt
        site.weight.copy_(weight)

    model = Shared()
    before = state(model)
    monkeypatch.setattr(solve_sites, "rewrite_weight", torch.no_grad()(write))
    with pytest.raises(KeyboardInterrupt):
        magr_transform(model, vectors())
    assert [site.name for site in report_of(model).rewritten] == ["query.weight", "key.weight"]
    assert changed(model, before) == ["query.weight", "key.weight"]


@pytest.mark.parametrize("error", [CalibrationError("too large"), LinAlgError("no convergence")])
def test_a_site_whose_solve_fails_keeps_its_weight_and_the_run_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counted()
    before = state(model)
    monkeypatch.setattr(solve_sites, "solve_magr", failing_at(2, error))
    magr_transform(model, vectors())
    report = report_of(model)
    assert changed(model, before) == [f"layers.{i}.weight" for i in (0, 2, 3)]
    assert [(s.name, s.reason) for s in report.failed] == [
        ("layers.1.weight", f"{type(error).__name__}: {error}")
    ]
    assert [s.outcome for s in report.sites] == ["rewritten"] * 3 + ["failed"]
    assert "layers.1.weight failed" in caplog.text


def test_activations_whose_squares_overflow_fail_their_site_alone() -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quiet, self.loud = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.loud(self.quiet(x) * 1e25)
            return output

    model = Loud()
    before = state(model)
    magr_transform(model, vectors())
    (site,) = report_of(model).failed
    assert site.name == "loud.weight"
    assert "gram has NaN, infinite" in site.reason
    assert changed(model, before) == ["quiet.weight"]


def rows_with(solution: Solution, **changes: Tensor) -> Solution:
    fields = {name: getattr(solution, name) for name in Solution.__dataclass_fields__}
    return Solution(**{**fields, **changes})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda s: rows_with(s, status=torch.full_like(s.status, Status.FAILED)),
            "16 of 16 rows: The row's solution was not finite",
        ),
        (lambda s: rows_with(s, weight=s.weight * torch.inf), "the solution is not finite"),
        (
            lambda s: rows_with(s, objective=s.objective_before * 2),
            "16 of 16 rows have a higher objective than before",
        ),
    ],
)
def test_a_solution_that_must_not_be_written_is_not(
    spoil: Callable[[Solution], Solution], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(weight: Tensor, *args: Any, **options: Any) -> Solution:
        solution = solve_magr(weight, *args, **options)
        return spoil(solution) if len(weight) == 16 else solution

    model = mlp()
    before = state(model)
    monkeypatch.setattr(solve_sites, "solve_magr", solve)
    magr_transform(model, vectors())
    (site,) = report_of(model).failed
    assert (site.name, site.tokens) == ("2.weight", 64)
    assert site.reason.startswith(reason)
    assert changed(model, before) == ["0.weight"]


# What it says.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(True, False, True), (False, True, False), (None, False, False), (None, True, True)],
)
def test_progress_bars_are_for_terminals_or_on_request(
    progress: bool | None,
    terminal: bool,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    magr_transform(mlp(), vectors(), progress=progress)
    bars = stream.getvalue()
    assert ("checking: 100%" in bars and "magr: 100%" in bars) == shown
    assert bool(bars) == shown
    assert capsys.readouterr().out == ""


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    logger, handler = logging.getLogger("magr_fx"), Collect()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_the_totals_are_logged_and_nothing_is_printed(
    log_lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = magr_transform(mlp(), vectors())
    first, *blocks, last = log_lines
    assert first == "INFO tracing Sequential for calibration batch 0"
    assert last == f"INFO {report_of(model).totals()}"
    assert blocks  # one line for each: tests/command_line/test_cli.py has what they say
    assert all(re.fullmatch(r"INFO .* \(\d of 3\): 1 sites, .* s", line) for line in blocks)
    assert capsys.readouterr() == ("", "")


# How a target takes part.


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        (None, "auto"),
        (MagRConfig(), "auto"),
        (MagRConfig(alpha="published"), "published"),
        (MagRConfig(alpha=3e-3), 3e-3),
    ],
)
def test_with_a_target_every_row_chooses_unless_an_alpha_is_given(
    config: MagRConfig | None, alpha: Any
) -> None:
    target = IntxWeightOnlyConfig(weight_dtype=INT[3])
    model = magr_transform(mlp(), vectors(), config, target=target)
    assert report_of(model).config == MagRConfig(alpha=alpha)
    for site in report_of(model).rewritten:
        assert (site.quantization is None) == (alpha != "auto")
    without = magr_transform(mlp(), vectors(), config)
    assert report_of(without).config == (config or MagRConfig())
    assert (changed(model, state(without)) == []) == (alpha != "auto")


def test_a_fixed_alpha_in_quantize_is_solved_once_for_every_row() -> None:
    target = IntxWeightOnlyConfig(weight_dtype=INT[3])
    config = MagRConfig(alpha=3e-3, solver="pgd")
    model, plain = mlp(), mlp()
    magr_quantize(model, vectors(), target, config, propagate=False, holdout=0)
    quantize_(magr_transform(plain, vectors(), config, target=target), target)
    for name in ("0.weight", "2.weight"):
        got, wanted = (m.get_parameter(name).dequantize() for m in (model, plain))
        # But for a number that a rounding of the solver moves over the middle of two codes.
        assert float((got == wanted).float().mean()) > 0.99
    for site in report_of(model).rewritten:
        assert site.quantization is not None
        assert site.quantization.alphas == {"0.003": site.shape[0]}


def test_gptq_keeps_codes_of_its_own() -> None:
    """And its tensors take the places of torchao's: the outputs are theirs."""
    target, calib = IntxWeightOnlyConfig(weight_dtype=INT[3]), vectors(200, 100)
    original, losses = mlp(), []
    for options in ({}, {"rounding": "gptq"}, {"rounding": "gptq", "refine": 5}):
        model = magr_quantize(mlp(), calib, target, **options)
        assert type(model[0].weight) is type(model[2].weight)
        assert all(site.quantized for site in report_of(model).rewritten)
        with torch.no_grad():
            losses.append(relative(model(calib[0]), original(calib[0])))
    plain = mlp()
    quantize_(plain, target)
    with torch.no_grad():
        losses.append(relative(plain(calib[0]), original(calib[0])))
    assert losses[2] < losses[1] < losses[0] < losses[3]


class Shared(nn.Module):
    """Two layers that are one weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        result: Tensor = self.last(hidden)
        return result


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_weight_that_two_modules_share_is_quantizable_by_both_names(rounding: str) -> None:
    """Not by a directory of transformers, which leaves what a model ties as it is."""
    model = Shared().eval()
    apart: dict[str, Tensor] = {}
    target = intx(3, ASYMMETRIC, None)
    config = resolve_config(None, target, required=True)
    request = Request(config, Target(target, QuantizeOptions(rounding)), quantize=True)
    able = quantize_apart(model, vectors(), request, apart)
    assert sorted(able) == ["first.weight", "last.weight", "second.weight"]
    assert model.second.weight is model.first.weight
    assert sorted(apart) == ([] if rounding == "nearest" else ["first.weight", "last.weight"])
