"""Several torchao configs, each for the weights that ``FqnToConfig`` names for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.passes.handover.target import Target, described_in_full

logger = logging.getLogger("magr_fx")
REGEX, DEFAULT = "re:", "_default"  # how a key of FqnToConfig begins, or what it is


class Goal(NamedTuple):
    """How a weight is solved, and what it is quantized with."""

    config: MagRConfig
    target: Target


@dataclass(frozen=True)
class MixedTarget:
    """The configs that will quantize the weights, and how the weights are prepared for them.

    Attributes:
        config: names the weights of each config.
        options: the same for all.
        goals: by the full description of a config.
        names: of a parameter with several names, such as a tied weight: the first → all.
    """

    config: FqnToConfig
    options: QuantizeOptions
    goals: Mapping[str, Goal]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def for_model(self, model: nn.Module) -> MixedTarget:
        """The same target, with the names of the model's parameters; warns of keys that name none.

        A weight with several names has one config: that of those of its names that have one.
        """
        named: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            named.setdefault(id(parameter), []).append(name)
        unused = [key for key in self.config.fqn_to_config if not _names_any(key, model)]
        if unused:
            logger.warning("FqnToConfig: nothing of the model is named by %s", ", ".join(unused))
        several = {names[0]: tuple(names) for names in named.values() if len(names) > 1}
        return replace(self, names=several)

    @property
    def makes_tensors(self) -> bool:
        """Whether torchao's tensors are made directly; so are all of them, or none."""
        return any(goal.target.makes_tensors for goal in self.goals.values())

    def config_of(self, name: str) -> AOBaseConfig | None:
        """The config of a weight.

        None if it is not to be quantized, or its names are to be quantized in different ways.
        """
        parameter, place = parted(name)
        keys = [key_of(one + place, self.config) for one in self.names.get(parameter, (parameter,))]
        configs = [self.config.fqn_to_config[key] for key in keys if key is not None]
        said = {None if one is None else described_in_full(one) for one in configs}
        return configs[0] if len(said) == 1 else None

    def goal_of(self, name: str) -> Goal | None:
        """The same goal object for all weights with equal configs; None as above."""
        config = self.config_of(name)
        return None if config is None else self.goals[described_in_full(config)]


def config_for(target: Target | MixedTarget, name: str) -> AOBaseConfig:
    """The config of a weight that is quantized."""
    config = target.config_of(name)
    if config is None:
        raise RuntimeError(f"{name} has no config, and should have been left out")
    return config


def key_of(name: str, target: FqnToConfig) -> str | None:
    """The key of FqnToConfig that a weight falls under; None if it falls under none.

    In torchao's order: the parameter's name, the module's name, the first pattern that the
    parameter's name matches, the first that the module's matches, "_default". Unlike in torchao,
    "_default" also holds for weights that become those of linears, such as experts.

    Args:
        name: of a parameter, or of a matrix in it such as ``experts.gate_up_proj[3]``.
        target: the patterns.
    """
    parameter, _ = parted(name)
    names = (parameter, parameter.rpartition(".")[0])
    keys: list[str] = list(target.fqn_to_config)
    for one in names:
        if one in keys:
            return one
    for one in names:
        for key in keys:
            if key.startswith(REGEX) and re.fullmatch(key.removeprefix(REGEX), one):
                return key
    return DEFAULT if DEFAULT in keys else None


def parted(name: str) -> tuple[str, str]:
    """The name of the parameter, and the place in it such as ``[3]``; some names hold a "[" too."""
    place = re.search(r"\[[^\[\]]*\]$", name)
    return (name, "") if place is None else (name[: place.start()], place.group())


def _names_any(key: str, model: nn.Module) -> bool:
    """Whether a key takes a module or a parameter of the model, or is "_default"."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if key.startswith(REGEX):
        return any(re.fullmatch(key.removeprefix(REGEX), name) for name in names)
    return key == DEFAULT or key in names
