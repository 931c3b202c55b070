"""The ranks and the device that do the work, and how weights are brought into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from magr_fx.machine.ranks import ALONE, Ranks
from magr_fx.passes.offloading.offloaded import (
    execution_device,
    is_offloaded,
    offloaded_weights_loaded,
)
from magr_fx.passes.offloading.resident import Resident, all_resident
from magr_fx.passes.offloading.sharded import device_of_shards, is_sharded, sharded_weights_gathered


@dataclass(frozen=True)
class Execution:
    """The ranks and the device that do the work, and how weights are brought into memory.

    Attributes:
        ranks: the ranks that share the work; all end with the same weights and report.
        resident: loads the weights that are worked on.
        device: where blocks are run and solved; None is the device of their weights.
    """

    ranks: Ranks = ALONE
    resident: Resident = all_resident
    device: torch.device | None = None

    def names_of_devices(self, model: nn.Module) -> str:
        """The devices of each rank, as text: a checkpoint is valid for the same devices only."""
        places = {str(p.device) for p in model.parameters()}
        if self.device is not None:
            places = {str(self.device)}
        names = self.ranks.gather(", ".join(sorted(places)))
        return "; ".join(names if len(set(names)) > 1 else names[:1])


def is_offloaded_or_sharded(model: object) -> bool:
    """Whether some weights of the model are offloaded, or sharded over ranks."""
    return is_offloaded(model) or is_sharded(model)


@contextlib.contextmanager
def execution_of(model: nn.Module, ranks: Ranks) -> Iterator[Execution]:
    """Give the :class:`Execution` of a model.

    Inside the context an offloaded (:mod:`offloaded`) or sharded (:mod:`sharded`) model has
    placeholders for its weights. Any other model stays as it is.

    Raises:
        ModelError: the weights cannot be read, or hold NaN or Inf.
    """
    if is_sharded(model):
        device = device_of_shards(model)
        around = sharded_weights_gathered(model, ranks, device)
    else:
        device = execution_device(model)
        around = offloaded_weights_loaded(model, device)
    with around as resident:
        yield Execution(ranks, resident, device)
