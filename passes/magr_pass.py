"""MagRPass: MagR as a torch.fx pass, for a pipeline that already holds a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._pytree import tree_flatten

from magr_fx.config import MagRConfig
from magr_fx.errors import CalibrationError
from magr_fx.passes.calibration import Batch, read_calib
from magr_fx.passes.find_linears import FilterFn, find_linears
from magr_fx.passes.pipeline import check_model, resolve_config, rewrite_sites
from magr_fx.passes.trace import (
    GUARDS,
    Trace,
    TracedBatch,
    bind,
    calibration_mode,
    fits,
    input_names,
    trace_batches,
)
from magr_fx.report import MagRReport


class MagRPass(PassBase):
    """Rewrite, in place, every weight that the graph multiplies with its inputs.

    The graph itself stays as it is: the same nodes, the same Parameter objects, other values. A
    graph from ``torch.export`` is analysed and run as it stands; any other GraphModule (from
    ``symbolic_trace``) is exported first, which shares its parameters. The report is at
    ``graph_module.meta["magr"]``.

    Args:
        calib, config, target, filter_fn, progress: as for :func:`magr_fx.magr_transform`. In an
            exported graph the modules are bare containers: ``filter_fn`` should go by the name.

    Raises:
        CalibrationError: a calibration input does not fit the graph's shapes; also what
            :func:`magr_fx.magr_transform` raises. Nothing was changed then.

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
        filter_fn: FilterFn | None = None,
        progress: bool | None = None,
    ) -> None:
        self.calib = calib
        self.config = resolve_config(config, target)
        self.target = target
        self.filter_fn = filter_fn
        self.progress = progress

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph's weights; ``modified`` says whether there were any."""
        check_model(graph_module)
        report = MagRReport(self.config)
        batches = read_calib(self.calib, graph_module)
        with calibration_mode(graph_module):
            with report.timed("trace"):
                if _is_exported(graph_module):
                    traced = _as_traced(graph_module, batches)
                else:
                    traced = trace_batches(graph_module, batches)
            found = find_linears(
                dict.fromkeys(b.trace for b in traced), graph_module, self.filter_fn
            )
            graph_module.meta["magr"] = report
            rewrite_sites(traced, found, self.config, report, progress=self.progress)
        graph_module.graph.lint()
        return PassResult(graph_module, modified=bool(report.rewritten))


def _is_exported(graph_module: fx.GraphModule) -> bool:
    """Whether every op is an aten op: what torch.export makes and the finder reads."""
    return all(
        isinstance(node.target, torch._ops.OperatorBase) or node.target.__module__ == "_operator"
        if node.op == "call_function"
        else node.op not in ("call_module", "call_method") or node.target == GUARDS
        for node in graph_module.graph.nodes
    )


def _as_traced(graph_module: fx.GraphModule, batches: list[Batch]) -> list[TracedBatch]:
    """The batches as placeholder values of the one graph there is."""
    trace = None
    traced = []
    for batch in batches:
        arguments = bind(graph_module, batch)
        values = tuple(tree_flatten(arguments)[0])
        if not fits(graph_module, values):
            raise CalibrationError(
                f"calibration batch {batch.index} does not fit the graph, which was exported for "
                "other shapes, dtypes or constants; export it with dynamic_shapes, or pass the "
                "model itself to magr_transform"
            )
        trace = trace or Trace(graph_module, input_names(graph_module, arguments))
        traced.append(TracedBatch(batch.index, trace, values))
    return traced
