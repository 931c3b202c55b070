"""The report's picture: the paper's Figure 1 for the whole model, and output error per site."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from magr_fx.report import MagRReport

_MAX_POINTS = 20_000  # of the left panel; more only makes the file bigger


def plot_report(report: MagRReport, path: str | PathLike[str]) -> None:
    """Draw ``report`` to ``path``; the suffix chooses the format (png, pdf, svg)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install 'magr-fx[plot]'"
        ) from error
    sites = report.rewritten
    if not sites:
        raise ValueError("no site was rewritten, so there is nothing to plot")
    before = np.concatenate([s.channel_max_before for s in sites if s.channel_max_before is not None])
    after = np.concatenate([s.channel_max_after for s in sites if s.channel_max_after is not None])
    order = np.argsort(-before, kind="stable")
    order = order[:: max(1, len(order) // _MAX_POINTS)]

    # No pyplot: it would choose a backend and keep the figure alive for the whole process.
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rank = np.linspace(0, 100, len(order))
    left.plot(rank, after[order], ".", markersize=1.5, color="tab:orange", label="after MagR")
    left.plot(rank, before[order], color="tab:blue", linewidth=1.5, label="before")
    left.set(
        title="Largest magnitude of each channel",
        xlabel="channels of all sites, by their magnitude before (%)",
        ylabel="max |w|",
        yscale="log",
    )
    left.legend()
    right.plot([100 * s.output_error for s in sites], ".-", color="tab:green", linewidth=0.6)
    right.set(
        title="Output error of each site, before quantization",
        xlabel="site, in the order solved",
        ylabel="‖X(Ŵ−W)ᵀ‖ / ‖XWᵀ‖ (%)",
    )
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
