"""One step of ADMM apart from its product: eager and as a Triton kernel, against plain float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from magr_fx.iterations.relaxed_step import clamp_groups, has_triton, prox_level, relaxed_step
from magr_fx.solver.solver import solve_magr

pytestmark = pytest.mark.usefixtures("one_thread")

Step = Callable[..., Tensor]
RELAXATION = 1.6


def reference(
    shifted: Tensor, weight: Tensor, rho: Tensor, alpha: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(τ, y, the next v) of each row of ``[..., in]``, by the sorting oracle."""
    v, w = shifted.double().numpy(), weight.double().numpy()
    p = np.broadcast_to(rho.double().numpy(), (*v.shape[:-1], groups, v.shape[-1] // groups))
    level = np.empty((*v.shape[:-1], groups))
    z = np.empty_like(v).reshape(p.shape)
    for at in np.ndindex(level.shape):
        row = v.reshape(p.shape)[at]
        level[at] = oracles.weighted_level(np.abs(row), p[at], alpha)
        z[at] = np.clip(row, -level[at], level[at])
    z = z.reshape(v.shape)
    u = v - z
    # v + relaxation·(w - z) leaves h + u for h = relaxation·x + (1 - relaxation)·z, x = w + yN.
    return tuple(map(torch.from_numpy, (level, z - u - w, v + RELAXATION * (w - z))))  # type: ignore[return-value]


def inputs(
    rows: tuple[int, ...] = (4,),
    columns: int = 12,
    groups: int = 1,
    problems: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """v, w, a guess of τ and rho, as the solver shapes them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*rows, columns) if problems is None else (problems, *rows, columns)
    size = columns // groups
    rho_shape = (groups, size) if problems is None else (problems, 1, groups, size)
    found = {
        "shifted": torch.randn(shape, generator=generator),
        "weight": torch.randn(shape, generator=generator),
        "level": torch.rand((*shape[:-1], groups), generator=generator),
        "rho": torch.rand(rho_shape, generator=generator) * 2 + 0.01,
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def check(step: Step, given: dict[str, Tensor], alpha: float) -> Tensor:
    """Take the step and compare; returns τ."""
    shifted, weight, level = (given[name].clone() for name in ("shifted", "weight", "level"))
    source, scratch = torch.full_like(shifted, math.nan), torch.empty_like(shifted)
    found = step(
        shifted,
        weight,
        level,
        source,
        scratch,
        rho=given["rho"],
        alpha=alpha,
        relaxation=RELAXATION,
    )
    host = {name: tensor.cpu() for name, tensor in given.items()}
    groups = level.shape[-1]
    tau, y, v = reference(host["shifted"], host["weight"], host["rho"], alpha, groups)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-5 if shifted.dtype == torch.float32 else 1e-13}
    assert found.shape == level.shape
    assert found.dtype == shifted.dtype
    torch.testing.assert_close(found.cpu().double(), tau, **close)
    torch.testing.assert_close(source.cpu().double(), y, **close)
    torch.testing.assert_close(shifted.cpu().double(), v, **close)
    assert torch.equal(weight, given["weight"])
    assert torch.equal(level, given["level"])
    return found


def interpreted(module: Any) -> Step:
    """The kernel with the arguments of the eager step."""

    def step(
        shifted: Tensor,
        weight: Tensor,
        level: Tensor,
        source: Tensor,
        scratch: Tensor,
        **options: Any,
    ) -> Tensor:
        found: Tensor = module.relaxed_step_fused(shifted, weight, level, source, **options)
        return found

    return step


@pytest.fixture
def kernel() -> Any:
    """The module of the kernel, which Triton interprets on the CPU where there is no GPU."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles here: see the tests on CUDA")
    return importlib.import_module("magr_fx.iterations.relaxed_step_triton")


@pytest.fixture(params=["eager", pytest.param("kernel", marks=pytest.mark.slow)])
def step(request: pytest.FixtureRequest) -> Step:
    """Each test that takes it runs on both."""
    if request.param == "eager":
        return relaxed_step
    return interpreted(request.getfixturevalue("kernel"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (5, 1), (96, 1), (12, 3), (6, 6), (96, 4)])
def test_step_is_the_formula(step: Step, columns: int, groups: int, dtype: torch.dtype) -> None:
    given = inputs((3,), columns, groups, dtype=dtype)
    for alpha in (1e-3, 0.1, 1.0):
        check(step, given, alpha)


@pytest.mark.parametrize("groups", [1, 3])
def test_problems_have_their_own_rho(step: Step, groups: int) -> None:
    given = inputs((2,), 12, groups, problems=3)
    given["rho"] *= torch.tensor([1.0, 10.0, 0.1])[:, None, None, None]
    levels = check(step, given, 0.5)
    same = {**given, "rho": given["rho"][:1].expand_as(given["rho"]).contiguous()}
    assert not torch.allclose(levels, check(step, same, 0.5))


@pytest.mark.parametrize(
    "guess", [0.0, 1e-6, 0.5, 1.0, 2.0, 100.0], ids=lambda value: f"{value:g}x"
)
def test_any_guess_leads_to_the_level(step: Step, guess: float) -> None:
    given = inputs((3,), 24, 2, seed=1)
    magnitude = given["shifted"].abs().view(3, 2, 12)
    given["level"] = guess * magnitude.amax(-1)  # 1: at the largest entry, beyond that above all
    found = check(step, given, 0.3)
    given["level"] = found  # the answer itself
    assert torch.allclose(check(step, given, 0.3), found, rtol=1e-6)
    given["level"] = guess * found
    check(step, given, 0.3)


def test_alpha_beyond_the_row_leaves_nothing(step: Step) -> None:
    given = inputs((3,), 24, 2, seed=2)
    for guess in (0.0, 0.7, 50.0):
        given["level"].fill_(guess)
        for alpha in (1e3, 1e30):
            assert not check(step, given, alpha).any()


def test_zero_rows_and_equal_entries(step: Step) -> None:
    given = inputs((4,), 12, 1, seed=3)
    given["shifted"][1] = 0
    given["shifted"][2] = 0.5
    given["shifted"][3] = torch.tensor([1.0, -1.0]).repeat(6)
    for guess in (0.0, 0.4, 0.5, 7.0):
        given["level"].fill_(guess)
        found = check(step, given, 0.3)
        assert found[1] == 0


def test_rows_of_very_different_rho(step: Step) -> None:
    given = inputs((3,), 12, 1, dtype=torch.float64, seed=4)
    given["rho"] = torch.logspace(-6, 3, 12, dtype=torch.float64).unsqueeze(0)
    for alpha in (1e-6, 1e-3, 1.0):
        check(step, given, alpha)


def test_a_row_that_is_not_finite_ends_and_stays_alone(step: Step) -> None:
    given = inputs((3,), 12, 1, seed=5)
    want = {name: tensor.clone() for name, tensor in given.items()}
    given["shifted"][1, 4] = math.nan
    shifted, source = given["shifted"].clone(), torch.empty(3, 12)
    found = step(
        shifted,
        given["weight"],
        given["level"],
        source,
        torch.empty(3, 12),
        rho=given["rho"],
        alpha=0.3,
        relaxation=RELAXATION,
    )
    tau, y, v = reference(want["shifted"], want["weight"], want["rho"], 0.3, 1)
    others = torch.tensor([0, 2])
    torch.testing.assert_close(found[others].double(), tau[others], rtol=0, atol=1e-5)
    torch.testing.assert_close(source[others].double(), y[others], rtol=0, atol=1e-5)
    torch.testing.assert_close(shifted[others].double(), v[others], rtol=0, atol=1e-5)


# --- what only the kernel has


@pytest.mark.parametrize("guess", [0.0, 2.0, 9.0])
@pytest.mark.slow
def test_groups_of_several_blocks(kernel: Any, guess: float) -> None:
    assert kernel.MOST_BLOCK == 4096
    given = inputs((2,), 4096 + 3, 1, seed=6)
    given["shifted"][:, 4096:] = torch.tensor([5.0, -4.0, 3.0])  # what matters is in the last one
    given["level"].fill_(guess)
    assert (check(interpreted(kernel), given, 0.5) > 3).all()


@pytest.mark.parametrize("columns", [5, 8, 16, 19])
@pytest.mark.slow
def test_small_blocks(kernel: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MOST_BLOCK", 8)
    check(interpreted(kernel), inputs((3,), 2 * columns, 2, seed=7), 0.4)
    check(interpreted(kernel), inputs((2,), columns, 1, problems=2, seed=8), 0.4)


@pytest.mark.slow
def test_the_kernel_agrees_with_the_eager_step(kernel: Any) -> None:
    given = inputs((3,), 40, 4, problems=2, seed=9)
    torch.testing.assert_close(
        check(interpreted(kernel), given, 0.2), check(relaxed_step, given, 0.2), rtol=0, atol=1e-6
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("columns", "groups", "problems"),
    [(1, 1, None), (96, 1, None), (4099, 1, None), (11008, 1, None), (96, 4, None), (96, 3, 5)],
)
def test_the_compiled_kernel(
    columns: int, groups: int, problems: int | None, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    from magr_fx.iterations.relaxed_step_triton import relaxed_step_fused

    def fused(*args: Tensor, **options: Any) -> Tensor:
        shifted, weight, level, source, _ = args
        return relaxed_step_fused(shifted, weight, level, source, **options)

    given = inputs((33,), columns, groups, problems, dtype, seed=10)
    given = {name: tensor.cuda() for name, tensor in given.items()}
    for guess in (0.0, 1.0, 9.0):
        given["level"].fill_(guess)
        check(fused, given, 0.5)
        check(fused, given, 1e9)


# --- the parts


def test_clamp_groups_clamps_each_to_its_own_level() -> None:
    rows = torch.tensor([[3.0, -1.0, 0.5, -4.0], [2.0, 2.0, -2.0, 1.0]])
    level = torch.tensor([[2.0, 1.0], [0.0, 1.5]])
    want = torch.tensor([[2.0, -1.0, 0.5, -1.0], [0.0, 0.0, -1.5, 1.0]])
    assert torch.equal(clamp_groups(rows, level), want)
    assert torch.equal(clamp_groups(rows[None], level[None]), want[None])


def test_prox_level_on_a_cpu_goes_to_the_end() -> None:
    magnitude = 0.5 ** torch.arange(60.0, dtype=torch.float64).unsqueeze(0)
    rho = torch.ones(1, 60, dtype=torch.float64)
    found = prox_level(magnitude, 1.9, rho=rho, start=torch.ones(1, dtype=torch.float64))
    assert float(found) == pytest.approx(oracles.soft_level(magnitude[0].numpy(), 1.9), rel=1e-12)


@pytest.mark.parametrize("alpha", [1e-6, 1e-8, 1e-10, 1e-12])
def test_an_alpha_below_rounding_leaves_the_level_at_the_top(step: Step, alpha: float) -> None:
    given = inputs((8,), 24, 1, dtype=torch.float32)
    top = given["shifted"].abs().amax(-1, keepdim=True)
    for factor in (0.5, 1.0, 2.0):
        level = check(step, {**given, "level": top * factor}, alpha)
        assert (level <= top).all()


@pytest.mark.slow
@pytest.mark.slow
def test_a_solve_by_the_kernel_is_the_eager_one(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2, 60, 12, generator=generator)
    weight = torch.randn(2, 3, 12, generator=generator)
    gram = tokens.mT @ tokens
    for size in (None, 4):
        eager = solve_magr(weight, gram, alpha=0.02, group_size=size)
        with monkeypatch.context() as patch:
            patch.setattr("magr_fx.iterations.admm_tile.relaxed_step", interpreted(kernel))
            fused = solve_magr(weight, gram, alpha=0.02, group_size=size)
        assert fused.summary == eager.summary
        assert torch.allclose(fused.weight, eager.weight, rtol=0, atol=1e-5)


def test_without_triton_the_eager_step_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    has_triton.cache_clear()
    with caplog.at_level("INFO", logger="magr_fx"):
        assert not has_triton(torch.device("cpu"))
    assert "without Triton" in caplog.text
    has_triton.cache_clear()
