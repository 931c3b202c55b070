"""Run the model with torchao's tensors in the place of weights, before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from magr_fx.errors import ModelError
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.graphs.trace import Trace, TracedBatch, all_nodes, buffers_kept
from magr_fx.passes.graphs.unsupported_weights import blame
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.passes.handover.quantized_reads import QuantizedReads, brief, run_apart
from magr_fx.passes.handover.target import ConfigOf, described_in_full
from magr_fx.passes.handover.torchao_rounding import quantized_copy
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.offloading.resident import Resident, all_resident


def kind_of(model: nn.Module, weight: QuantizableWeight, config_of: ConfigOf) -> Any:
    """A key that is equal for weights of the same config and place in modules of equal classes."""
    return described_in_full(config_of(weight.name)), tuple(
        (type(model.get_submodule(parent.rpartition(".")[0])), parent.rpartition(".")[2], key)
        for parent, _, key in (place.name.rpartition(".") for place in weight.places)
    )


@dataclass(frozen=True)
class Trial:
    """Runs the model with torchao's tensors in the place of weights, before anything is changed.

    Attributes:
        batches: one for each different graph.
        traces: the graphs, which show what buffers the model writes to.
        resident: loads weights that are offloaded.
        device: where the model runs; None is where its parameters are.
    """

    batches: list[Batch]
    traces: list[Trace]
    resident: Resident = all_resident
    device: torch.device | None = None

    @classmethod
    def of(
        cls,
        batches: list[Batch],
        traced: list[TracedBatch],
        resident: Resident,
        device: torch.device | None,
    ) -> Trial:
        """Take one batch of all those whose graphs have the same ops in the same modules."""
        ways: dict[Any, Batch] = {}
        known: dict[Trace, Any] = {}
        for batch, one in zip(batches, traced, strict=True):
            if one.trace not in known:
                known[one.trace] = tuple(
                    (node.op, str(node.target), str(node.meta.get("nn_module_stack")))
                    for node in all_nodes(one.trace.graph_module)
                )
            ways.setdefault(known[one.trace], batch)
        return cls(list(ways.values()), list(known), resident, device)

    def refusals(
        self, model: nn.Module, weights: list[QuantizableWeight], config_of: ConfigOf
    ) -> dict[str, str]:
        """The weights with which the model fails once they are quantized: name → the error.

        Raises:
            ModelError: the model itself does not run.
        """
        weights = [weight for weight in weights if weight.places]
        with buffers_kept(self.traces):
            return self._refusals(model, weights, config_of)

    def _refusals(
        self, model: nn.Module, weights: list[QuantizableWeight], config_of: ConfigOf
    ) -> dict[str, str]:
        owns = {
            weight.name: [getattr(place.module, place.key) for place in weight.places]
            for weight in weights
        }
        reads = self._reads(model, owns, config_of)
        for batch in self.batches if weights else ():
            try:
                with reads:
                    run_apart(model, batch, {}, self.device)
            except Exception as error:  # the model's own code can raise anything
                if is_out_of_memory(error):
                    raise
                blamed = blame(model.named_parameters())
                raise ModelError(
                    f"{type(model).__name__} itself does not run on calibration batch "
                    f"{batch.index}, although it could be traced: {brief(error)}"
                    + (f". {blamed}" if blamed else "")
                ) from error
        reads.end()
        refused = dict(reads.refused)
        # Again with torchao's tensors in the modules themselves, one weight of each kind: some
        # code asks for the type of a weight, and some reads it in another way than seen above.
        kinds: dict[Any, list[QuantizableWeight]] = defaultdict(list)
        for weight in weights:
            if weight.name not in refused:
                kinds[kind_of(model, weight, config_of), weight.name in reads.seen].append(weight)
        if self._error(model, [same[0] for same in kinds.values()], config_of) is None:
            return refused
        fine: list[QuantizableWeight] = []
        for same in kinds.values():
            error = self._error(model, [*fine, same[0]], config_of)  # type: ignore[misc]
            if error is None:
                fine.append(same[0])
            else:
                refused.update((weight.name, error) for weight in same)
        return refused

    def _error(
        self, model: nn.Module, weights: list[QuantizableWeight], config_of: ConfigOf
    ) -> str | None:
        """The error of the model with quantized copies in place of these weights, or None."""
        stand_ins: dict[str, torch.Tensor] = {}
        for weight in weights:
            with self.resident([weight.weight]):
                copy = quantized_copy(weight.weight, config_of(weight.name))
            stand_ins.update((place.name, copy) for place in weight.places)
        try:
            for batch in self.batches if weights else ():
                with self._reads(model, {}, config_of):  # loads the other weights
                    run_apart(model, batch, stand_ins, self.device)
        except Exception as error:  # torchao and the model's own code can raise anything
            if is_out_of_memory(error):
                raise
            return brief(error)
        return None

    def _reads(
        self, model: nn.Module, owns: dict[str, list[torch.Tensor]], config_of: ConfigOf
    ) -> QuantizedReads:
        elsewhere: set[int] = set()
        if self.resident is not all_resident:
            elsewhere = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return QuantizedReads(owns, config_of, self.resident, elsewhere)
