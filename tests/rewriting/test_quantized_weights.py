"""What the target makes of a site: never worse than torchao alone, and reported as it is."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import targets
import torch
from graph_helpers import Formula, analyse
from targets import ALL, DYNAMIC, IN, ON_GRIDS, ONE_STEP, PACKED
from tiny_models import activations
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.handover.target import Target, describe, target_group_size
from magr_fx.passes.handover.torchao_rounding import grid_of
from magr_fx.passes.rewriting import quantized_weights as module
from magr_fx.passes.rewriting.quantized_weights import QuantizedWeight, quantized_weights
from magr_fx.rounding.gptq import compensation, gptq
from magr_fx.rounding.search import Choice, choose

ROWS = (16, 32)
DAMPING, DRIFT_DAMPING = 0.1, 0.05
TOKENS, HELD = 200, 50
pytestmark = pytest.mark.usefixtures("one_thread")


class Problem(NamedTuple):
    """Two weights that share an input, as the pass hands them over, and as float64 knows them."""

    shared: SharedGram
    weights: list[Tensor]
    gram: Tensor  # of the tokens that count, float64
    held: Tensor  # of the others
    aims: list[Tensor]  # what the quantized weights should do the same as, float64

    @property
    def regularised(self) -> Tensor:
        return self.gram + DAMPING * self.gram.diagonal().mean() * torch.eye(IN).double()


def problem(dtype: torch.dtype = torch.float32, *, drift: bool = False) -> Problem:
    weights = targets.weights(ROWS, dtype)
    first, second = (nn.Linear(IN, rows, bias=False, dtype=dtype) for rows in ROWS)
    model = Formula(lambda m, x: (m.first(x), m.second(x)), first=first, second=second)
    with torch.no_grad():
        for linear, weight in zip((first, second), weights, strict=True):
            linear.weight.copy_(weight)
    mix = activations(IN, IN, seed=99) * torch.logspace(0, -1.5, IN)[:, None]
    x = (activations(TOKENS, IN, seed=3) @ mix).to(dtype)
    original = x + (0.2 * activations(TOKENS, IN, seed=4) @ mix + 0.1).to(dtype)
    shared = SharedGram(analyse(model, [x]).found.sites)
    shared.add(x, None, original=original if drift else None, holdout=HELD / TOKENS)

    used, held, was = x[:-HELD].double(), x[-HELD:].double(), original[:-HELD].double()
    made = Problem(shared, weights, used.T @ used, held.T @ held, [w.double() for w in weights])
    if not drift:
        return made
    missing = used.T @ (was - used)
    little = DRIFT_DAMPING * made.gram.diagonal().mean() * torch.eye(IN).double()
    change = torch.linalg.solve(made.gram + little, missing)
    return made._replace(aims=[w + (change @ w.T).T for w in made.aims])


def solved(
    made: Problem, target: Any, rounding: str = "nearest", config: MagRConfig | None = None,
    **options: Any,
) -> list[QuantizedWeight]:  # fmt: skip
    config = config or MagRConfig(alpha="auto")
    if config.damping is None:
        config = dataclasses.replace(config, damping=DAMPING)
    config = dataclasses.replace(config, group_size=target_group_size(target))
    return quantized_weights(
        made.shared, config, Target(target, QuantizeOptions(rounding, **options))
    )


def worth_of(tensor: Tensor) -> Tensor:
    """What an nn.Linear with this tensor multiplies with, float64."""
    if isinstance(tensor, (Int8Tensor, IntxUnpackedToInt8Tensor)):
        values: Tensor = tensor.dequantize()
        return values.double()
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    return targets.seen(linear)


def errors(values: Tensor, target_weight: Tensor, gram: Tensor) -> Tensor:
    return ((values - target_weight) @ gram * (values - target_weight)).sum(-1)


def assert_no_worse_than_torchao(made: Problem, target: Any, done: list[QuantizedWeight]) -> None:
    gained, empty = 0.0, True
    for one, weight, target_weight in zip(done, made.weights, made.aims, strict=True):
        ours = errors(worth_of(one.tensor), target_weight, made.regularised)
        torchaos = targets.worth(weight, target)
        alone = errors(torchaos, target_weight, made.regularised)
        empty = empty and not bool(torchaos.any())
        if target in ONE_STEP:
            ours, alone = ours.sum(0, keepdim=True), alone.sum(0, keepdim=True)
        assert bool((ours <= alone * (1 + 1e-4)).all()), float((ours / alone).max())
        gained += float(1 - ours.sum() / alone.sum())
        assert one.refusal is None
    # Symmetric with one bit, torchao makes zeros of any weight; with eight there is little to gain.
    assert gained > 1e-3 or empty or getattr(target, "weight_dtype", None) is torch.int8


# ---- the guarantee

SOME = [
    targets.intx(2, targets.SYMMETRIC, None),
    targets.intx(4, targets.ASYMMETRIC, 16),
    *targets.ODD_SCALES[1:3],
    targets.INT8[0],
    *DYNAMIC[2:],
    ONE_STEP[0],
    PACKED,
]
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
some_grids = [target for target in SOME if target in ON_GRIDS]
# All of them as they are; with drift, which adds nothing for most, a third.
EACH = [(target, False) for target in ALL]
EACH += [(target, True) for at, target in enumerate(ALL) if at % 3 == 0 or target in SOME]


@pytest.mark.parametrize(
    ("target", "drift"),
    EACH,
    ids=lambda value: ("drift" if value else "") if isinstance(value, bool) else describe(value),
)
def test_no_row_is_worse_than_torchao_alone(target: Any, drift: bool) -> None:
    made = problem(drift=drift)
    assert_no_worse_than_torchao(made, target, solved(made, target))


@halves
@pytest.mark.parametrize("target", SOME, ids=describe)
@pytest.mark.slow_if("torch.float16")
def test_no_row_of_half_precision_is_worse(target: Any, dtype: torch.dtype) -> None:
    made = problem(dtype, drift=True)
    done = solved(made, target)
    assert_no_worse_than_torchao(made, target, done)
    assert {one.weight.dtype for one in done} == {one.tensor.dtype for one in done} == {dtype}


@pytest.mark.parametrize(
    ("target", "drift"),
    [(target, drift) for target, drift in EACH if target in ON_GRIDS],
    ids=lambda value: ("drift" if value else "") if isinstance(value, bool) else describe(value),
)
@pytest.mark.slow_if
def test_no_row_of_gptq_is_worse(target: Any, drift: bool) -> None:
    made = problem(drift=drift)
    assert_no_worse_than_torchao(made, target, solved(made, target, "gptq"))


@halves
@pytest.mark.parametrize("target", some_grids, ids=describe)
@pytest.mark.slow_if("torch.float16")
def test_no_row_of_gptq_in_half_precision_is_worse(target: Any, dtype: torch.dtype) -> None:
    made = problem(dtype)
    assert_no_worse_than_torchao(made, target, solved(made, target, "gptq", refine=2))


def test_with_drift_the_errors_are_those_against_the_original_outputs() -> None:
    """Which is what making up for the earlier layers means: ‖X̂V - XW‖ falls, ‖X̂(V - W)‖ need not.

    Damped as what makes up for them is: ‖X̂V - XW‖² + s‖V - W‖².
    """
    target = targets.intx(3, targets.SYMMETRIC, None)
    plain, made = problem(), problem(drift=True)
    drift = made.shared.drift
    assert drift is not None
    ridge = DRIFT_DAMPING * float(made.gram.diagonal().mean())
    for one, other, weight in zip(
        solved(made, target), solved(plain, target), made.weights, strict=True
    ):
        w = weight.double()

        def loss(values: Tensor, w: Tensor = w) -> float:
            change = values - w  # ‖X̂(V - W) + (X̂ - X)W‖² but for what does not depend on V
            fit = (change @ made.gram * change).sum() - 2 * (change @ drift.double() * w).sum()
            return float(fit + ridge * change.square().sum())

        assert loss(worth_of(one.tensor)) < loss(worth_of(other.tensor))


# ---- what comes out


@pytest.mark.parametrize("target", SOME, ids=describe)
def test_to_the_nearest_the_tensor_is_torchaos_own_of_the_weight(target: Any) -> None:
    made = problem()
    for one, weight in zip(solved(made, target), made.weights, strict=True):
        assert torch.equal(worth_of(one.tensor), targets.worth(one.weight, target))
        assert torch.equal(one.choice.rounded.values.double(), worth_of(one.tensor))
        nothing_chosen = one.report.alphas == {"0": len(weight)} and one.report.clip == 1
        assert torch.equal(one.weight, weight) == nothing_chosen  # so with eight bits, maybe
        assert torch.equal(one.site.weight, weight)  # which is still as it was


@pytest.mark.parametrize("dtype", targets.DTYPES, ids=str)
@pytest.mark.parametrize("target", some_grids, ids=describe)
@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.slow_if("torch.float16", "torch.bfloat16")
def test_gptqs_tensor_is_torchaos_with_the_chosen_values(
    target: Any, dtype: torch.dtype, refine: int
) -> None:
    made = problem(dtype)
    for one, weight in zip(solved(made, target, "gptq", refine=refine), made.weights, strict=True):
        plain = targets.quantized(weight, target).weight
        assert type(one.tensor) is type(plain)
        assert one.tensor.__tensor_flatten__()[1] == plain.__tensor_flatten__()[1]  # type: ignore[attr-defined]
        values = one.tensor.dequantize()
        assert torch.equal(values, one.weight)
        if not refine:
            assert torch.equal(values.float(), one.choice.rounded.values)
        grid = grid_of(one.tensor)
        codes = one.tensor.qdata  # type: ignore[attr-defined]
        assert grid.low <= int(codes.min()) <= int(codes.max()) <= grid.high
        if target not in DYNAMIC:
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(one.tensor, requires_grad=False)
            assert torch.equal(targets.seen(linear), values.double())


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
def test_refining_lowers_the_errors(drift: bool) -> None:
    target = targets.intx(2, targets.SYMMETRIC, None)
    made = problem(drift=drift)
    totals = []
    previous: list[Tensor] | None = None
    for passes in (0, 1, 10):
        done = solved(made, target, "gptq", refine=passes)
        now = [
            errors(worth_of(one.tensor), target_weight, made.regularised)
            for one, target_weight in zip(done, made.aims, strict=True)
        ]
        for new, old in zip(now, previous or now, strict=True):
            assert bool((new <= old * (1 + 1e-4)).all())
        totals.append(float(sum(e.sum() for e in now)))
        previous = now
    assert totals[0] > totals[1] > totals[2]


def test_the_order_by_activation_gives_another_valid_result() -> None:
    target = targets.intx(3, targets.ASYMMETRIC, 16)
    made = problem()
    done = [solved(made, target, "gptq", act_order=order) for order in (False, True)]
    for natural, by_activation in zip(*done, strict=True):
        assert not torch.equal(natural.tensor.dequantize(), by_activation.tensor.dequantize())
    assert_no_worse_than_torchao(made, target, done[1])


@pytest.mark.parametrize("act_order", [False, True])
def test_without_shrinking_it_is_gptq_on_torchaos_grid(act_order: bool) -> None:
    target = targets.intx(3, targets.SYMMETRIC, 16)
    made = problem()
    steps = compensation(made.regularised.float(), by_activation=act_order)
    for one, weight in zip(
        solved(made, target, "gptq", MagRConfig(alpha=0), act_order=act_order),
        made.weights,
        strict=True,
    ):
        plain: Any = targets.quantized(weight, target).weight
        wanted = gptq(weight, grid_of(plain), steps)
        got: Any = one.tensor
        # Here and there float32 sums of another gram decide otherwise.
        assert float((got.qdata == wanted).float().mean()) > 0.99
        assert torch.equal(got.scale, plain.scale)
        assert float((got.qdata == plain.qdata).float().mean()) < 0.9
        assert one.report.alphas == {"0": len(weight) * IN // 16}  # each group chooses
        assert one.report.clip == 1


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_fixed_alpha_is_every_rows(rounding: str) -> None:
    target = targets.intx(3, targets.SYMMETRIC, None)
    for one in solved(problem(), target, rounding, MagRConfig(alpha=2e-3)):
        assert one.report.alphas == {"0.002": one.site.shape[0]}
        assert one.report.clip == 1


# ---- the report


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize(("rounding", "refine"), [("nearest", 0), ("gptq", 0), ("gptq", 3)])
def test_the_report_has_the_errors_of_the_very_tensors(
    rounding: str, refine: int, drift: bool
) -> None:
    target = targets.intx(3, targets.SYMMETRIC, None)
    made = problem(drift=drift)
    for one, weight, target_weight in zip(
        solved(made, target, rounding, refine=refine), made.weights, made.aims, strict=True
    ):
        report = one.report
        for values, calibration, held in (
            (targets.worth(weight, target), report.error_alone, report.held_alone),
            (worth_of(one.tensor), report.error, report.held),
        ):
            for gram, reported in ((made.gram, calibration), (made.held, held)):
                energy = float((target_weight @ gram * target_weight).sum())
                wanted = (float(errors(values, target_weight, gram).sum()) / energy) ** 0.5
                assert reported == pytest.approx(wanted, rel=1e-3)
        assert report.error < report.error_alone
        assert sum(report.alphas.values()) == len(weight)
        assert report.clip == pytest.approx(float(one.choice.clip.mean()))
        assert 0.05 <= report.clip <= 1
        assert 0 < report.held < 1


def test_with_nothing_held_the_held_errors_are_unknown() -> None:
    made = problem()
    made.shared.held = None
    for one in solved(made, targets.INT8[0]):
        assert math.isnan(one.report.held)
        assert math.isnan(one.report.held_alone)
        assert not math.isnan(one.report.error)


def test_nothing_is_changed_and_the_same_bits_come_every_time() -> None:
    made = problem(drift=True)
    before = [copy.deepcopy(t) for t in (made.shared.gram, made.shared.drift, made.shared.held)]
    target = targets.intx(3, targets.SYMMETRIC, 16)
    one, other = (solved(made, target, "gptq", refine=1) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.weight, second.weight)
        assert first.report == second.report
    for tensor, kept in zip(
        (made.shared.gram, made.shared.drift, made.shared.held), before, strict=True
    ):
        assert tensor is not None
        assert kept is not None
        assert torch.equal(tensor, kept)
    for site, weight in zip(made.shared.sites, made.weights, strict=True):
        assert torch.equal(site.weight, weight)


# ---- refusals


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_what_torchao_makes_nan_of_is_refused(rounding: str) -> None:
    target = targets.intx(1, targets.WIDER, None)
    for one in solved(problem(), target, rounding):
        assert one.refusal == "torchao's quantized weight is not finite"


def test_a_singular_gram_makes_up_for_drift_all_the_same() -> None:
    made = problem(drift=True)
    gram, dead = made.shared.collected, slice(0, 3)
    gram[dead] = gram[:, dead] = 0
    config = MagRConfig(alpha="auto", damping=0)
    for one in solved(made, targets.INT8[0], config=config):
        assert one.refusal is None
        assert one.report.error < one.report.error_alone


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_rows_in_pieces_become_what_they_become_together(
    rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = targets.intx(3, targets.ASYMMETRIC, None), problem(drift=True)
    config = MagRConfig(alpha="auto", max_steps=200, tol=1e-4)  # where all rows converge
    together = solved(made, target, rounding, config)
    seen: list[int] = []

    def counted(target_weight: Tensor, *args: Any, **options: Any) -> Choice:
        seen.append(len(target_weight))
        return choose(target_weight, *args, **options)

    monkeypatch.setattr(module, "pieces", lambda *_: 2)
    monkeypatch.setattr(module, "cut", lambda *_: [slice(0, 20), slice(20, 48)])
    monkeypatch.setattr(module, "choose", counted)
    apart = solved(made, target, rounding, config)
    assert seen == [20, 28]
    assert_no_worse_than_torchao(made, target, apart)
    for one, two in zip(together, apart, strict=True):
        assert one.report.error == pytest.approx(two.report.error, rel=0.05)
        assert one.choice.error.shape == two.choice.error.shape


@pytest.mark.parametrize("target", [targets.ODD_SCALES[2], ONE_STEP[0]], ids=describe)
def test_rows_that_depend_on_each_other_stay_together(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pieces", lambda *_: pytest.fail("they were cut"))
    made = problem()
    assert_no_worse_than_torchao(made, target, solved(made, target))


def test_few_tokens_are_damped_more_than_many() -> None:
    made, target = problem(), targets.intx(3, targets.ASYMMETRIC, None)
    own = MagRConfig(alpha="auto", group_size=target_group_size(target))
    rule = 0.25 * (IN / (TOKENS - HELD)) ** 0.5
    given = dataclasses.replace(own, damping=rule)
    by_rule, by_number, least = (
        quantized_weights(made.shared, config, Target(target, QuantizeOptions("nearest")))
        for config in (own, given, dataclasses.replace(own, damping=0.1))
    )
    for one, two in zip(by_rule, by_number, strict=True):
        assert torch.equal(one.weight, two.weight)
    assert not all(torch.equal(a.weight, b.weight) for a, b in zip(by_rule, least, strict=True))
