"""MagRPass: MagR as a torch.fx pass, for a pipeline that already holds a graph."""

from __future__ import annotations

import logging
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from magr_fx.config import MagRConfig
from magr_fx.errors import ModelError
from magr_fx.machine.memory import out_of_memory_told
from magr_fx.passes.entries.run import run
from magr_fx.passes.finding.find_linears import FilterFn
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.execution import Execution
from magr_fx.passes.rewriting.check_model import check_model, check_not_frozen
from magr_fx.passes.rewriting.ledger import Ledger
from magr_fx.passes.rewriting.pipeline import resolve_config, target_for_rewriting
from magr_fx.passes.rewriting.request import Request
from magr_fx.passes.tracing.trace_batches import Tracing
from magr_fx.reporting.report import MagRReport

logger = logging.getLogger("magr_fx")


class MagRPass(PassBase):
    """Rewrite, in place, every weight that the graph multiplies with its inputs.

    Only the values of the parameters change: the graph keeps its nodes and its Parameter objects.
    A graph from ``torch.export`` is analysed and run directly. Any other GraphModule (from
    ``symbolic_trace``) is exported first, and the exported graph shares its parameters. The report
    is stored in ``graph_module.meta["magr"]``.

    Args:
        calib, config, target, propagate, holdout, filter_fn, trace, calibrate_all_experts, strict,
            progress: as for :func:`magr_fx.magr_transform`. A ``calib`` that can be iterated only
            once works for one call of the pass only. In an exported graph the original module
            classes are lost, so ``filter_fn`` should decide by the name.

    Raises:
        ModelError: the argument is not a GraphModule.
        CalibrationError: a calibration input does not fit the graph's shapes; nothing was changed.
        MagRError: any error that :func:`magr_fx.magr_transform` raises, under the same conditions.

    Example:
        >>> import torch
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> from magr_fx import MagRPass
        >>> model, x = torch.nn.Linear(8, 4), torch.randn(16, 8)
        >>> batch = torch.export.Dim("batch")
        >>> exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        >>> result = PassManager([MagRPass([x])])(exported.module())
        >>> result.modified, len(result.graph_module.meta["magr"].rewritten)
        (True, 1)
    """

    def __init__(
        self,
        calib: Any,
        config: MagRConfig | None = None,
        *,
        target: Any = None,
        propagate: bool | None = None,
        holdout: float = 0.1,
        filter_fn: FilterFn | None = None,
        trace: str = "auto",
        calibrate_all_experts: bool = False,
        strict: bool = False,
        progress: bool | None = None,
    ) -> None:
        self.calib = calib
        config = resolve_config(config, target)
        self.request = Request(
            config,
            target_for_rewriting(config, target, propagate, holdout),
            Tracing(trace, calibrate_all_experts),
            filter_fn,
            strict,
            progress=progress,
        )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph's weights; ``modified`` is True if at least one was rewritten."""
        meta = getattr(graph_module, "meta", {})
        with out_of_memory_told(lambda: meta.get("magr")):
            return self._call(graph_module)

    def _call(self, graph_module: fx.GraphModule) -> PassResult:
        if not isinstance(graph_module, fx.GraphModule):
            raise ModelError(
                f"MagRPass takes a torch.fx GraphModule, got {type(graph_module).__name__}; "
                "call magr_transform for a module that is not traced"
            )
        check_model(graph_module, self.request.filter_fn)
        check_not_frozen(graph_module)
        batches = read_calib(self.calib, graph_module)
        report = MagRReport(self.request.config)
        try:
            run(graph_module, batches, self.request, Execution(), Ledger(report))
        finally:
            if report.sites:  # a run that failed half way also leaves its report
                graph_module.meta["magr"] = report
        logger.info("%s", report.totals())
        graph_module.graph.lint()
        return PassResult(graph_module, modified=bool(report.rewritten))
