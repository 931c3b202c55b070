"""The result of a comparison: numbers, a table, JSON and a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from magr_fx.reporting.report_text import aligned

Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean and its standard error, which is NaN for a single window."""

    value: float
    error: float

    def __format__(self, spec: str) -> str:
        if math.isnan(self.error):
            return format(self.value, spec)
        return f"{self.value:{spec}} ± {self.error:{spec}}"


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        memory: bytes of its parameters and buffers; shared ones are counted once.
        disk: bytes of its files; None if there are none.
        weights: the number of its weights.
        bits: bits in memory per weight of matmuls and embeddings, with scales and zero points.
    """

    memory: int
    disk: int | None
    weights: int
    bits: float


@dataclass(frozen=True)
class Window:
    """One sequence of the text.

    Attributes:
        number: its number over all batches, from 0.
        tokens: the number of predicted tokens.
        loss, loss_original: the mean negative log-likelihood of the next token, in nats.
        divergence: the mean of KL(original ‖ quantized), in nats.
    """

    number: int
    tokens: int
    loss: float
    loss_original: float
    divergence: float

    @property
    def collapsed(self) -> bool:
        """Whether the quantized model's loss is above the original's by more than 3 nats."""
        return self.loss > self.loss_original + COLLAPSE


COLLAPSE = 3.0  # nats per token


@dataclass(frozen=True)
class Text:
    """How well two models predict the next token of the same text.

    Standard errors take each window as one observation, because the tokens of a window are not
    independent.

    Attributes:
        perplexity, perplexity_original: exp of the mean loss.
        ratio: perplexity / perplexity_original. Its standard error is that of the paired
            difference, which is far smaller than those of the perplexities.
        divergence: the mean of KL(original ‖ quantized), in nats per token.
        median, percentile_99, percentile_999, largest: of the tokens' divergences.
        same_top: the share of tokens for which both models predict the same most probable token.
        probability_rms: the root mean square of the change of the right token's probability.
        windows: every window, in the order of the batches.
        divergences: of each token, in nats, in the order of the text.
    """

    perplexity: Estimate
    perplexity_original: Estimate
    ratio: Estimate
    divergence: Estimate
    median: float
    percentile_99: float
    percentile_999: float
    largest: float
    same_top: Estimate
    probability_rms: float
    windows: list[Window]
    divergences: Floats = field(repr=False)

    @property
    def tokens(self) -> int:
        """The number of predicted tokens."""
        return len(self.divergences)

    @property
    def collapsed(self) -> list[int]:
        """The numbers of the windows that have collapsed, see :attr:`Window.collapsed`."""
        return [window.number for window in self.windows if window.collapsed]


@dataclass(frozen=True)
class Outputs:
    """How much the outputs of two models differ, for models that predict no next token.

    Attributes:
        cosine: the cosine of the original and the quantized output vector, averaged over all.
        relative_error: ‖ŷ - y‖ / ‖y‖ of all outputs together.
        by_window: the relative error of each sequence, or of each entry of a batch.
    """

    cosine: Estimate
    relative_error: float
    by_window: list[float]


@dataclass(frozen=True)
class Comparison:
    """How far a quantized model is from the original. ``print`` shows a table.

    Attributes:
        text: for causal language models, otherwise None.
        outputs: for all other models, otherwise None.
        size, size_original: the sizes of the two models.
    """

    text: Text | None
    outputs: Outputs | None
    size: ModelSize
    size_original: ModelSize

    def __str__(self) -> str:
        lines = [*_of_text(self.text), *_of_outputs(self.outputs)]
        rows: list[tuple[str, ...]] = [
            ("", "original", "quantized"),
            *_sizes(self.size_original, self.size),
        ]
        if self.text is not None:
            found = (f"{self.text.perplexity_original:.3f}", f"{self.text.perplexity:.3f}")
            rows.insert(1, ("perplexity", *found))
        return f"{aligned(rows, text=(0,))}\n\n{aligned(lines, text=(0,))}"

    def as_dict(self) -> dict[str, object]:
        """Everything except the divergence of each token, for JSON."""
        found = asdict(self)
        if self.text is not None:
            found["text"].pop("divergences")
            found["text"] |= {"tokens": self.text.tokens, "collapsed": self.text.collapsed}
        return {key: _finite(value) for key, value in found.items()}

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`as_dict` to ``path`` as JSON; NaN and infinities become null."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_dict(), file, indent=1, allow_nan=False)
            file.write("\n")

    def plot(self, path: str | PathLike[str]) -> None:
        """Plot the divergences of all tokens and the loss of each window, or the outputs' errors.

        The suffix of ``path`` chooses the format (png, pdf, svg).

        Raises:
            ImportError: matplotlib is not installed; the message has the command.
        """
        from magr_fx.reporting.plot_comparison import plot_comparison

        plot_comparison(self, path)


def _of_text(text: Text | None) -> list[tuple[str, str]]:
    if text is None:
        return []
    collapsed = ", ".join(map(str, text.collapsed[:8])) + (", ..." * (len(text.collapsed) > 8))
    return [
        ("tokens predicted", f"{text.tokens:,} in {len(text.windows):,} windows"),
        ("perplexity, ratio", f"{text.ratio:.4f}"),
        ("KL divergence, mean", f"{text.divergence:.5f} nats"),
        ("median", f"{text.median:.5f}"),
        ("99%", f"{text.percentile_99:.5f}"),
        ("99.9%", f"{text.percentile_999:.5f}"),
        ("largest", f"{text.largest:.5f}"),
        ("same top token", f"{text.same_top:.2%}"),
        ("right token's probability, RMS change", f"{text.probability_rms:.2%}"),
        ("collapsed windows", collapsed or "none"),
    ]


def _of_outputs(outputs: Outputs | None) -> list[tuple[str, str]]:
    if outputs is None:
        return []
    return [
        ("cosine of the outputs, mean", f"{outputs.cosine:.6f}"),
        ("relative error of the outputs", f"{outputs.relative_error:.4%}"),
        ("relative error, worst sequence", f"{max(outputs.by_window, default=math.nan):.4%}"),
    ]


def _sizes(original: ModelSize, quantized: ModelSize) -> list[tuple[str, ...]]:
    both = (original, quantized)
    rows: list[tuple[str, ...]] = [
        ("MB in memory", *(f"{size.memory / 1e6:,.1f}" for size in both)),
        ("bits per weight", *(f"{size.bits:.2f}" for size in both)),
    ]
    if any(size.disk is not None for size in both):
        disk = ("-" if size.disk is None else f"{size.disk / 1e6:,.1f}" for size in both)
        rows.append(("MB on disk", *disk))
        bits = (
            "-" if size.disk is None else f"{8 * size.disk / max(size.weights, 1):.2f}"
            for size in both
        )
        rows.append(("bits per weight on disk", *bits))
    return rows


def _finite(value: object) -> object:
    """The value with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, Estimate):
        return {"value": _finite(value.value), "error": _finite(value.error)}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
