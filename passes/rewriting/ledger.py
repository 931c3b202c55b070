"""The results of a run so far: rows of the report, torchao's tensors, and what is not yet saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from magr_fx.machine.ranks import Ranks
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Rejection, Site
from magr_fx.passes.offloading.resident import NotStoredError, Resident
from magr_fx.passes.rewriting.checkpoint import Checkpoint
from magr_fx.passes.rewriting.rewrite_weights import rewrite_weight
from magr_fx.reporting.report import MagRReport, SiteReport

logger = logging.getLogger("magr_fx")


@dataclass
class Step:
    """The results of the current step of the calibration.

    Attributes:
        rows: one for each site that is done, in that order.
        tensors: with GPTQ, torchao's tensors by the names of their sites.
        replaced: parameter → the tensor that the calibration reads in its place from now on.
    """

    rows: list[SiteReport] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)

    def value_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The tensor that the calibration reads for a parameter: its replacement, or itself."""
        return self.replaced.get(parameter, parameter)


class Ledger:
    """The results of a run: those of all steps that have ended, and of the current step.

    Args:
        report: gets all rows when the run ends, also by an error.
        tensors: gets torchao's tensors (GPTQ) at the end of each step; None makes a dict.
        checkpoint: where steps are saved; None saves nothing.

    Attributes:
        step: the current step.
        tensors: those of the steps that have ended.
    """

    def __init__(
        self,
        report: MagRReport,
        tensors: MutableMapping[str, torch.Tensor] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.report, self.checkpoint = report, checkpoint
        self.tensors = {} if tensors is None else tensors
        self.step = Step()
        self._rows: list[SiteReport] = []
        self._unsaved: dict[str, torch.Tensor] = {}

    @property
    def rows(self) -> list[SiteReport]:
        """The rows of all sites that are done."""
        return [*self._rows, *self.step.rows]

    def timed(self, stage: str) -> AbstractContextManager[Callable[[], float]]:
        """Add the time spent inside to the report. Yields a function that returns the seconds."""
        return self.report.timed(stage)

    def saved(self) -> dict[str, Any] | None:
        """The last state of an interrupted run, or None."""
        return None if self.checkpoint is None else self.checkpoint.last()

    def restore(
        self,
        saved: dict[str, Any] | None,
        sites: list[Site],
        resident: Resident,
        *,
        makes_tensors: bool,
    ) -> None:
        """Write the weights that an interrupted run has saved; or take the tensors that it made."""
        if saved is None or self.checkpoint is None:
            return
        logger.info("resuming after step %d of %s", saved["step"], self.checkpoint.folder)
        self.checkpoint.check_weights(saved["step"], saved["rows"])
        for weights in self.checkpoint.weights(saved["step"]):
            if makes_tensors:
                self.tensors.update(weights)
                continue
            own = [site for site in sites if site.name in weights]
            with resident([site.parameter for site in own]):
                for site in own:
                    rewrite_weight(site, weights[site.name])
        self._rows = saved["rows"]

    def end_step(self, finished: Iterable[SharedGram]) -> dict[nn.Parameter, torch.Tensor]:
        """Add the current step to those that have ended, and start the next.

        Args:
            finished: the grams of the step's sites, whose weights are still in memory.

        Returns:
            Parameter → the tensor that the calibration reads in its place from now on.
        """
        step, self.step = self.step, Step()
        if self.checkpoint is not None and self.checkpoint.keeps_weights:
            done = {row.name for row in step.rows if row.outcome == "rewritten"}
            for site in (site for shared in finished for site in shared.sites):
                if site.name in done:
                    made = step.tensors.get(site.name)
                    self._unsaved[site.name] = site.weight.clone() if made is None else made
        self.tensors.update(step.tensors)
        self._rows += step.rows
        return step.replaced

    def save(self, number: int, boundary: Callable[[], Any], last: bool) -> None:
        """Save the results since the last save, and drop them from memory."""
        if self.checkpoint is not None:
            self.checkpoint.save(number, boundary, self._rows, self._unsaved, last)
            self._unsaved.clear()

    def interrupted(self, error: BaseException, *, makes_tensors: bool) -> None:
        """Keep the rows of rewritten sites; where tensors are made, none: nothing was written."""
        if makes_tensors:
            self._rows, self.step = [], Step()
            logger.error("interrupted: nothing was changed")
            return
        lost = error if isinstance(error, NotStoredError) else error.__cause__
        names = lost.names if isinstance(lost, NotStoredError) else frozenset[str]()
        # A weight that could not be stored has its old values.
        self._rows = [row for row in self.rows if row.name.partition("[")[0] not in names]
        self.step = Step()
        done = [row.name for row in self._rows if row.outcome == "rewritten"]
        logger.error("interrupted after rewriting %d sites: %s", len(done), ", ".join(done))

    def close(self, rejections: Iterable[Rejection]) -> None:
        """Put all rows into the report: rewritten, failed, then skipped."""
        report = self.report
        report.sites = self.rows
        skipped = [SiteReport(r.name, r.shape, "skipped", r.reason) for r in rejections]
        report.sites = [*report.rewritten, *report.failed, *report.skipped, *skipped]

    def count_saved(self, ranks: Ranks) -> None:
        """Note in the report how many bytes all ranks have saved."""
        if self.checkpoint is not None:
            self.report.states = self.checkpoint.states
            self.report.saved_bytes = sum(ranks.gather(self.checkpoint.written))
