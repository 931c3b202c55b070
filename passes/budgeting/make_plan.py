"""Traced model and budget → a config for each weight."""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from magr_fx.config import MagRConfig
from magr_fx.costs.allocate import Allocation, Option, allocate
from magr_fx.errors import ConfigError
from magr_fx.passes.budgeting.budget import Budget
from magr_fx.passes.budgeting.stored_bits import code_bits, stored_bits
from magr_fx.passes.budgeting.units import Unit
from magr_fx.passes.handover.mixed_target import parted
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.passes.handover.target import (
    describe,
    described_in_full,
    has_free_zero_points,
    target_group_size,
)
from magr_fx.reporting.bit_plan import BitPlan, BitRow

logger = logging.getLogger("magr_fx")
# What a unit costs alone, in a model that is not quantized otherwise, differs more between units
# than what it costs in the quantized model, whose later layers are fitted to earlier errors.
# Without this, SmolLM2 at 3 bits gets worse than with 3 bits everywhere (benchmarks/README.md).
POWER = 0.5


@dataclass(frozen=True)
class Accounts:
    """What counts towards a budget, in bits and numbers.

    Attributes:
        weights: the numbers of all weights that are quantized.
        others: the numbers of all other parameters.
        other_bits: what these, and buffers that are stored, take.
    """

    weights: int
    others: int
    other_bits: int

    def limit(self, budget: Budget) -> int:
        """The bits that the quantized weights may take."""
        if budget.bits is None:
            return 8 * budget.size_in_bytes - self.other_bits
        if budget.whole_model:
            return int(budget.bits * (self.weights + self.others)) - self.other_bits
        return int(budget.bits * self.weights)

    def average(self, size: int, budget: Budget) -> float:
        """The bits for each number, of weights that take ``size`` bits."""
        if budget.bits is None or budget.whole_model:
            return (size + self.other_bits) / (self.weights + self.others)
        return size / self.weights

    def said(self, size: int, budget: Budget) -> str:
        """The same in words, in the unit of the budget."""
        if budget.bits is None:
            return f"{math.ceil((size + self.other_bits) / 8):,} bytes"
        return f"{math.ceil(1000 * self.average(size, budget) - 1e-6) / 1000:.3f} bits"


def accounts_of(model: nn.Module, weights: Sequence[QuantizableWeight]) -> Accounts:
    """Count the model's parameters and the buffers of its state_dict, each once."""
    quantized = sum(weight.weight.numel() for weight in weights)
    taken = {parted(weight.name)[0] for weight in weights}
    names = {id(p): name for name, p in model.named_parameters()}
    rest = [p for p in model.parameters() if names[id(p)] not in taken]
    seen = {id(p) for p in model.parameters()}
    stored = [t for t in model.state_dict(keep_vars=True).values() if hasattr(t, "nbytes")]
    buffers = {id(t): t for t in stored if id(t) not in seen}
    bits = 8 * sum(t.nbytes for t in (*rest, *buffers.values()))
    return Accounts(quantized, sum(p.numel() for p in rest), bits)


def make_plan(
    units: Sequence[Unit],
    costs: Mapping[str, Sequence[float]],
    accounts: Accounts,
    budget: Budget,
    config: MagRConfig,
    started: float,
) -> tuple[FqnToConfig, BitPlan]:
    """The best choice of each unit.

    Args:
        units: the weights, with their choices.
        costs: of each choice of the weight's unit, by the weight's name. A weight without costs,
            which no token reaches, costs nothing, and so gets the smallest choice.
        accounts: what counts.
        budget: what the caller may spend.
        config: how the weights will be solved, which decides on zero points.
        started: when planning began, by ``time.perf_counter``.

    Raises:
        ConfigError: the budget is smaller than the smallest choices.
    """
    options = _tempered(units, [_options(unit, costs, config) for unit in units])
    least, most = (sum(pick(o.size for o in each) for each in options) for pick in (min, max))
    limit = accounts.limit(budget)
    if limit < least:
        wanted = budget.size if budget.bits is None else f"{budget.bits} bits"
        raise ConfigError(
            f"the budget of {wanted} is too small: with the smallest choices the model takes "
            f"{accounts.said(least, budget)}, with the largest {accounts.said(most, budget)}. Give "
            "a larger budget, or smaller choices such as larger groups"
        )
    if limit > most:
        logger.warning(
            "the budget is larger than what the largest choices take, %s",
            accounts.said(most, budget),
        )
    result = allocate(options, limit)
    chosen: OrderedDict[str, AOBaseConfig] = OrderedDict()
    for unit, at in zip(units, result.chosen, strict=True):
        chosen |= {key_for(weight.name): unit.choices[at] for weight in unit.weights}
    plan = _described(units, options, result, accounts, budget, (least, most), started)
    return FqnToConfig(chosen), plan


def key_for(name: str) -> str:
    """The key of FqnToConfig for a weight: the name of its module, or else of the parameter."""
    parameter, _ = parted(name)
    return parameter.removesuffix(".weight")


def _options(unit: Unit, costs: Mapping[str, Sequence[float]], config: MagRConfig) -> list[Option]:
    found = []
    for at, choice in enumerate(unit.choices):
        free = has_free_zero_points(config.zero_point, choice)
        size = sum(
            stored_bits((w.weight.shape[0], w.weight.shape[1]), choice, w.weight.dtype, free=free)
            for w in unit.weights
        )
        cost = sum(costs[w.name][at] for w in unit.weights if w.name in costs)
        found.append(Option(cost, size))
    return found


def _tempered(units: Sequence[Unit], options: Sequence[list[Option]]) -> list[list[Option]]:
    """The options with costs that differ less between units: by the power :data:`POWER`.

    For each config, the costs for each number of a weight are drawn towards their geometric mean.
    """
    numbers = [sum(weight.weight.numel() for weight in unit.weights) for unit in units]
    logs: dict[str, list[tuple[int, float]]] = {}
    for unit, each, count in zip(units, options, numbers, strict=True):
        for choice, option in zip(unit.choices, each, strict=True):
            if option.cost > 0:
                known = logs.setdefault(described_in_full(choice), [])
                known.append((count, math.log(option.cost / count)))
    means = {
        full: sum(count * log for count, log in known) / sum(count for count, _ in known)
        for full, known in logs.items()
    }
    tempered = []
    for unit, each, count in zip(units, options, numbers, strict=True):
        own = []
        for choice, option in zip(unit.choices, each, strict=True):
            cost = option.cost
            if cost > 0:
                mean = means[described_in_full(choice)]
                cost = count * math.exp(mean + POWER * (math.log(cost / count) - mean))
            own.append(option._replace(cost=cost))
        tempered.append(own)
    return tempered


def _described(
    units: Sequence[Unit],
    options: Sequence[Sequence[Option]],
    result: Allocation,
    accounts: Accounts,
    budget: Budget,
    ends: tuple[int, int],
    started: float,
) -> BitPlan:
    rows, named = [], names_of([choice for unit in units for choice in unit.choices])
    for unit, each, at in zip(units, options, result.chosen, strict=True):
        own = each[at]
        larger = [o for o in each if o.size > own.size]
        following = min(larger, key=lambda o: o.size, default=own)
        numbers = sum(w.weight.numel() for w in unit.weights)
        names = [named[described_in_full(choice)] for choice in unit.choices]
        by_choice = {name: o.cost for name, o in zip(names, each, strict=True)}
        rows += [
            BitRow(
                weight.name,
                (weight.weight.shape[0], weight.weight.shape[1]),
                names[at],
                own.size / numbers,
                own.cost,
                unit.name,
                by_choice,
                max(0.0, own.cost - following.cost),
                (following.size - own.size) // 8,
            )
            for weight in unit.weights
        ]
    whole = budget.bits is None or budget.whole_model
    return BitPlan(
        rows,
        accounts.average(result.size, budget),
        "all parameters" if whole else "the quantized weights",
        result.size // 8,
        accounts.other_bits // 8,
        result.cost,
        result.bound,
        accounts.average(ends[0], budget),
        accounts.average(ends[1], budget),
        perf_counter() - started,
    )


def names_of(configs: Sequence[AOBaseConfig]) -> dict[str, str]:
    """A name in brief for each config, by its full description: ``int3, groups of 64``.

    Where this would be that of another config too, it is longer.
    """
    brief = {described_in_full(config): (in_brief(config), describe(config)) for config in configs}
    count = Counter(name for name, _ in brief.values())
    return {
        full: name if count[name] == 1 else f"{name}, {longer}"
        for full, (name, longer) in brief.items()
    }


def in_brief(config: AOBaseConfig) -> str:
    """Bits and groups of a config."""
    group = target_group_size(config)
    return f"int{code_bits(config)}, {'rows' if group is None else f'groups of {group}'}"
