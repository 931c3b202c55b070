"""Which weights get one choice together, and which choices each of them can have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torchao.core.config import AOBaseConfig

from magr_fx.errors import ConfigError
from magr_fx.passes.budgeting.budget import Budget
from magr_fx.passes.handover.mixed_target import parted
from magr_fx.passes.handover.quantizable import fits
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.passes.handover.target import describe, described_in_full

# The experts of a layer, where each is a module: `experts.3.up_proj`.
_EXPERT = re.compile(r"(?:^|(?<=\.))experts\.\d+(?=\.)")


@dataclass
class Unit:
    """Weights with one choice, and what they can choose from."""

    choices: list[AOBaseConfig]
    weights: list[QuantizableWeight] = field(default_factory=list)

    @property
    def name(self) -> str:
        """That of its first weight."""
        return self.weights[0].name


def units_of(
    weights: Sequence[QuantizableWeight], sharing: Iterable[Sequence[str]], budget: Budget
) -> list[Unit]:
    """The units, in the order of the weights.

    Args:
        weights: all that can be quantized; what the budget pins to None is left out.
        sharing: the names of the weights that share an input; those in one module go together.
        budget: the choices, what is pinned, and whether each weight is a unit of its own.

    Raises:
        ConfigError: no choice fits a weight.
    """
    root = _together(weights, sharing, apart=budget.apart)
    units: dict[tuple[str, str], Unit] = {}
    for weight in weights:
        choices = choices_of(weight.name, budget)
        if choices:  # a pinned weight is in no unit with others
            key = root[weight.name], " ".join(described_in_full(choice) for choice in choices)
            units.setdefault(key, Unit(choices)).weights.append(weight)
    for unit in units.values():
        unit.choices = _fitting(unit)
    return list(units.values())


def _together(
    weights: Sequence[QuantizableWeight], sharing: Iterable[Sequence[str]], *, apart: bool
) -> dict[str, str]:
    """For each weight the name of a weight that stands for all that have one choice with it."""
    root = {weight.name: weight.name for weight in weights}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    groups: dict[str, list[str]] = {}
    for weight in weights:
        parameter, _ = parted(weight.name)  # its matrices are quantized with one config
        groups.setdefault(parameter, []).append(weight.name)
        if not apart:
            groups.setdefault(_EXPERT.sub("experts.*", parameter), []).append(weight.name)
    for at, names in enumerate(() if apart else sharing):
        for name in names:  # engines fuse weights of one module: q, k and v, but not all layers'
            parent = ".".join(parted(name)[0].split(".")[:-2])
            groups.setdefault(f"input {at} {parent}", []).append(name)
    for names in groups.values():
        known = [find(name) for name in names if name in root]
        root.update(dict.fromkeys(known[1:], known[0]) if known else {})
    return {name: find(name) for name in root}


def choices_of(name: str, budget: Budget) -> list[AOBaseConfig]:
    """What a weight can choose from: what it is pinned to, if it is; none if that is None."""
    parameter, _ = parted(name)
    for pattern, config in budget.pin.items():
        if any(fnmatchcase(n, pattern) for n in (parameter, parameter.rpartition(".")[0])):
            return [] if config is None else [config]
    return list(budget.choices)


def check_pins(model: nn.Module, weights: Iterable[str], budget: Budget) -> None:
    """Raise :class:`ConfigError` for a pattern without effect.

    A config has to be for one of the weights that can be quantized; None may also be for a weight
    that is left out anyway.
    """
    names = [parted(name)[0] for name in weights]
    names += [name.rpartition(".")[0] for name in names]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    every += [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern, config in budget.pin.items():
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ConfigError(
                f"pin: {pattern!r} fits no module or parameter of {type(model).__name__}, such as "
                f"{names[0]}; a pattern is for the whole name, as in *.down_proj"
            )
        if config is not None:
            raise ConfigError(
                f"pin: {pattern!r} fits only what is not quantized: filter_fn leaves it out, it is "
                "tied to an embedding, or it meets no input in a matmul"
            )


def _fitting(unit: Unit) -> list[AOBaseConfig]:
    """The choices whose groups divide the inputs of all weights.

    Raises:
        ConfigError: there is none.
    """
    inputs = {weight.weight.shape[1]: weight.name for weight in unit.weights}
    fitting = [config for config in unit.choices if all(fits(n, config) for n in inputs)]
    if not fitting:
        said = ", ".join(describe(config) for config in unit.choices)
        named = ", ".join(f"{name} with {length} inputs" for length, name in inputs.items())
        raise ConfigError(
            f"no group size of {said} divides the inputs of {named}: add a choice, pin the weight "
            "to None, or leave it out with filter_fn"
        )
    return fitting
