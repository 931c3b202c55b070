"""What was done so far: the report's rows, torchao's tensors, and what is to be saved of them."""

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
    """What one step of the calibration has made of its sites so far.

    Attributes:
        rows: what happened to each, in the order in which it was done.
        tensors: with GPTQ torchao's tensors, by the names of their sites.
        replaced: what the calibration goes on with in the place of a parameter.
    """

    rows: list[SiteReport] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)

    def value_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """What the calibration goes on with: what is in the parameter's place, or else itself."""
        return self.replaced.get(parameter, parameter)


class Ledger:
    """What a run has done: of the steps that have ended, and of the one at hand.

    Args:
        report: has all rows once the run has ended, however it ends.
        tensors: takes torchao's tensors (GPTQ) as soon as a step has made them; None is a dict.
        checkpoint: where steps are saved; None saves nothing.

    Attributes:
        step: the one at hand.
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
        """Of every site that is done."""
        return [*self._rows, *self.step.rows]

    def timed(self, stage: str) -> AbstractContextManager[Callable[[], float]]:
        """Add the time spent inside to the report's; what it gives tells the seconds afterwards."""
        return self.report.timed(stage)

    def saved(self) -> dict[str, Any] | None:
        """What an earlier run saved last, to go on from."""
        return None if self.checkpoint is None else self.checkpoint.last()

    def restore(
        self, saved: dict[str, Any] | None, sites: list[Site], resident: Resident, *, gptq: bool
    ) -> None:
        """Write again what an earlier run made of its sites; with GPTQ, take its tensors."""
        if saved is None or self.checkpoint is None:
            return
        logger.info("going on after step %d of %s", saved["step"], self.checkpoint.folder)
        self.checkpoint.check_weights(saved["step"], saved["rows"])
        for weights in self.checkpoint.weights(saved["step"]):
            if gptq:
                self.tensors.update(weights)
                continue
            own = [site for site in sites if site.name in weights]
            with resident([site.parameter for site in own]):
                for site in own:
                    rewrite_weight(site, weights[site.name])
        self._rows = saved["rows"]

    def end_step(self, finished: Iterable[SharedGram]) -> dict[nn.Parameter, torch.Tensor]:
        """Have the step at hand among those that have ended; what it has put in whose place.

        Args:
            finished: the grams of its sites, whose weights are in memory still.
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
        """Write what a step that has ended has made; it is not held in memory any longer."""
        if self.checkpoint is not None:
            self.checkpoint.save(number, boundary, self._rows, self._unsaved, last)
            self._unsaved.clear()

    def interrupted(self, error: BaseException, *, gptq: bool) -> None:
        """Keep the rows of what is rewritten: with GPTQ of none, since tensors wait for the end."""
        if gptq:
            self._rows, self.step = [], Step()
            logger.error("interrupted: nothing was changed")
            return
        lost = error if isinstance(error, NotStoredError) else error.__cause__
        names = lost.names if isinstance(lost, NotStoredError) else frozenset[str]()
        # A weight that could not be stored is what it was.
        self._rows = [row for row in self.rows if row.name.partition("[")[0] not in names]
        self.step = Step()
        done = [row.name for row in self._rows if row.outcome == "rewritten"]
        logger.error("interrupted after rewriting %d sites: %s", len(done), ", ".join(done))

    def close(self, rejections: Iterable[Rejection]) -> None:
        """Have all rows in the report, those of what was left out last."""
        report = self.report
        report.sites = self.rows
        skipped = [SiteReport(r.name, r.shape, "skipped", r.reason) for r in rejections]
        report.sites = [*report.rewritten, *report.failed, *report.skipped, *skipped]

    def count_saved(self, ranks: Ranks) -> None:
        """Have in the report how much was written, by all ranks."""
        if self.checkpoint is not None:
            self.report.states = self.checkpoint.states
            self.report.saved_bytes = sum(ranks.gather(self.checkpoint.written))
