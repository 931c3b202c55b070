"""Scores of tokens → what a comparison says of a text, with standard errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from magr_fx.comparing.token_scores import TokenScores
from magr_fx.reporting.comparison import Estimate, Floats, Text, Window


def summarise(scores: TokenScores) -> Text:
    """Means, standard errors and quantiles of all tokens, and the mean of each window."""
    divergence, loss, original = (
        each.double().numpy() for each in (scores.divergence, scores.loss, scores.loss_original)
    )
    numbers, window = np.unique(scores.window.numpy(), return_inverse=True)
    log_ratio = clustered_mean(loss - original, window)
    change = scores.probability_change.double().numpy()
    return Text(
        perplexity=_exp(clustered_mean(loss, window)),
        perplexity_original=_exp(clustered_mean(original, window)),
        ratio=_exp(log_ratio),
        divergence=clustered_mean(divergence, window),
        median=_quantile(divergence, 0.5),
        percentile_99=_quantile(divergence, 0.99),
        percentile_999=_quantile(divergence, 0.999),
        largest=float(divergence.max()),
        same_top=clustered_mean(scores.same_top.double().numpy(), window),
        probability_rms=float(np.sqrt(np.mean(change**2))),
        windows=_windows(numbers, window, loss, original, divergence),
        divergences=divergence,
    )


def clustered_mean(values: Floats, cluster: Any) -> Estimate:
    """The mean of all values, and its standard error with whole clusters as observations.

    With m the mean, n the number of values, and s_c the sum of (value - m) in cluster c of C:
    error = sqrt(C/(C - 1)·Σ s_c²)/n, the usual estimate for a ratio of sums of clusters. NaN for
    one cluster.

    Args:
        values: of each token.
        cluster: of each token, 0 to C - 1.
    """
    mean = float(np.mean(values))
    sums = np.bincount(cluster, values - mean)
    count = len(sums)
    if count < 2:
        return Estimate(mean, float("nan"))
    return Estimate(mean, float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(values)))


def _quantile(values: Floats, share: float) -> float:
    """The smallest value that this share of the values does not exceed; it may be infinite."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def _exp(log: Estimate) -> Estimate:
    """exp of an estimate; the error is that of the first order."""
    value = float(np.exp(log.value))
    return Estimate(value, value * log.error)


def _windows(numbers: Any, window: Any, *scores: Floats) -> list[Window]:
    counts = np.bincount(window)
    means = (np.bincount(window, each) / counts for each in scores)
    rows = zip(numbers, counts, *means, strict=True)
    return [Window(int(number), int(count), *map(float, of)) for number, count, *of in rows]
