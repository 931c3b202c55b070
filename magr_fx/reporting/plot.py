"""The report's plot: the paper's Figure 1 for the whole model, and the output error per site."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from magr_fx.reporting.report import MagRReport

_MAX_POINTS = 20_000  # of the left panel; more would only make the file larger


def new_figure() -> Figure:
    """An empty figure for two panels.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'magr-fx[plot]'") from error
    # Not pyplot, which would choose a backend and keep the figure alive for the whole process.
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_report(report: MagRReport, path: str | PathLike[str]) -> None:
    """Plot ``report`` to ``path``; the suffix chooses the format (png, pdf, svg)."""
    figure = new_figure()
    sites = report.rewritten
    if not sites:
        raise ValueError("no site was rewritten, so there is nothing to plot")
    before = np.concatenate([site.channel_max_before for site in sites])
    after = np.concatenate([site.channel_max_after for site in sites])
    every = -(-len(before) // _MAX_POINTS)

    left, right = figure.subplots(1, 2)
    # Not the maximum: one channel ten times as large would push all others into a corner.
    limit = 1.05 * float(np.quantile(before, 0.999, method="lower")) or 1.0
    beyond = int((before > limit).sum())
    left.plot([0, limit], [0, limit], color="0.6", linewidth=1, label="unchanged")
    left.plot(before[::every], after[::every], ".", markersize=2, alpha=0.4, label="a channel")
    left.set(
        title=f"Largest magnitude of {len(before):,} channels",
        xlabel="max |w| before" + (f" ({beyond:,} lie beyond)" if beyond else ""),
        ylabel="max |w| after",
        xlim=(0, limit),
        ylim=(0, limit),
    )
    left.legend()
    known = [site.quantization for site in sites if site.quantization is not None]
    if known:
        alone = [100 * found.error_alone for found in known]
        right.plot(alone, ".-", color="0.6", linewidth=0.6, label="torchao alone")
        errors = [100 * found.error for found in known]
    else:
        errors = [100 * site.output_error for site in sites]
    right.plot(errors, ".-", color="tab:green", linewidth=0.6, label="magr-fx")
    right.legend()
    right.set(
        title=f"Output error of each site, {'after' if known else 'before'} quantization",
        xlabel="site, in the order of the report",
        ylabel="‖X(Ŵ−W)ᵀ‖ / ‖XWᵀ‖ (%)",
    )
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
