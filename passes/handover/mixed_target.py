"""Several torchao configs, each for the weights that ``FqnToConfig`` names for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.passes.handover.target import Target, described_in_full

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
    """

    config: FqnToConfig
    options: QuantizeOptions
    goals: Mapping[str, Goal]

    @property
    def makes_tensors(self) -> bool:
        """Whether torchao's tensors are made directly; so are all of them, or none."""
        return any(goal.target.makes_tensors for goal in self.goals.values())

    def config_of(self, name: str) -> AOBaseConfig | None:
        """The config of a weight; None if it is not to be quantized."""
        key = key_of(name, self.config)
        return None if key is None else self.config.fqn_to_config[key]

    def goal_of(self, name: str) -> Goal | None:
        """The same goal object for all weights with equal configs; None as above."""
        config = self.config_of(name)
        return None if config is None else self.goals[described_in_full(config)]


def key_of(name: str, target: FqnToConfig) -> str | None:
    """The key of FqnToConfig that a weight falls under; None if it falls under none.

    In torchao's order: the parameter's name, the module's name, the first pattern that the
    parameter's name matches, the first that the module's matches, "_default". Unlike in torchao,
    "_default" also holds for weights that become those of linears, such as experts.

    Args:
        name: of a parameter, or of a matrix in it such as ``experts.gate_up_proj[3]``.
        target: the patterns.
    """
    parameter = name.partition("[")[0]
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
