"""The prox of ‖·‖∞ and the projection onto the l1 ball, against sorting in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magr_fx.errors import ConfigError
from magr_fx.iterations.prox import project_l1_ball, prox_linf, threshold

Operator = Callable[[Tensor, "float | Tensor"], Tensor]

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=150)
OPERATORS = {
    "prox_linf": (prox_linf, oracles.prox_linf),
    "project_l1_ball": (project_l1_ball, oracles.project_l1_ball),
}
both = pytest.mark.parametrize("name", sorted(OPERATORS))
argument = pytest.mark.parametrize(
    ("operator", "name"), [(prox_linf, "scale"), (project_l1_ball, "radius")]
)

# Values of every size beside a few that repeat, so that ties and exact zeros turn up often.
numbers = st.one_of(
    st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    st.floats(-(2.0**-10), 2.0**-10, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, -2.0]),
)
amounts = st.one_of(
    st.floats(0, 1e5, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 2.0**-13, 0.5, 1.0, 2.0]),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows of one length in float64 whose values float32 holds, and an amount for each."""
    columns = draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=1))
    rows = rows[:4]
    amount = draw(st.lists(amounts, min_size=len(rows), max_size=len(rows)))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(amount, dtype=torch.float64)


def expected(oracle: Callable[[oracles.Array, float], oracles.Array], x: Tensor, t: Tensor) -> Any:
    return torch.from_numpy(
        np.stack([oracle(row, float(s)) for row, s in zip(x.numpy(), t.numpy(), strict=True)])
    )


def error(got: Tensor, want: Tensor, x: Tensor) -> float:
    """The largest difference, relative to the largest entry of its row of ``x``."""
    size = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((got.double() - want.double()).abs() / size.double()).max())


@both
@repeatable
@given(batch=batches())
def test_equals_the_sorting_oracle(name: str, batch: tuple[Tensor, Tensor]) -> None:
    operator, oracle = OPERATORS[name]
    x, t = batch
    want = expected(oracle, x, t)
    assert error(operator(x, t), want, x) < 1e-14
    assert error(operator(x.float(), t.float()), want, x) < 1e-6


@repeatable
@given(batch=batches())
def test_moreau_identity(batch: tuple[Tensor, Tensor]) -> None:
    x, t = batch
    assert error(prox_linf(x, t) + project_l1_ball(x, t), x, x) < 1e-15


@repeatable
@given(batch=batches())
@pytest.mark.slow
def test_projection_is_feasible_and_nearest(batch: tuple[Tensor, Tensor]) -> None:
    x, radius = batch
    point = project_l1_ball(x, radius)
    size = x.abs().sum(-1)
    assert (point.abs().sum(-1) <= radius + 1e-14 * size).all()
    # <x - p, z - p> ≤ 0 for all z of the ball; the largest <x - p, z> is at a corner of it.
    residual = x - point
    corner = radius * residual.abs().amax(-1)
    assert (corner - (residual * point).sum(-1) <= 1e-13 * size.square()).all()


@repeatable
@given(batch=batches())
def test_prox_meets_its_optimality_conditions(batch: tuple[Tensor, Tensor]) -> None:
    x, scale = batch
    point = prox_linf(x, scale)
    pull, size = x - point, x.abs().sum(-1)
    # x - p is a subgradient of scale·‖·‖∞ at p.
    assert (pull.abs().sum(-1) <= scale + 1e-14 * size).all()
    tight = (pull * point).sum(-1) - scale * point.abs().amax(-1)
    assert (tight.abs() <= 1e-13 * size.square()).all()


@both
@repeatable
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_nonexpansive(name: str, batch: tuple[Tensor, Tensor], seed: int) -> None:
    operator, _ = OPERATORS[name]
    x, t = batch
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) - 0.5
    y = x + noise * (1 + x.abs().amax())
    before, after = (x - y).norm(dim=-1), (operator(x, t) - operator(y, t)).norm(dim=-1)
    assert (after <= before * (1 + 1e-12)).all()


@repeatable
@given(batch=batches(), factor=st.floats(0, 3))
def test_warm_start_from_anywhere_gives_the_same_level(
    batch: tuple[Tensor, Tensor], factor: float
) -> None:
    magnitude, scale = batch[0].abs(), batch[1]
    cold = threshold(magnitude, scale)
    warm = threshold(magnitude, scale, start=magnitude.amax(-1) * factor)
    assert error(warm.unsqueeze(-1), cold.unsqueeze(-1), magnitude) < 1e-14


@repeatable
@given(batch=batches())
def test_fixed_passes_climb_to_the_level(batch: tuple[Tensor, Tensor]) -> None:
    magnitude, scale = batch[0].abs(), batch[1]
    exact = threshold(magnitude, scale)
    below = torch.zeros_like(exact)
    for passes in range(magnitude.shape[-1] + 2):
        level = threshold(magnitude, scale, passes=passes)
        assert (level >= below).all()
        assert (level <= exact + 1e-14 * magnitude.amax(-1)).all()
        below = level
    assert error(below.unsqueeze(-1), exact.unsqueeze(-1), magnitude) < 1e-14


@st.composite
def metric_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A batch, and a metric: all the same, near 1, or decades apart."""
    x, amount = draw(batches())
    decades = draw(st.sampled_from([0.0, 1.0, 6.0]))
    exponents = draw(
        st.lists(st.floats(-decades, decades), min_size=x.shape[-1], max_size=x.shape[-1])
    )
    return x, amount, 10 ** torch.tensor(exponents, dtype=torch.float64)


def metric_levels(x: Tensor, amount: Tensor, metric: Tensor) -> Tensor:
    levels = [
        oracles.weighted_level(row, metric.numpy(), float(t))
        for row, t in zip(x.abs().numpy(), amount, strict=True)
    ]
    return torch.tensor(levels, dtype=torch.float64)


@repeatable
@given(batch=metric_batches())
def test_level_in_a_metric_equals_the_oracle(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, amount, metric = batch
    want = metric_levels(x, amount, metric).unsqueeze(-1)
    # Rounding of Σp|v| moves the level by as much as the cheapest entry makes it.
    spread = float(metric.max() / metric.min())
    got = threshold(x.abs(), amount, metric=metric).unsqueeze(-1)
    assert error(got, want, x) < 1e-14 * (1 + spread)
    if spread == 1:
        got = threshold(x.abs().float(), amount.float(), metric=metric.float()).unsqueeze(-1)
        assert error(got, want, x) < 1e-6


@repeatable
@given(batch=metric_batches(), factor=st.sampled_from([0.0, 0.3, 0.999, 1.0, 1.001, 3.0]))
@pytest.mark.slow
def test_any_start_gives_the_level_with_a_metric(
    batch: tuple[Tensor, Tensor, Tensor], factor: float
) -> None:
    x, amount, metric = batch
    want = metric_levels(x, amount, metric)
    spread = float(metric.max() / metric.min())
    for start in (x.abs().amax(-1) * factor, want * factor):
        warm = threshold(x.abs(), amount, metric=metric, start=start)
        assert error(warm.unsqueeze(-1), want.unsqueeze(-1), x) < 1e-14 * (1 + spread)


@repeatable
@given(batch=metric_batches())
def test_fixed_passes_climb_to_the_level_in_a_metric(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, amount, metric = batch
    want = metric_levels(x, amount, metric)
    close = 1e-14 * (1 + float(metric.max() / metric.min()))
    size = x.abs().amax(-1)
    below = torch.zeros_like(want)
    for passes in range(x.shape[-1] + 2):
        level = threshold(x.abs(), amount, metric=metric, passes=passes)
        assert (level >= below).all()
        assert (level <= want + close * size).all()
        below = level
    assert (below >= want - close * size).all()


@repeatable
@given(batch=batches())
def test_a_metric_of_ones_changes_nothing(batch: tuple[Tensor, Tensor]) -> None:
    magnitude, amount = batch[0].abs(), batch[1]
    ones = torch.ones(magnitude.shape[-1], dtype=magnitude.dtype)
    plain = threshold(magnitude, amount)
    assert torch.allclose(threshold(magnitude, amount, metric=ones), plain, rtol=1e-13)
    # And only the metric relative to scale matters.
    scaled = threshold(magnitude, amount, metric=ones / 8)
    assert torch.allclose(scaled, threshold(magnitude, amount * 8), rtol=1e-13)


def test_a_start_above_every_entry_lands_below_the_level_whatever_the_metric() -> None:
    # 0.1·(1 - τ) + 0.1·(0.9 - τ) = 0.1
    magnitude, metric = torch.tensor([[1.0, 0.9]]), torch.tensor([0.1, 0.1])
    for start in (0.0, 0.4, 0.95, 1.0, 3.0):
        level = threshold(magnitude, 0.1, metric=metric, start=torch.tensor([start]))
        assert level.item() == pytest.approx(0.45, rel=1e-6)


def test_metrics_broadcast_over_problems_and_groups() -> None:
    generator = torch.Generator().manual_seed(7)
    magnitude = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    metric = torch.rand(2, 1, 4, 5, generator=generator, dtype=torch.float64) + 0.1
    got = threshold(magnitude, 0.4, metric=metric)
    for i, j, k in np.ndindex(2, 3, 4):
        row, own = magnitude[i, j, k].numpy(), metric[i, 0, k].numpy()
        assert float(got[i, j, k]) == pytest.approx(oracles.weighted_level(row, own, 0.4))


def test_a_start_above_every_entry_is_as_good_as_none() -> None:
    magnitude = torch.tensor([[3.0, 2.0, 0.5]])
    start = torch.tensor([50.0])
    assert threshold(magnitude, 1.0, start=start, passes=2).item() == 2.0


@pytest.mark.parametrize(
    ("row", "scale", "most"),
    [
        (torch.zeros(1000), 1.0, 2),
        (torch.zeros(1000), 0.0, 2),
        (torch.full((1000,), math.nan), 1.0, 2),
        (torch.ones(1000), 1.0, 2),
        (torch.linspace(-1, 1, 1000), 0.0, 2),
        (torch.linspace(-1, 1, 1000), 1e-30, 2),
        (torch.linspace(-1, 1, 1000), 1.0, 8),
        (torch.linspace(-1, 1, 1000), 1e9, 3),
        (0.5 ** torch.arange(100.0), 1.9, 101),  # loses its entries one by one
    ],
)
def test_passes_end_when_the_active_sets_do(
    row: Tensor, scale: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, subtract = [], torch.sub

    def counted(*args: Any) -> Tensor:
        passes.append(1)
        return subtract(*args)

    monkeypatch.setattr(torch, "sub", counted)
    threshold(row.abs(), scale)
    assert 0 < len(passes) <= most


@pytest.mark.parametrize(
    ("x", "scale", "want"),
    [
        ([3.0, -2.0, 0.5], 1.0, [2.0, -2.0, 0.5]),
        ([3.0, -2.0, 0.5], 2.0, [1.5, -1.5, 0.5]),
        ([3.0, -2.0, 0.5], 0.0, [3.0, -2.0, 0.5]),
        ([3.0, -2.0, 0.5], 5.5, [0.0, 0.0, 0.0]),
        ([3.0, -2.0, 0.5], 1e30, [0.0, 0.0, 0.0]),
        ([3.0, -2.0, 0.5], 1e300, [0.0, 0.0, 0.0]),
        ([3.0, -2.0, 0.5], math.inf, [0.0, 0.0, 0.0]),
        ([2.0, -2.0, 2.0, 2.0], 4.0, [1.0, -1.0, 1.0, 1.0]),  # ties
        ([0.0, 0.0], 1.0, [0.0, 0.0]),
        ([0.0, 0.0], 0.0, [0.0, 0.0]),
        ([-5.0], 2.0, [-3.0]),  # one column: soft thresholding
        ([-5.0], 7.0, [0.0]),
    ],
)
def test_known_values(x: list[float], scale: float, want: list[float]) -> None:
    row = torch.tensor(x)
    assert torch.equal(prox_linf(row, scale), torch.tensor(want))
    assert torch.equal(project_l1_ball(row, scale), row - torch.tensor(want))


@both
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-4, 1e4, 1e20, 1e30])
def test_row_size_costs_no_accuracy(name: str, size: float) -> None:
    operator, oracle = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, generator=generator) * size
    t = torch.rand(6, generator=generator) * size * 40
    got = operator(x, t)
    assert got.isfinite().all()
    assert error(got, expected(oracle, x.double(), t.double()), x) < 1e-6


@both
def test_rows_of_very_different_sizes_share_a_batch(name: str) -> None:
    operator, oracle = OPERATORS[name]
    x = torch.randn(9, 30, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-20, 20, 9).unsqueeze(-1)
    t = x.abs().sum(-1) * 0.3
    assert error(operator(x, t), expected(oracle, x.double(), t.double()), x) < 1e-6


@both
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1])
def test_entries_of_very_different_sizes_share_a_row(name: str, ratio: float) -> None:
    # A geometric row gives up one entry after the other: the most passes that Newton can need.
    operator, oracle = OPERATORS[name]
    x = (ratio ** torch.arange(60.0)).unsqueeze(0)
    for share in (1e-6, 0.3, 0.9, 0.999999):
        t = x.sum(-1) * share
        assert error(operator(x, t), expected(oracle, x.double(), t.double()), x) < 2e-6


@both
def test_long_rows(name: str) -> None:
    operator, oracle = OPERATORS[name]
    x = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([1e-3, 10.0, 10_000.0])
    assert error(operator(x, t), expected(oracle, x.double(), t.double()), x) < 1e-6


@both
def test_batch_dimensions_and_broadcasting(name: str) -> None:
    operator, _ = OPERATORS[name]
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    per_row = torch.tensor([[0.1, 1.0, 2.0], [0.5, 3.0, 9.0]])
    want = torch.stack(
        [torch.stack([operator(x[i, j], float(per_row[i, j])) for j in range(3)]) for i in range(2)]
    )
    assert torch.equal(operator(x, per_row), want)
    per_column = torch.tensor([0.1, 1.0, 2.0])
    assert torch.equal(operator(x, per_column), operator(x, per_column.expand(2, 3)))
    assert torch.equal(operator(x, torch.tensor(0.7)), operator(x, 0.7))
    assert operator(x[:0], 1.0).shape == (0, 3, 5)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    operator, _ = OPERATORS[name]
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = operator(x, 30.0)
    assert got.dtype == dtype
    assert torch.equal(got, operator(x.float(), 30.0).to(dtype))


@both
def test_float64_stays_float64(name: str) -> None:
    operator, _ = OPERATORS[name]
    x = torch.tensor([1.0 + 2.0**-40, 0.5], dtype=torch.float64)
    got = operator(x, 0.25)
    assert got.dtype == torch.float64
    assert got[0].item() in (0.75 + 2.0**-40, 0.25)
    assert torch.equal(operator(x.t(), 0.25), got)


@both
def test_input_is_neither_changed_nor_shared(name: str) -> None:
    operator, _ = OPERATORS[name]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(5)).t().requires_grad_()
    kept = x.detach().clone()
    for amount in (0.0, 0.5, math.inf):
        got = operator(x, amount)
        assert not got.requires_grad
        got.zero_()
    assert torch.equal(x.detach(), kept)


@both
def test_a_nan_stays_in_its_row(name: str) -> None:
    operator, _ = OPERATORS[name]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    want = operator(x, 1.0)
    x[1, 2] = math.nan
    got = operator(x, 1.0)
    assert got[1, 2].isnan()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@both
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "x must be a floating tensor, got torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), "x must be a floating tensor, got torch.bool"),
        ([1.0, 2.0], "x must be a floating tensor, got list"),
        (torch.ones(2, 0), r"non-empty last dimension, got shape \[2, 0\]"),
        (torch.tensor(1.0), r"non-empty last dimension, got shape \[\]"),
    ],
)
def test_bad_x_is_refused(name: str, x: Any, message: str) -> None:
    operator, _ = OPERATORS[name]
    with pytest.raises(ConfigError, match=message):
        operator(x, 1.0)


@argument
@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (-1e-9, "must be at least 0 and not NaN"),
        (math.nan, "must be at least 0 and not NaN"),
        (torch.tensor([1.0, -1.0]), "must be at least 0 and not NaN"),
        (torch.tensor([math.nan, 1.0]), "must be at least 0 and not NaN"),
        (torch.ones(3), r"of shape \[3\] must broadcast to the rows of x, \[2\]"),
        (torch.ones(2, 1), r"of shape \[2, 1\] must broadcast to the rows of x, \[2\]"),
        ("much", "must be a number or a tensor, got 'much'"),
        (None, "must be a number or a tensor, got None"),
    ],
)
def test_bad_amounts_are_refused_by_name(
    operator: Operator, name: str, amount: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{name} {message}"):
        operator(torch.ones(2, 3), amount)
