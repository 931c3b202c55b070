"""A comparison's plot: the divergence of all tokens and the loss of each window."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from magr_fx.reporting.plot import new_figure

if TYPE_CHECKING:
    from magr_fx.reporting.comparison import Comparison


def plot_comparison(comparison: Comparison, path: str | PathLike[str]) -> None:
    """Plot ``comparison`` to ``path``; the suffix chooses the format (png, pdf, svg)."""
    figure = new_figure()
    text, outputs = comparison.text, comparison.outputs
    if text is not None:
        left, right = figure.subplots(1, 2)
        share = np.linspace(0, 1, num=min(len(text.divergences), 2000))
        left.plot(
            100 * share,
            np.quantile(text.divergences, share, method="inverted_cdf"),
            color="tab:green",
        )
        left.axhline(text.divergence.value, color="0.6", linewidth=1, label="mean")
        left.set(
            title=f"KL divergence of {text.tokens:,} tokens from the original",
            xlabel="% of tokens with a smaller divergence",
            ylabel="nats",
            xlim=(0, 100),
        )
        if text.divergences.any():  # else the models are the same
            lowest = float(np.quantile(text.divergences, 0.02, method="inverted_cdf"))
            left.set(yscale="log", ylim=(max(1e-6, lowest), None))
        left.legend()
        numbers = [window.number for window in text.windows]
        losses = [(window.loss_original, window.loss) for window in text.windows]
        original, quantized = zip(*losses, strict=True)
        right.vlines(numbers, original, quantized, color="0.8", linewidth=1)
        right.plot(numbers, original, ".", color="0.4", label="original")
        right.plot(numbers, quantized, ".", color="tab:green", label="quantized")
        bad = [(w.number, w.loss) for w in text.windows if w.collapsed]
        if bad:
            right.plot(*zip(*bad, strict=True), "x", color="tab:red", label="collapsed")
        right.set(
            title=f"Perplexity x{text.ratio.value:.3f}; same top token {text.same_top.value:.1%}",
            xlabel="window",
            ylabel="loss, nats per token",
        )
        right.legend()
    elif outputs is not None:
        axes = figure.subplots()
        axes.plot([100 * error for error in outputs.by_window], ".", color="tab:green")
        axes.set(
            title=f"Outputs: mean cosine {outputs.cosine.value:.4f}",
            xlabel="sequence",
            ylabel="‖ŷ - y‖ / ‖y‖ (%)",
        )
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
