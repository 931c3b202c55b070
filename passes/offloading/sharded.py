"""Models whose weights are sharded over ranks as DTensors, for instance by FSDP2.

:mod:`resident` explains how such a model is worked on. Loading a weight gathers its shards on all
ranks at once. If the weight changed, each rank then writes its own shard back. The model runs as
on a single rank: torch.distributed's hooks, which gather weights and split inputs, are removed
meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from magr_fx.errors import ModelError
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.offloading.resident import (
    Place,
    PlaceholderParameter,
    Resident,
    with_placeholders,
)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_sharded(model: object) -> bool:
    """Whether some of the model's weights are DTensors, or FSDP2 shards them between calls."""
    if not (isinstance(model, nn.Module) and dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        is_shard(parameter) for parameter in model.parameters()
    )


def is_shard(parameter: torch.Tensor) -> bool:
    """Whether the parameter is a DTensor, of which this rank has a part."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def device_of_shards(model: nn.Module) -> torch.device | None:
    """The device on which a sharded model runs on this rank; None for the CPU."""
    for parameter in model.parameters():
        if is_shard(parameter):
            kind = parameter.device_mesh.device_type  # type: ignore[attr-defined]
            if kind == "cpu":
                return None
            return torch.device(kind, torch.get_device_module(kind).current_device())
    return None


@contextlib.contextmanager
def sharded_weights_gathered(
    model: nn.Module, ranks: Ranks, device: torch.device | None = None
) -> Iterator[Resident]:
    """Inside the context, replace every sharded weight by a placeholder that can be loaded.

    Afterwards the model has its own Parameter objects and hooks again.

    Args:
        model: sharded.
        ranks: the ranks that share the work.
        device: where weights are needed; None is the CPU.

    Yields:
        What loads weights: see :class:`Resident`.

    Raises:
        ModelError: a rank that does not share the work holds shards, or weights hold NaN or Inf.
            The model is unchanged then.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost keeps its weights gathered after a forward pass
    weights: dict[nn.Parameter, _Weight] = {}
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            _check(name, parameter, ranks)
            weights[parameter] = _Weight(name, parameter, PlaceholderParameter(parameter), device)
    places: list[Place] = [
        (module, key, weights[own])
        for module in model.modules()
        for key, own in module._parameters.items()
        if own is not None and own in weights
    ]
    with contextlib.ExitStack() as restored:
        for module in model.modules():
            for kind in _HOOKS:
                hooks = getattr(module, kind)
                if any(map(_is_of_torch_distributed, hooks.values())):
                    restored.callback(setattr, module, kind, hooks)
                    kept = {k: h for k, h in hooks.items() if not _is_of_torch_distributed(h)}
                    setattr(module, kind, OrderedDict(kept))
        yield restored.enter_context(with_placeholders(model, places, device, ranks.meet))


@dataclass(frozen=True, eq=False)
class _Weight:
    """A sharded weight: its name, this rank's DTensor, its placeholder, and its device."""

    name: str
    shard: Any  # DTensor
    placeholder: PlaceholderParameter
    device: torch.device | None

    def load(self) -> torch.Tensor:
        """The gathered weight; a collective call that every rank has to make."""
        shard = self.shard.detach()
        if self.device is not None:  # FSDP2 may offload shards to the CPU
            shard = shard.to(self.device)
        whole: torch.Tensor = shard.full_tensor()
        return whole

    def store(self, weight: torch.Tensor) -> None:
        """Keep this rank's part; nothing is sent, because every rank has the whole weight."""
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = self.shard.device_mesh, self.shard.placements
        with torch.no_grad():
            new = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            self.shard.to_local().copy_(new.to_local())

    def prefetch(self) -> None:
        """Do nothing: the shards are in the ranks' memory."""


def _check(name: str, shard: Any, ranks: Ranks) -> None:
    own = {dist.get_rank()}
    if ranks.group is not None:
        own = set(dist.get_process_group_ranks(ranks.group))
    if not set(shard.device_mesh.mesh.flatten().tolist()) <= own:
        raise ModelError(
            f"{name} is sharded over ranks that do not take part, but every rank that holds a "
            "shard has to; leave process_group out, or give a group of all these ranks"
        )


def _is_of_torch_distributed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
