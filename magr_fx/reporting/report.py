"""What was done: a row per site, what was left alone and why, and where the time went."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from magr_fx.config import MagRConfig
from magr_fx.reporting.comparison import Comparison
from magr_fx.reporting.report_text import report_text, totals

Outcome = Literal["rewritten", "skipped", "failed"]
# How much smaller the gain on held-out tokens has to be for a warning.
OVERFIT = 1.4
STAGES = ("trace", "check", "grams", "solve", "rewrite", "quantize")


@dataclass(frozen=True)
class Quantization:
    """What the target makes of one site; errors are relative output errors.

    An output error is ‖X(V-A)ᵀ‖_F / ‖XAᵀ‖_F for the quantized values V. A is the original weight;
    with ``propagate`` it is the weight that makes up for what the quantized layers before it
    lose, and X what reaches the site behind them.

    Attributes:
        alphas: how many rows, or groups, chose which alpha; "0" is no shrinking.
        clip: the mean share of the largest magnitude, per row or group, that was kept.
        error_alone: of torchao alone, which quantizes the original weight, on the calibration.
        error: of what was made here.
        held_alone, held: the same on the tokens that were kept aside; NaN where there are none.
    """

    alphas: dict[str, int]
    clip: float
    error_alone: float
    error: float
    held_alone: float = math.nan
    held: float = math.nan

    @property
    def overfits(self) -> bool:
        """Whether the gain over torchao alone is much smaller on the tokens that were kept aside.

        The quantizer alone has seen no token, so that its two errors tell how hard these are.
        """
        if not (self.error_alone > 0 and self.held_alone > 0 and self.error > 0):
            return False  # also where there is nothing held
        gain, held_gain = self.error / self.error_alone, self.held / self.held_alone
        return held_gain > 1 or held_gain > OVERFIT * gain


@dataclass(frozen=True, eq=False)
class SiteReport:
    """What happened to one site.

    Attributes:
        name: the parameter's name in the model, with an index where the site is a part of it.
        shape: ``(out, in)``; of a parameter that is no site, its own shape.
        outcome: ``"rewritten"``, ``"skipped"`` or ``"failed"`` (its weight is as it was).
        reason: why it was skipped or failed; of a rewritten one, what is worth knowing.
        calls: how many matmuls of the traced graphs read the weight.
        tokens: how many calibration tokens are in its gram (padding does not count).
        damping: s in G + s·mean(diag G)·I, the gram it was solved with; None where it was not
            solved, and in reports of versions that did not note it.
        channel_max_before, channel_max_after: each row's largest magnitude, ``[out]`` float32.
        output_error: ‖X(Ŵ-W)ᵀ‖_F / ‖XWᵀ‖_F on the calibration gram, before any quantization; NaN
            where GPTQ made codes of the weight at once, whose values ``channel_max_after`` is of.
        status: how many rows the solver ended in which way.
        steps: the most steps that a row took.
        seconds: time in the solver; sites that share a gram are solved as one problem, and the
            time is split by their rows.
        memory: high-water mark when the site was done, in MiB: of the device's allocations on
            CUDA, of the process's resident memory otherwise.
        quantized: whether torchao quantized the weight afterwards (``magr_quantize`` only).
        quantization: how well, where the target took part; None where it only set the groups.
    """

    name: str
    shape: tuple[int, ...]
    outcome: Outcome
    reason: str = ""
    calls: int = 0
    tokens: int = 0
    damping: float | None = None
    channel_max_before: npt.NDArray[np.float32] | None = None
    channel_max_after: npt.NDArray[np.float32] | None = None
    output_error: float = math.nan
    status: str = ""
    steps: int = 0
    seconds: float = 0.0
    memory: float = math.nan
    quantized: bool = False
    quantization: Quantization | None = None

    @property
    def max_before(self) -> float:
        """The weight's largest magnitude before."""
        return _maximum(self.channel_max_before)

    @property
    def max_after(self) -> float:
        """The weight's largest magnitude after."""
        return _maximum(self.channel_max_after)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the per-channel arrays, as JSON knows it (no NaN, no Inf)."""
        names = [f.name for f in fields(self) if not f.name.startswith("channel_max")]
        values = {name: getattr(self, name) for name in (*names, "max_before", "max_after")}
        if self.quantization is not None:
            values["quantization"] = _finite(asdict(self.quantization))
        return _finite(values)


@dataclass(eq=False)
class MagRReport:
    """The whole run; ``str(report)`` is a table of the sites and the totals.

    Attributes:
        sites: one :class:`SiteReport` per site, in the order they were solved, then those that
            were skipped.
        config: the options that the sites were solved with.
        target: the torchao config that quantized the model, in brief; empty where none did.
        batches: how many calibration batches were run.
        traces: how many graphs it took to run them.
        tracer: what traced the model: "export" or "make_fx"; empty for a graph that was given.
        refusal: why torch.export did not, where it was asked to.
        notes: what else is worth knowing of the calibration, such as an input that may be a mask.
        seconds: wall time per stage: trace, check, grams, solve, rewrite, quantize.
        states, saved_bytes: how many states ``checkpoint_dir`` got, and how many bytes it was
            written in all, by all ranks, also before the run was cut short; 0 without one.
        peak_memory: the highest of the sites' ``memory``, in MiB.
        comparison: how far the quantized model is from the original, where ``evaluate`` asked for
            it.
    """

    config: MagRConfig
    target: str = ""
    sites: list[SiteReport] = field(default_factory=list)
    batches: int = 0
    traces: int = 0
    tracer: str = ""
    refusal: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    states: int = 0
    saved_bytes: int = 0
    comparison: Comparison | None = None

    @property
    def rewritten(self) -> list[SiteReport]:
        return self._with("rewritten")

    @property
    def skipped(self) -> list[SiteReport]:
        return self._with("skipped")

    @property
    def failed(self) -> list[SiteReport]:
        return self._with("failed")

    @property
    def overfitted(self) -> list[SiteReport]:
        """The sites whose gain over torchao alone mostly vanishes on held-out tokens."""
        return [s for s in self.sites if s.quantization is not None and s.quantization.overfits]

    @property
    def peak_memory(self) -> float:
        return max((s.memory for s in self.sites if not math.isnan(s.memory)), default=math.nan)

    def _with(self, outcome: Outcome) -> list[SiteReport]:
        return [site for site in self.sites if site.outcome == outcome]

    @contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[], float]]:
        """Add the time spent inside to ``seconds[stage]``; gives what tells it afterwards."""
        start, spent = perf_counter(), 0.0
        try:
            yield lambda: spent
        finally:
            spent = perf_counter() - start
            self.seconds[stage] += spent

    def mark_quantized(self, names: set[str]) -> None:
        """Note that torchao quantized the parameters with these names."""
        self.sites = [replace(s, quantized=s.name in names) for s in self.sites]

    def __str__(self) -> str:
        return report_text(self)

    def totals(self) -> str:
        """The run in a few lines: sites, magnitudes, errors, damping, time and memory."""
        return "\n".join(totals(self))

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write everything but the per-channel arrays to ``path``."""
        record = {
            "config": self.config.resolved().as_dict(),
            "target": self.target,
            "batches": self.batches,
            "traces": self.traces,
            "tracer": self.tracer,
            "refusal": self.refusal,
            "notes": self.notes,
            "seconds": self.seconds,
            "states": self.states,
            "saved_bytes": self.saved_bytes,
            "comparison": None if self.comparison is None else self.comparison.as_dict(),
            "sites": [site.as_dict() for site in self.sites],
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the paper's Figure 1 (each channel's maximum) and the sites' output errors.

        Raises:
            ImportError: matplotlib is not installed; the message has the command.
            ValueError: no site was rewritten.
        """
        from magr_fx.reporting.plot import plot_report

        plot_report(self, path)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for NaN and Inf, which JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _maximum(channels: npt.NDArray[np.float32] | None) -> float:
    return math.nan if channels is None or channels.size == 0 else float(channels.max())
