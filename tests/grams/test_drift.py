"""The weight that makes up for drifted inputs, against least squares on the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_helpers import gram_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import activations
from torch import Tensor

from magr_fx.grams.drift import compensate_input_error
from magr_fx.grams.gram import add_to_drift, add_to_gram

pytestmark = pytest.mark.usefixtures("one_thread")
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def drifted(
    tokens: int, columns: int, amount: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X̂ and X, and the gram and the drift that are collected of them."""
    original = activations(tokens, columns, seed=seed) + activations(tokens, 1, seed=seed + 1)
    now = original + amount * activations(tokens, columns, seed=seed + 2)
    gram, drift = torch.zeros(columns, columns), torch.zeros(columns, columns)
    add_to_gram(gram, now)
    add_to_drift(drift, now, original)
    return now, original, gram, drift


def least_squares(now: Tensor, original: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The minimiser of ‖X̂Aᵀ - XWᵀ‖² + ridge·‖A - W‖², by SVD of the stacked equations."""
    columns = weight.shape[1]
    root = ridge**0.5 * np.eye(columns)
    w = weight.double().numpy()
    left = np.vstack([now.double().numpy(), root])
    right = np.vstack([original.double().numpy() @ w.T, root @ w.T])
    found, *_ = np.linalg.lstsq(left, right, rcond=None)
    return torch.from_numpy(found.T)


@repeatable
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    amount=st.sampled_from([1e-3, 0.1, 1.0]),
    ridge=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 2**16),
)
def test_least_squares(rows: int, columns: int, amount: float, ridge: float, seed: int) -> None:
    now, original, gram, drift = drifted(5 * columns + 10, columns, amount, seed)
    weight = activations(rows, columns, seed=seed + 3)
    found = compensate_input_error(
        weight, gram, drift, damping=ridge / float(gram.diagonal().mean())
    )
    want = least_squares(now, original, weight, ridge)
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    # What is added is small beside the weight; it keeps its own digits all the same.
    change = (want - weight.double()).abs().max()
    slack = 1e-3 * float(change) + 1e-6 * float(weight.abs().max())
    assert (found.double() - want).abs().max() < slack


@pytest.mark.parametrize("tokens", [60, 5])
@pytest.mark.parametrize("ridge", [1.0, 10.0])
def test_the_loss_is_that_of_the_gram_and_a_constant(ridge: float, tokens: int) -> None:
    now, original, gram, drift = drifted(tokens, 12, 0.3)
    weight = activations(4, 12, seed=7)
    regularised = gram + ridge * torch.eye(12)
    damping = ridge / float(gram.diagonal().mean())
    target_weight = compensate_input_error(weight, gram, drift, damping=damping).double()

    def loss(candidate: Tensor) -> float:
        missed = now.double() @ candidate.T - original.double() @ weight.double().T
        return float(missed.square().sum() + ridge * (candidate - weight).square().sum())

    def energy(candidate: Tensor) -> float:
        away = candidate - target_weight
        return float(((away @ regularised.double()) * away).sum())

    candidates = [target_weight, weight.double(), torch.zeros_like(target_weight)]
    candidates += [activations(4, 12, seed=seed).double() * 3 for seed in range(4)]
    # The constant is what is left of two far larger numbers, whose share float32 may miss.
    for candidate in candidates:
        constant = loss(candidate) - energy(candidate)
        assert constant == pytest.approx(
            loss(target_weight), rel=0, abs=1e-5 * loss(candidate) + 1e-9
        )
    assert loss(target_weight) < 0.999 * loss(weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_drift_it_is_the_weight(dtype: torch.dtype) -> None:
    weight = activations(4, 12).to(dtype)
    gram = gram_of(activations(40, 12)).float()
    found = compensate_input_error(weight, gram, torch.zeros(12, 12))
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float())


def test_inputs_of_another_scale_are_scaled_back() -> None:
    original = activations(40, 6)
    now = 2 * original
    gram, drift = gram_of(now).float(), torch.zeros(6, 6)
    add_to_drift(drift, now, original)
    weight = activations(3, 6, seed=1)
    found = compensate_input_error(weight, gram, drift, damping=0.0)
    torch.testing.assert_close(found, weight / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("gram", [torch.ones(6, 6), torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 0]))])
def test_a_singular_gram_is_damped_until_it_can_be_solved(gram: Tensor, damping: float) -> None:
    weight = activations(2, 6)
    found = compensate_input_error(weight, gram, gram / 10, damping=damping)
    # A tenth of what reaches the weight was lost: a tenth more of it, where anything reaches it.
    loss = ((found - 1.1 * weight) @ gram * (found - 1.1 * weight)).sum()
    assert loss < 0.01 * ((0.1 * weight) @ gram * (0.1 * weight)).sum()


def test_where_nothing_arrives_the_weight_stays() -> None:
    weight = activations(2, 6)
    assert torch.equal(compensate_input_error(weight, torch.zeros(6, 6), torch.zeros(6, 6)), weight)
    assert torch.equal(compensate_input_error(weight, torch.zeros(6, 6), torch.eye(6)), weight)


def test_nothing_is_changed() -> None:
    _, _, gram, drift = drifted(40, 6, 0.3)
    weight = activations(3, 6)
    kept = [tensor.clone() for tensor in (weight, gram, drift)]
    compensate_input_error(weight, gram, drift)
    assert all(map(torch.equal, kept, (weight, gram, drift)))
