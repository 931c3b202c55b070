"""Models whose weights are sharded over ranks, as DTensors, by FSDP2 for one: gathered in turn.

While we work on such a model, each of its weights is an ordinary CPU tensor whose addresses hold no
memory yet, as for offloaded models. To use a weight is to gather its shards there, on all ranks at
once; afterwards each rank writes its own shard back, if the weight changed. The model is run as it
would be on one rank: the hooks that gather weights, and cut inputs, are off meanwhile.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from magr_fx.errors import ModelError
from magr_fx.passes.offloaded import Pages, Resident, reserved
from magr_fx.passes.ranks import Ranks

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_sharded(model: object) -> bool:
    """Whether some of the model's weights are DTensors, or FSDP2 makes them such between calls."""
    if not (isinstance(model, nn.Module) and dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        is_shard(parameter) for parameter in model.parameters()
    )


def is_shard(parameter: torch.Tensor) -> bool:
    """Whether the parameter is one rank's part of a weight."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


@contextlib.contextmanager
def gathered(model: nn.Module, ranks: Ranks) -> Iterator[Resident]:
    """Give every sharded weight an address, and a way to its values, for as long as it is open.

    The model has its own Parameter objects and hooks back afterwards.

    Raises:
        ModelError: the weights are on another device than the CPU, on other ranks than those that
            work together, or NaN or Inf. The model is as it was then.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost keeps its weights whole after a forward pass
    weights: dict[int, _Weight] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            _check(name, parameter, ranks)
            weights[id(parameter)] = _Weight(name, parameter, *reserved(parameter))
    for module in model.modules():
        for key, own in module._parameters.items():
            if own is not None and id(own) in weights:
                places.append((module, key, own))
    with contextlib.ExitStack() as restored:
        for module in model.modules():
            for kind in _HOOKS:
                hooks = getattr(module, kind)
                if any(map(_is_of_torch_distributed, hooks.values())):
                    restored.callback(setattr, module, kind, hooks)
                    kept = {k: h for k, h in hooks.items() if not _is_of_torch_distributed(h)}
                    setattr(module, kind, OrderedDict(kept))
        for module, key, own in places:
            restored.callback(module._parameters.__setitem__, key, own)
            module._parameters[key] = weights[id(own)].parameter
        pages = Pages(list(weights.values()), before=ranks.meet)
        pages.check()
        yield pages.resident


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight: its name, this rank's part of it, and what stands for the whole."""

    name: str
    shard: Any  # DTensor
    parameter: nn.Parameter
    pages: mmap.mmap

    def load(self) -> torch.Tensor:
        """The whole; every rank has to ask for it."""
        whole: torch.Tensor = self.shard.detach().full_tensor()
        return whole

    def store(self, weight: torch.Tensor) -> None:
        """Keep this rank's part: all ranks have the same whole, so that none has to be sent."""
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = self.shard.device_mesh, self.shard.placements
        with torch.no_grad():
            new = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            self.shard.to_local().copy_(new.to_local())

    def announce(self) -> None:
        """Nothing: it is in the ranks' memory."""


def _check(name: str, shard: Any, ranks: Ranks) -> None:
    if shard.device.type != "cpu":
        raise ModelError(
            f"{name} is sharded on {shard.device}; sharded weights are worked on on the CPU only. "
            "Gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)), and give magr_transform an "
            "unsharded model with these, on one device or offloaded by accelerate"
        )
    own = {dist.get_rank()}
    if ranks.group is not None:
        own = set(dist.get_process_group_ranks(ranks.group))
    if not set(shard.device_mesh.mesh.flatten().tolist()) <= own:
        raise ModelError(
            f"{name} is sharded over ranks that do not take part; every rank that holds a shard "
            "has to: leave process_group out, or give the group of all of them"
        )


def _is_of_torch_distributed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
