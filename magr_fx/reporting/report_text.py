"""A report as text: a table of the sites, why others were skipped or failed, and the totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

if TYPE_CHECKING:
    from magr_fx.reporting.report import MagRReport, SiteReport

_HEADER = (
    "site", "shape", "calls", "tokens", "max before", "max after", "output error",
    "rows by status", "steps", "seconds", "MiB",
)  # fmt: skip
_QUANTIZATION = (
    "site", "rows by alpha", "mean clip", "torchao alone", "quantized", "held out: alone",
    "quantized",
)  # fmt: skip


def report_text(report: MagRReport) -> str:
    """The whole report as text."""
    done = report.rewritten
    parts = [aligned([_HEADER, *map(_cells, done)], text=(0, 7))] if done else []
    judged = [_quantization_cells(site) for site in done if site.quantization]
    if judged:
        table = aligned([_QUANTIZATION, *judged], text=(0, 1))
        parts.append(f"output error after quantization:\n{table}")
    notes = [site for site in done if site.reason]
    size = _parameters(report.sites)
    for title, sites in (("failed", report.failed), ("skipped", report.skipped), ("notes", notes)):
        if sites:
            rows = [(s.name, _shape(s), f"{_parameters([s]) / size:.1%}", s.reason) for s in sites]
            parts.append(f"{title}:\n{aligned(rows, text=(0, 3))}")
    if report.bits is not None:
        parts.append(f"the budget of bits:\n{report.bits.summary()}")
    if report.comparison is not None:
        parts.append(f"the quantized model compared with the original:\n{report.comparison}")
    return "\n\n".join([*parts, report.totals()])


def totals(report: MagRReport) -> list[str]:
    """The lines of the totals."""
    return [
        *_rewritten(report),
        *_errors_after_quantization(report),
        *_rotated(report),
        *([] if report.bits is None else [report.bits.totals()]),
        *_quantized(report),
        *_run(report),
    ]


def _rewritten(report: MagRReport) -> list[str]:
    done, size = report.rewritten, _parameters(report.sites)
    share = _parameters(done) / size if size else 0.0
    lines = [
        f"{len(done)} rewritten, {len(report.skipped)} skipped, {len(report.failed)} failed; "
        f"{share:.1%} of {size:,} matrix parameters rewritten"
    ]
    ratio = np.concatenate([np.empty(0, np.float32), *map(_ratio, done)])
    error = np.array([s.output_error for s in done if not math.isnan(s.output_error)])
    if len(ratio) and len(error):
        lines.append(
            f"largest magnitude per channel: median x{np.median(ratio):.2f}; output error "
            f"before quantization: median {np.median(error):.2%}, worst {error.max():.2%}"
        )
    shares = [site.damping for site in done if site.damping is not None]
    if shares:
        least, most = f"{min(shares):.3g}", f"{max(shares):.3g}"
        which = least if least == most else f"{least} to {most}"
        lines.append(f"damping: {which} of each gram's mean diagonal")
    return lines


def _errors_after_quantization(report: MagRReport) -> list[str]:
    known = [site.quantization for site in report.rewritten if site.quantization is not None]
    lines = []
    if known:
        lines.append(_gain("calibration", [(q.error_alone, q.error) for q in known]))
        if not all(math.isnan(q.held) for q in known):
            lines.append(_gain("held-out tokens", [(q.held_alone, q.held) for q in known]))
    free = [q.free for q in known if q.free]
    if free:
        share = sum(free) / len(known)
        lines.append(f"zero points that are no whole numbers: {share:.0%} of the rows or groups")
    if report.overfitted:
        lines.append(f"{len(report.overfitted)} sites fit the calibration too closely")
    return lines


def _rotated(report: MagRReport) -> list[str]:
    if not report.rotations:
        return []
    done = [rotation for rotation in report.rotations if not rotation.reason]
    parameters = sum(rotation.weights for rotation in done)
    return [f"{len(done)} of {len(report.rotations)} streams rotated, {parameters} parameters"]


def _quantized(report: MagRReport) -> list[str]:
    if not report.target:
        return []
    quantized = sum(site.quantized for site in report.sites)
    lines = [f"{quantized} quantized by torchao: {report.target}"]
    left = [site for site in report.sites if not site.quantized]
    if left:
        lines.append(
            f"{len(left)} not quantized, {_parameters(left) / _parameters(report.sites):.1%} of "
            f"the matrix parameters: {', '.join(s.name for s in left[:3])}"
            f"{', ...' if len(left) > 3 else ''}"
        )
    return lines


def _run(report: MagRReport) -> list[str]:
    stages = ", ".join(f"{name} {t:.1f}" for name, t in report.seconds.items() if t)
    memory = "" if math.isnan(report.peak_memory) else f"; peak memory {report.peak_memory:.0f} MiB"
    by = f" (by {report.tracer})" if report.tracer else ""
    lines = [f"{report.batches} calibration batches, {report.traces} traced graphs{by}{memory}"]
    if report.refusal:
        lines.append(f"because {report.refusal}")
    lines += [f"note: {note}" for note in report.notes]
    lines.append(f"seconds: {stages}")
    if report.states:
        size = f"{report.saved_bytes / 1e6:.3g} MB"
        lines.append(
            f"saved for resuming after an interruption: {size} in all, {report.states} states"
        )
    return lines


def _cells(site: SiteReport) -> tuple[str, ...]:
    """The table row of a rewritten site."""
    return (
        site.name,
        _shape(site),
        str(site.calls),
        str(site.tokens),
        f"{site.max_before:.4g}",
        f"{site.max_after:.4g}",
        _percent(site.output_error),
        site.status,
        str(site.steps),
        f"{site.seconds:.2f}",
        f"{site.memory:.0f}",
    )


def _quantization_cells(site: SiteReport) -> tuple[str, ...]:
    """The row of a quantized site in the second table."""
    found = site.quantization
    if found is None:
        return (site.name, *[""] * (len(_QUANTIZATION) - 1))
    return (
        site.name,
        " ".join(f"{alpha}:{rows}" for alpha, rows in found.alphas.items()),
        f"{found.clip:.2f}",
        *map(_percent, (found.error_alone, found.error, found.held_alone, found.held)),
    )


def _ratio(site: SiteReport) -> npt.NDArray[np.float32]:
    """max after / max before for each channel of a rewritten site; 1 if the channel is zero."""
    before, after = site.channel_max_before, site.channel_max_after
    if before is None or after is None:
        return np.empty(0, np.float32)
    return np.divide(after, before, out=np.ones_like(after), where=before > 0)


def _gain(where: str, errors: list[tuple[float, float]]) -> str:
    """The mean errors of torchao alone and of magr-fx, over the sites where both are known."""
    known = np.array([pair for pair in errors if np.isfinite(pair).all()])
    if not len(known):
        return f"output error after quantization, on the {where}: unknown"
    alone, ours = known.mean(0)
    return (
        f"output error after quantization, mean on the {where}: {ours:.2%} "
        f"(torchao alone {alone:.2%})"
    )


def _parameters(sites: Iterable[SiteReport]) -> int:
    return sum(math.prod(site.shape) for site in sites)


def _percent(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.2%}"


def _shape(site: SiteReport) -> str:
    return "x".join(map(str, site.shape))


def aligned(rows: Sequence[tuple[str, ...]], *, text: tuple[int, ...]) -> str:
    """Rows as aligned columns: the columns in ``text`` to the left, all others to the right."""
    sides = ["left" if column in text else "right" for column in range(len(rows[0]))]
    table: str = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)
    return "\n".join(line.rstrip() for line in table.splitlines())
