"""XᵀX and what is read off it, against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import assert_gram, gram_of
from tiny_models import activations
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from magr_fx.grams import gram as module
from magr_fx.grams.gram import (
    SLACK,
    add_to_drift,
    add_to_gram,
    damped,
    largest_eigenvalue,
    output_error,
    row_errors,
    unit_of,
    within_range,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_add_to_gram(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    gram = torch.ones(5, 5)
    rows = activations(20, 5).to(dtype)
    add_to_gram(gram, rows)
    assert_gram(gram, 1 + gram_of(rows), 1e-6)


def test_rows_that_do_not_count_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    rows = activations(10, 5)
    keep = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    expected = gram_of(rows[keep])
    rows[~keep] = torch.tensor([math.nan, math.inf, -math.inf, 1e38, 0.0])
    gram = torch.zeros(5, 5)
    add_to_gram(gram, rows, keep.nonzero().squeeze(1))
    assert_gram(gram, expected, 1e-6)


@pytest.mark.parametrize("columns", [256, 259, 514])
def test_wide_grams_are_summed_by_block_rows(columns: int) -> None:
    rows = activations(50, columns)
    gram = torch.zeros(columns, columns)
    add_to_gram(gram, rows[:30])
    add_to_gram(gram, rows[30:])
    assert_gram(gram, gram_of(rows))
    # To the bit, but for the squares on the diagonal: of these each is one product.
    size = -(-columns // 4)
    for start in range(0, columns, size):
        end = min(start + size, columns)
        assert torch.equal(gram[end:, start:end], gram[start:end, end:].T)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_on_cuda(dtype: torch.dtype) -> None:
    """As exactly as float32 sums are: 300 products of about 1, which half precision cannot add."""
    rows = (1 + 0.1 * activations(300, 514)).to(dtype)
    gram = torch.zeros(514, 514, device="cuda")
    keep = torch.arange(300) % 3 > 0
    add_to_gram(gram, rows.cuda(), keep.cuda().nonzero().squeeze(1))
    expected = gram_of(rows[keep])
    assert_gram(gram.cpu(), expected)


def test_no_rows_add_nothing() -> None:
    gram = torch.ones(3, 3)
    add_to_gram(gram, torch.empty(0, 3))
    assert bool((gram == 1).all())


def test_damped() -> None:
    gram = gram_of(activations(9, 4)).float()
    before = gram.clone()
    expected = gram.double() + 0.3 * gram.double().trace() / 4 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(damped(gram, 0.3).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gram, before, rtol=0, atol=0)
    assert damped(gram, 0.0) is gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_error_is_that_of_the_outputs(dtype: torch.dtype) -> None:
    x, weight = activations(30, 6, seed=1), activations(4, 6, seed=2).to(dtype)
    change = 0.01 * activations(4, 6, seed=3)
    expected = (x @ change.T).double().norm() / (x @ weight.float().T).double().norm()
    error = output_error(change, weight, gram_of(x).float())
    assert error == pytest.approx(float(expected), rel=1e-5)


def test_output_error_where_a_side_is_zero() -> None:
    weight, gram = activations(4, 6), gram_of(activations(9, 6)).float()
    assert output_error(torch.zeros(4, 6), weight, gram) == 0
    assert output_error(torch.zeros(4, 6), torch.zeros(4, 6), gram) == 0
    assert output_error(weight, weight, torch.zeros(6, 6)) == 0
    assert output_error(weight, torch.zeros(4, 6), gram) == math.inf


# --- the largest eigenvalue


def correlated(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """A gram of inputs that have something in common, as activations do: one large eigenvalue."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 1, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) + common
    return inputs.T @ inputs


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A float64 gram with these eigenvalues."""
    noise = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed))
    basis, _ = torch.linalg.qr(noise.double())
    gram: Tensor = (basis * values.double()) @ basis.T
    return (gram + gram.T) / 2


def exact(gram: Tensor) -> float:
    return float(np.linalg.eigvalsh(gram.double().numpy())[-1])


@pytest.fixture
def iterated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has every gram iterated for, as large ones are; counts those diagonalised after all."""
    diagonalised: list[int] = []
    full = torch.linalg.eigvalsh

    def counted(gram: Tensor) -> Tensor:
        diagonalised.append(len(gram))
        found: Tensor = full(gram)
        return found

    monkeypatch.setattr(module, "EXACT_UP_TO", 4)
    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    return diagonalised


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 30])
def test_largest_eigenvalue(columns: int, dtype: torch.dtype) -> None:
    gram = correlated(columns, 100).to(dtype)
    found = largest_eigenvalue(gram)
    assert found.shape == ()
    assert found.dtype == dtype
    assert float(found) == pytest.approx(exact(gram), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_largest_eigenvalue_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    gram = (correlated(8, 20) / 100).to(dtype)
    found = largest_eigenvalue(gram)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(exact(gram.float()), rel=1e-6)


def test_largest_eigenvalue_is_never_negative() -> None:
    assert float(largest_eigenvalue(torch.zeros(3, 3))) == 0.0
    assert float(largest_eigenvalue(-torch.eye(3))) == 0.0


def test_largest_eigenvalue_of_each_of_a_batch() -> None:
    grams = torch.stack(
        [correlated(6, 30, seed) * 10.0**seed for seed in range(5)] + [torch.zeros(6, 6)]
    )
    found = largest_eigenvalue(grams)
    assert found.tolist() == [float(largest_eigenvalue(gram)) for gram in grams]
    assert found[:5].tolist() == pytest.approx([exact(gram) for gram in grams[:5]], rel=1e-6)
    nested = largest_eigenvalue(grams.view(2, 3, 6, 6))
    assert torch.equal(nested, found.view(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [400, 20])
def test_large_grams_are_iterated_for(tokens: int, dtype: torch.dtype, iterated: list[int]) -> None:
    gram = correlated(60, tokens).to(dtype)
    found = largest_eigenvalue(gram)
    assert found.shape == ()
    assert found.dtype == dtype
    assert float(found) <= exact(gram) * (1 + 1e-5)
    assert exact(gram) <= float(found) * (1 + SLACK)
    assert not iterated


def test_a_gram_beyond_the_exact_size() -> None:
    assert module.EXACT_UP_TO == 1024
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 1100, generator=generator) + 1
    gram = inputs.T @ inputs
    want = exact(inputs @ inputs.T)  # the same eigenvalues, of a smaller matrix
    assert float(largest_eigenvalue(gram)) == pytest.approx(want, rel=SLACK)


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("seed", range(4))
def test_clustered_leading_eigenvalues(gap: float, seed: int, iterated: list[int]) -> None:
    values = torch.linspace(0, 0.9, 80)
    values[-20:] = 1 - gap * torch.linspace(1, 0, 20)
    gram = with_spectrum(values * 7, seed)
    found = float(largest_eigenvalue(gram))
    assert 7 / (1 + SLACK) <= found <= 7 * (1 + 1e-9)


def test_equal_eigenvalues(iterated: list[int]) -> None:
    assert float(largest_eigenvalue(3 * torch.eye(50))) == pytest.approx(3, rel=SLACK)


def test_a_start_without_the_leading_eigenvector_falls_back(
    iterated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first input alone is the largest eigenvalue, and the start has nothing of it.
    gram = torch.diag(torch.linspace(5, 1, 40))
    gram[0, 0] = 9.0
    draw = torch.randn

    def blind(*size: int, **options: Any) -> Tensor:
        start = draw(*size, **options)
        if size == (40, 1):
            start[0] = 0
        return start

    monkeypatch.setattr(torch, "randn", blind)
    assert float(largest_eigenvalue(gram)) == pytest.approx(9, rel=1e-6)
    assert iterated == [40]


def test_large_grams_of_zeros(iterated: list[int]) -> None:
    assert float(largest_eigenvalue(torch.zeros(40, 40))) == 0
    found = largest_eigenvalue(torch.stack([torch.zeros(40, 40), correlated(40, 90)]))
    assert float(found[0]) == 0
    assert float(found[1]) == pytest.approx(exact(correlated(40, 90)), rel=SLACK)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_large_grams_of_any_scale(scale: float, iterated: list[int]) -> None:
    gram = correlated(60, 90) * scale
    assert float(largest_eigenvalue(gram)) == pytest.approx(exact(gram), rel=SLACK)


def test_badly_scaled_large_grams(iterated: list[int]) -> None:
    sizes = torch.logspace(-4, 4, 60)
    gram = correlated(60, 90) * sizes * sizes.unsqueeze(-1)
    assert float(largest_eigenvalue(gram)) == pytest.approx(exact(gram), rel=SLACK)


def test_the_same_bits_and_no_global_random_numbers(iterated: list[int]) -> None:
    gram = correlated(60, 400)
    state = torch.get_rng_state()
    first = largest_eigenvalue(gram)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    assert torch.equal(largest_eigenvalue(gram), first)
    assert torch.equal(largest_eigenvalue(gram.clone()), first)


def test_a_gram_is_not_changed(iterated: list[int]) -> None:
    gram = correlated(60, 400)
    kept = gram.clone()
    largest_eigenvalue(gram)
    largest_eigenvalue(gram[:3, :3])
    assert torch.equal(gram, kept)


# --- how inputs have drifted, and the errors of rows


def drift_of(tokens: Tensor, original: Tensor) -> Tensor:
    """X̂ᵀ(X - X̂) in float64."""
    return tokens.double().T @ (original.double() - tokens.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_add_to_drift(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    drift = torch.ones(5, 5)
    tokens, original = activations(20, 5).to(dtype), activations(20, 5, seed=1).to(dtype)
    kept = tokens.clone(), original.clone()
    add_to_drift(drift, tokens, original)
    torch.testing.assert_close(drift.double(), 1 + drift_of(tokens, original), rtol=1e-6, atol=1e-5)
    assert torch.equal(tokens, kept[0])
    assert torch.equal(original, kept[1])


def test_a_small_drift_of_large_inputs_keeps_its_digits() -> None:
    """The difference is taken before the product."""
    tokens = 1000 * activations(20, 5)
    original = tokens + 2.0**-10 * activations(20, 5, seed=1).round()
    drift = torch.zeros(5, 5)
    add_to_drift(drift, tokens, original)
    want = drift_of(tokens, original)
    assert float((drift.double() - want).abs().max() / want.abs().max()) < 1e-5


def test_drift_of_rows_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    tokens, original = activations(10, 5), activations(10, 5, seed=1)
    keep = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    want = drift_of(tokens[keep], original[keep])
    tokens[~keep] = math.nan
    original[1], original[5] = math.inf, math.nan
    drift = torch.zeros(5, 5)
    add_to_drift(drift, tokens, original, keep.nonzero().squeeze(1))
    torch.testing.assert_close(drift.double(), want, rtol=1e-6, atol=1e-5)


def test_no_drift() -> None:
    drift, tokens = torch.ones(5, 5), activations(9, 5)
    add_to_drift(drift, tokens, tokens.clone())
    add_to_drift(drift, torch.empty(0, 5), torch.empty(0, 5))
    assert bool((drift == 1).all())


def test_row_errors() -> None:
    x, change = activations(30, 6, seed=1), 0.01 * activations(4, 6, seed=3)
    change[2] = 0
    kept = change.clone()
    found = row_errors(change, gram_of(x).float())
    assert found.shape == (4,)
    assert found.dtype == torch.float32
    want = (x.double() @ change.double().T).square().sum(0)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)
    assert float(found[2]) == 0
    assert torch.equal(change, kept)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_an_iteration_that_fails_has_another_way(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("of torch.lobpcg")

    monkeypatch.setattr("torch.lobpcg", fail)
    x = torch.randn(64, 1100, generator=torch.Generator().manual_seed(0))
    want = float(torch.linalg.eigvalsh((x.T @ x).double())[-1])
    assert float(largest_eigenvalue(x.T @ x)) == pytest.approx(want, rel=1e-4)


def test_no_memory_is_no_failure_of_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("of the device")

    monkeypatch.setattr("torch.lobpcg", fail)
    x = torch.randn(64, 1100, generator=torch.Generator().manual_seed(0))
    with pytest.raises(torch.OutOfMemoryError):
        largest_eigenvalue(x.T @ x)


def test_eigenvalues_that_do_not_converge_are_tried_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole: Any = torch.linalg.eigvalsh

    def only_float64(gram: torch.Tensor) -> torch.Tensor:
        if gram.dtype != torch.float64:
            raise LinAlgError("did not converge")
        values: torch.Tensor = whole(gram)
        return values

    gram = torch.diag(torch.tensor([1.0, 5.0, 2.0]))
    monkeypatch.setattr("torch.linalg.eigvalsh", only_float64)
    found = largest_eigenvalue(gram)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(5)


@pytest.mark.parametrize("power", [-66, -30, 0, 30])
def test_a_gram_within_range_is_the_gram_but_for_a_power_of_two(power: int) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)) * 2.0**power
    gram = x.T @ x
    inside = within_range(gram)
    ratio = unit_of(gram) / unit_of(inside)
    assert torch.equal(inside.double() * ratio, gram.double())
    assert 2.0**-41 < float(inside.diagonal().amax()) < 2.0**42
    assert (ratio == 1) == (abs(power) < 20)
