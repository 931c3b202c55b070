"""Divergences against torch's own formula and an oracle in exact fractions of float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional

from magr_fx.comparing.statistics import clustered_mean, summarise
from magr_fx.comparing.token_scores import TokenScores, token_scores


def logits(tokens: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(tokens, vocabulary, generator=draw)).to(dtype)


def scored(p: Tensor, q: Tensor, seed: int = 0) -> tuple[TokenScores, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    following = torch.randint(0, p.shape[-1], (len(p),), generator=draw)
    return token_scores(p, q, following, torch.zeros(len(p), dtype=torch.long)), following


@given(
    tokens=st.integers(1, 6),
    vocabulary=st.integers(2, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_scores_are_those_of_two_other_implementations(
    tokens: int, vocabulary: int, dtype: torch.dtype, seed: int
) -> None:
    p, q = (logits(tokens, vocabulary, seed + at, dtype) for at in (0, 1))
    found, following = scored(p, q, seed)
    by_torch = functional.kl_div(
        q.double().log_softmax(-1), p.double().softmax(-1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(found.divergence, by_torch, rtol=1e-9, atol=1e-12)
    for at in range(tokens):
        ps, qs = (np.exp(each[at].double().numpy() - each[at].max().item()) for each in (p, q))
        assert float(found.divergence[at]) == pytest.approx(stats.entropy(ps, qs), abs=1e-12)
        right = int(following[at])
        own, other = ps[right] / ps.sum(), qs[right] / qs.sum()
        assert float(found.loss_original[at]) == pytest.approx(-math.log(own))
        assert float(found.loss[at]) == pytest.approx(-math.log(other))
        assert float(found.probability_change[at]) == pytest.approx(other - own, abs=1e-12)
        assert bool(found.same_top[at]) == (int(p[at].argmax()) == int(q[at].argmax()))


def test_equal_logits_are_exactly_zero_apart() -> None:
    p = logits(50, 1000, 0)
    found, _ = scored(p, p.clone())
    assert not found.divergence.any()
    assert not found.probability_change.any()
    assert found.same_top.all()
    assert torch.equal(found.loss, found.loss_original)


def test_tokens_that_are_ruled_out_by_both_add_nothing() -> None:
    p, q = logits(5, 10, 0), logits(5, 10, 1)
    wanted, _ = scored(p[:, :8], q[:, :8])
    for each in (p, q):
        each[:, 8:] = -math.inf
    torch.testing.assert_close(scored(p, q)[0].divergence, wanted.divergence)
    q[:, 0] = -math.inf  # what p does not rule out
    assert scored(p, q)[0].divergence.isinf().all()


def test_the_error_of_a_mean_covers_its_truth() -> None:
    """Windows that differ from each other: the error of independent tokens would be far off."""
    draw = np.random.default_rng(0)
    windows, tokens, inside = 40, 30, 0
    cluster = np.repeat(np.arange(windows), tokens)
    for _ in range(400):
        values = draw.normal(0, 1, windows)[cluster] + draw.normal(0, 1, windows * tokens)
        mean, error = clustered_mean(values, cluster)
        assert error > 3 * values.std() / math.sqrt(len(values))
        inside += abs(mean) < 1.96 * error
    assert 0.90 < inside / 400 < 0.98


def test_windows_of_different_lengths_weigh_by_their_tokens() -> None:
    values, cluster = np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 1])
    mean, error = clustered_mean(values, cluster)
    assert mean == 2.0
    assert error == pytest.approx(math.sqrt(2 * (3**2 + 3**2)) / 4)
    assert math.isnan(clustered_mean(values, np.zeros(4, dtype=int)).error)


def test_a_summary_by_hand() -> None:
    column = torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    scores = TokenScores(
        divergence=column,
        loss=torch.tensor([1.0, 1.0, 6.0, 6.0], dtype=torch.float64),
        loss_original=torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64),
        same_top=torch.tensor([True, True, False, True]),
        probability_change=torch.tensor([0.0, 0.0, 0.3, -0.4], dtype=torch.float64),
        window=torch.tensor([2, 2, 5, 5]),
    )
    text = summarise(scores)
    assert text.perplexity.value == pytest.approx(math.exp(3.5))
    assert text.perplexity_original.value == pytest.approx(math.exp(1.5))
    assert text.ratio.value == pytest.approx(math.exp(2))
    # Windows of the same length: the error of a mean of two, ±2 around it.
    assert text.ratio.error == pytest.approx(2 * math.exp(2))
    assert text.divergence.value == 3.0
    assert (text.median, text.largest) == (2.0, 6.0)
    assert text.percentile_99 == 6.0
    assert text.same_top.value == 0.75
    assert text.probability_rms == pytest.approx(0.25)
    assert [(w.number, w.tokens, w.loss_original, w.loss) for w in text.windows] == [
        (2, 2, 1.0, 1.0),
        (5, 2, 2.0, 6.0),
    ]
    assert text.collapsed == [5]
    assert text.tokens == 4
