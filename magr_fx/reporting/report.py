"""MagRReport: a row per site, why sites were skipped or failed, and the time of each stage."""

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
from magr_fx.reporting.bit_plan import BitPlan
from magr_fx.reporting.comparison import Comparison
from magr_fx.reporting.report_text import report_text, totals
from magr_fx.reporting.rotation import Rotation

Outcome = Literal["rewritten", "skipped", "failed"]
# A site overfits if its error relative to torchao alone is larger on held-out tokens than on the
# calibration by more than this factor.
OVERFIT = 1.4
STAGES = ("trace", "check", "grams", "solve", "rewrite", "quantize")


@dataclass(frozen=True)
class Quantization:
    """How one site was quantized; errors are relative output errors.

    An output error is ‖X(V-A)ᵀ‖_F / ‖XAᵀ‖_F for the quantized values V. A is the original weight.
    With ``propagate`` A is the weight that compensates the error of the quantized layers before the
    site, and X is the input that the site gets from them.

    Attributes:
        alphas: the number of rows, or groups, for each alpha that was chosen; "0" is no shrinking.
        clip: the clip as a share of the largest magnitude, averaged over rows or groups.
        error_alone: of torchao alone, which quantizes the original weight, on the calibration.
        error: of the weight that magr-fx made, on the calibration.
        held_alone, held: the two errors on the held-out tokens; NaN if there are none.
        free: the share of the rows, or groups, whose zero point is not a whole number.
    """

    alphas: dict[str, int]
    clip: float
    error_alone: float
    error: float
    held_alone: float = math.nan
    held: float = math.nan
    free: float = 0.0

    @property
    def overfits(self) -> bool:
        """Whether the gain over torchao alone is much smaller on the held-out tokens.

        torchao alone uses no tokens, so the ratio of its two errors shows which tokens are harder.
        """
        if not (self.error_alone > 0 and self.held_alone > 0 and self.error > 0):
            return False  # also if there are no held-out tokens
        gain, held_gain = self.error / self.error_alone, self.held / self.held_alone
        return held_gain > 1 or held_gain > OVERFIT * gain


@dataclass(frozen=True, eq=False)
class SiteReport:
    """What happened to one site.

    Attributes:
        name: the parameter's name in the model, with an index if the site is a part of it.
        shape: ``(out, in)``; of a parameter that is no site, its own shape.
        outcome: ``"rewritten"``, ``"skipped"`` or ``"failed"``; the weight of a failed site is
            unchanged.
        reason: why it was skipped or failed; of a rewritten site a note, if there is one.
        calls: the number of matmuls of the traced graphs that read the weight.
        tokens: the number of calibration tokens in its gram, without padding.
        damping: s in G + s·mean(diag G)·I, the gram it was solved with; None if it was not solved,
            and in reports of versions that did not record it.
        channel_max_before, channel_max_after: each row's largest magnitude, ``[out]`` float32.
        output_error: ‖X(Ŵ-W)ᵀ‖_F / ‖XWᵀ‖_F on the calibration gram, before any quantization. NaN
            if GPTQ made codes of the weight; ``channel_max_after`` is then that of their values.
        status: the number of rows by the status of their solve.
        steps: the most steps that a row took.
        seconds: time in the solver; sites that share a gram are solved as one problem, and the
            time is split by their rows.
        memory: high-water mark when the site was done, in MiB: of the device's allocations on
            CUDA, of the process's resident memory otherwise.
        quantized: whether torchao quantized the weight afterwards (``magr_quantize`` only).
        quantization: the errors after quantization; None if the target only set the groups.
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
        """The weight's largest magnitude before rewriting."""
        return _maximum(self.channel_max_before)

    @property
    def max_after(self) -> float:
        """The weight's largest magnitude after rewriting."""
        return _maximum(self.channel_max_after)

    def as_dict(self) -> dict[str, Any]:
        """Everything except the per-channel arrays, for JSON: NaN and infinities are None."""
        names = [f.name for f in fields(self) if not f.name.startswith("channel_max")]
        values = {name: getattr(self, name) for name in (*names, "max_before", "max_after")}
        if self.quantization is not None:
            values["quantization"] = _finite(asdict(self.quantization))
        return _finite(values)


@dataclass(eq=False)
class MagRReport:
    """The report of a whole run; ``str(report)`` is a table of the sites and the totals.

    Attributes:
        sites: one :class:`SiteReport` per site, in the order in which they were solved; the skipped
            ones come last.
        config: the options with which the sites were solved.
        target: a short description of the torchao config or quantizer; empty without a target.
        batches: the number of calibration batches.
        traces: the number of graphs that they needed.
        tracer: how the model was traced: "export" or "make_fx"; empty if the model is a graph.
        refusal: why torch.export failed, if it was tried.
        notes: notes on the calibration, such as an input that may be a mask.
        seconds: wall time per stage: trace, check, grams, solve, rewrite, quantize.
        states, saved_bytes: the number of states saved in ``checkpoint_dir``, and the bytes that
            all ranks wrote to it, also before an interruption; 0 without a ``checkpoint_dir``.
        peak_memory: the largest ``memory`` of the sites, in MiB.
        rotations: the streams of the model, if :func:`magr_fx.rotate_transform` had rotated it.
        comparison: how far the quantized model is from the original; None without ``evaluate``.
        bits: how the budget was spent; None without a :class:`magr_fx.Budget`.
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
    rotations: list[Rotation] = field(default_factory=list)
    comparison: Comparison | None = None
    bits: BitPlan | None = None

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
        """The sites whose gain over torchao alone is much smaller on held-out tokens."""
        return [s for s in self.sites if s.quantization is not None and s.quantization.overfits]

    @property
    def peak_memory(self) -> float:
        return max((s.memory for s in self.sites if not math.isnan(s.memory)), default=math.nan)

    def _with(self, outcome: Outcome) -> list[SiteReport]:
        return [site for site in self.sites if site.outcome == outcome]

    @contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[], float]]:
        """Add the time in the context to ``seconds[stage]``; yields a function that returns it."""
        start, spent = perf_counter(), 0.0
        try:
            yield lambda: spent
        finally:
            spent = perf_counter() - start
            self.seconds[stage] += spent

    def mark_quantized(self, names: set[str]) -> None:
        """Record that torchao quantized the sites with these names, and no others."""
        self.sites = [replace(s, quantized=s.name in names) for s in self.sites]

    def __str__(self) -> str:
        return report_text(self)

    def totals(self) -> str:
        """A few lines about the run: sites, magnitudes, errors, damping, time and memory."""
        return "\n".join(totals(self))

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write everything except the per-channel arrays to ``path`` as JSON."""
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
            "rotations": [asdict(rotation) for rotation in self.rotations],
            "comparison": None if self.comparison is None else self.comparison.as_dict(),
            "bits": None if self.bits is None else self.bits.as_dict(),
            "sites": [site.as_dict() for site in self.sites],
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")

    def plot(self, path: str | PathLike[str]) -> None:
        """Plot the paper's Figure 1 (each channel's maximum) and the sites' output errors.

        The suffix of ``path`` chooses the format (png, pdf, svg).

        Raises:
            ImportError: matplotlib is not installed; the message has the command.
            ValueError: no site was rewritten.
        """
        from magr_fx.reporting.plot import plot_report

        plot_report(self, path)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for NaN and infinities, which JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _maximum(channels: npt.NDArray[np.float32] | None) -> float:
    return math.nan if channels is None or channels.size == 0 else float(channels.max())
