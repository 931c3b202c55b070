"""What is chosen does not depend on the units of weights and inputs."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_helpers import problem
from targets import ASYMMETRIC, SYMMETRIC, intx
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, PerTensor

from magr_fx import MagRConfig, magr_quantize, magr_transform, solve_magr
from magr_fx.errors import ConfigError
from magr_fx.grams.gram import largest_eigenvalue, output_error
from magr_fx.solver.row_scale import row_scale

pytestmark = pytest.mark.usefixtures("one_thread")
powers = st.integers(-30, 30)
repeatable = settings(max_examples=30, deadline=None, derandomize=True)
ROWS, IN = 24, 32


def linear_and_inputs(scale: float = 1.0, inputs: float = 1.0) -> tuple[nn.Linear, list[Tensor]]:
    """One layer with rows of very different sizes, and inputs that are not independent."""
    generator = torch.Generator().manual_seed(5)
    linear = nn.Linear(IN, ROWS, bias=False)
    sizes = torch.logspace(-2, 1, ROWS).unsqueeze(-1)
    weight = torch.randn(ROWS, IN, generator=generator).pow(3) * sizes
    x = torch.randn(3, 100, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(scale * weight)
    return linear, list(inputs * x)


@repeatable
@given(
    power=st.integers(-100, 60),
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_it_is_the_root_mean_square_and_exact_for_powers_of_two(
    power: int, rows: int, columns: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale = row_scale(weight)
    expected = weight.double().square().mean(-1).sqrt()
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(row_scale(weight * 2.0**power), scale * 2.0**power)


def test_rows_of_zeros_and_rows_that_share_a_scale() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 1.0]])
    assert row_scale(weight)[1] == 1
    shared = row_scale(weight, [2, 1])
    assert shared.tolist() == pytest.approx([2.5, 2.5, 1.0])
    assert row_scale(weight.expand(5, 3, 2)).shape == (5, 3)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("solver", ["admm", "pgd"])
def test_the_solver_is_equivariant(
    solver: str, group_size: int | None, precision: str, batched: bool
) -> None:
    weight, gram = problem(rows=6, columns=12, tokens=40)
    if batched:
        weight, gram = torch.stack([weight, weight.flip(0)]), torch.stack([gram, 3 * gram])
    options: dict[str, Any] = {
        "alpha": 0.03, "group_size": group_size, "solver": solver, "precision": precision,
    }  # fmt: skip
    one = solve_magr(weight, gram, row_scale=row_scale(weight), **options)
    assert not torch.equal(one.weight, weight)
    assert (one.dual_gap <= one.objective).all()
    c, d = 2.0**-13, 2.0**9
    scaled, other = c * weight, d * d * gram
    two = solve_magr(scaled, other, row_scale=row_scale(scaled), **options)
    assert torch.equal(two.weight, c * one.weight)
    assert torch.equal(two.steps, one.steps)
    assert torch.equal(two.status, one.status)
    for name in ("objective", "objective_before", "dual_gap"):
        assert torch.equal(getattr(two, name), (c * d) ** 2 * getattr(one, name))


@pytest.mark.parametrize("group_size", [None, 4])
def test_a_row_scale_is_a_penalty_of_each_row(group_size: int | None) -> None:
    """Each row is what it is by itself, with its own penalty in the paper's problem."""
    weight, gram = problem(rows=6, columns=12, tokens=40)
    scale = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
    options: dict[str, Any] = {"group_size": group_size, "tol": 1e-6, "precision": "float64"}
    together = solve_magr(weight, gram, alpha=0.02, row_scale=scale, **options)
    for row, size in enumerate(scale.tolist()):
        own = solve_magr(weight[row : row + 1], gram, alpha=0.02 * size, **options)
        # Both objectives are within their gaps of the same optimum.
        gap = abs(float(together.objective[row] - own.objective[0]))
        slack = float(together.dual_gap[row] + own.dual_gap[0])
        assert gap <= slack + 1e-6 * float(own.objective[0])
        assert float(together.objective_before[row]) == pytest.approx(
            float(own.objective_before[0]), rel=1e-5
        )


def test_a_wrong_row_scale_is_refused() -> None:
    weight, gram = problem(rows=3, columns=4)
    for wrong in (torch.ones(4), torch.ones(3, 1), 1.0, [1.0, 1.0, 1.0]):
        with pytest.raises(ConfigError, match=r"row_scale must be a tensor \[3\]"):
            solve_magr(weight, gram, row_scale=wrong)  # type: ignore[arg-type]
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite and above 0"):
            solve_magr(weight, gram, row_scale=torch.tensor([1.0, value, 1.0]))


CONFIGS = [
    MagRConfig(),
    MagRConfig(group_size=8),
    MagRConfig(alpha=0.05),
    MagRConfig(alpha=0.05, group_size=8),
    MagRConfig(alpha=0.02, solver="pgd"),
    MagRConfig(alpha=0.02, solver="pgd", group_size=4),
    MagRConfig(alpha=0.02, precision="float64", damping=0),
]


@repeatable
@given(config=st.sampled_from(CONFIGS), weights=powers, inputs=powers)
@pytest.mark.slow
def test_without_a_target_c_times_w_becomes_c_times_what_w_becomes(
    config: MagRConfig, weights: int, inputs: int
) -> None:
    linear, calib = linear_and_inputs()
    magr_transform(linear, calib, config)
    scaled, others = linear_and_inputs(2.0**weights, 2.0**inputs)
    before = scaled.weight.detach().clone()
    magr_transform(scaled, others, config)
    assert torch.equal(scaled.weight, 2.0**weights * linear.weight)
    assert not torch.equal(scaled.weight, before)
    assert _report(scaled).output_error == pytest.approx(_report(linear).output_error, rel=1e-6)


TARGETS = [
    intx(2, ASYMMETRIC, None),
    intx(3, SYMMETRIC, None),
    intx(3, ASYMMETRIC, 8),
    intx(4, SYMMETRIC, 16),
    Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
]


@pytest.mark.slow_if("0.05")
@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_with_a_target_the_codes_stay_the_same(
    target: Any, rounding: str, alpha: float | None
) -> None:
    per_tensor = isinstance(target, Int8WeightOnlyConfig)
    if rounding == "gptq" and per_tensor:
        return  # which is refused
    config = MagRConfig(alpha=alpha)
    linear, calib = linear_and_inputs()
    magr_quantize(linear, calib, target, config, rounding=rounding)
    # torchao's own steps have a least size, float32's epsilon, which small weights would come to.
    for weights, inputs in ((-3, 12), (9, -12), (20, 0)):
        scaled, others = linear_and_inputs(2.0**weights, 2.0**inputs)
        magr_quantize(scaled, others, target, config, rounding=rounding)
        one, two = _tensor(linear), _tensor(scaled)
        assert torch.equal(one.qdata, two.qdata)
        # Of a group that shrank to zeros torchao makes the least step there is.
        alive = one.scale > torch.finfo(torch.float32).eps
        assert torch.equal(two.scale[alive], 2.0**weights * one.scale[alive])
        if getattr(one, "zero_point", None) is not None:
            assert torch.equal(one.zero_point, two.zero_point)
        quantization = _report(scaled).quantization, _report(linear).quantization
        assert quantization[0] is not None
        assert quantization[1] is not None
        assert quantization[0].alphas == quantization[1].alphas
        assert quantization[0].error == pytest.approx(quantization[1].error, rel=1e-6)


def test_units_between_powers_of_two_change_no_more_than_rounding_does() -> None:
    linear, calib = linear_and_inputs()
    other, inputs = linear_and_inputs(3e-3, 70.0)
    config = MagRConfig(alpha=0.05, tol=1e-6, precision="float64")
    magr_transform(linear, calib, config)
    magr_transform(other, inputs, config)
    torch.testing.assert_close(other.weight / 3e-3, linear.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e2])
def test_small_and_large_weights_lose_as_little_and_shrink_as_much(size: float) -> None:
    linear, calib = linear_and_inputs(size)
    before = linear.weight.detach().clone()
    magr_transform(linear, calib)
    error = _report(linear).output_error
    shrunk = linear.weight.abs().amax(-1) / before.abs().amax(-1)
    assert shrunk.median() < 0.99
    usual, calib = linear_and_inputs()
    magr_transform(usual, calib)
    assert 0 < error == pytest.approx(_report(usual).output_error, rel=0.05)


def test_the_published_alpha_stays_and_tells_what_it_costs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    linear, calib = linear_and_inputs(1e-4)
    before = linear.weight.detach().clone()
    x = torch.cat(calib)
    with caplog.at_level(logging.WARNING, "magr_fx"):
        magr_transform(linear, calib, MagRConfig.published())
    wanted = solve_magr(before, x.T @ x, alpha=1e-3, solver="pgd").weight
    torch.testing.assert_close(linear.weight, wanted, rtol=1e-3, atol=1e-7)
    assert _report(linear).output_error > 0.2
    assert "loses" in caplog.text
    assert "weight" in caplog.text
    caplog.clear()
    linear, calib = linear_and_inputs()
    with caplog.at_level(logging.WARNING, "magr_fx"):
        magr_transform(linear, calib, MagRConfig.published())
    assert _report(linear).output_error < 0.2
    assert not caplog.records


@pytest.mark.parametrize("inputs", [2.0**-60, 2.0**-66, 2.0**50])
@pytest.mark.parametrize("target", [None, intx(3, ASYMMETRIC, None)], ids=str)
def test_inputs_at_the_ends_of_float32_are_worked_with(target: Any, inputs: float) -> None:
    """2^-66 squared is subnormal: less precise, but a gram all the same."""
    linear, calib = linear_and_inputs(1.0, inputs)
    before = copy.deepcopy(linear.weight)
    magr_transform(linear, calib, target=target)
    assert not torch.equal(linear.weight, before)
    assert 0 < _report(linear).output_error < 0.3


def test_the_output_error_of_small_numbers() -> None:
    weight, gram = problem(rows=4, columns=8)
    change = 0.1 * torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    want = output_error(change, weight, gram)
    for c, d in ((2.0**-70, 1.0), (2.0**-30, 2.0**-30), (2.0**60, 2.0**20)):
        assert output_error(c * change, c * weight, d * d * gram) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("power", [-60, -20, 0, 20])
def test_the_largest_eigenvalue_of_a_wide_gram_of_any_size(power: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1100, generator=generator)
    x[:, 7] *= 30
    gram = x.T @ x
    want = float(torch.linalg.eigvalsh(gram.double())[-1])
    found = float(largest_eigenvalue(gram * 2.0 ** (2 * power)))
    assert want * (1 - 2e-3) < found * 2.0 ** (-2 * power) < want * (1 + 1e-3)


def _report(model: nn.Module) -> Any:
    report: Any = model.magr_report
    (site,) = report.rewritten
    return site


def _tensor(linear: nn.Linear) -> Any:
    return linear.weight
