"""XᵀX and what is read off it, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from graph_helpers import gram_of
from tiny_models import activations

from magr_fx import gram as module
from magr_fx.gram import add_to_gram, damped, output_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_add_to_gram(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    gram = torch.ones(5, 5)
    rows = activations(20, 5).to(dtype)
    add_to_gram(gram, rows)
    torch.testing.assert_close(gram.double(), 1 + gram_of(rows), rtol=1e-6, atol=1e-6)


def test_rows_that_do_not_count_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    rows = activations(10, 5)
    keep = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    expected = gram_of(rows[keep])
    rows[~keep] = torch.tensor([math.nan, math.inf, -math.inf, 1e38, 0.0])
    gram = torch.zeros(5, 5)
    add_to_gram(gram, rows, keep)
    torch.testing.assert_close(gram.double(), expected, rtol=1e-6, atol=1e-6)


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
