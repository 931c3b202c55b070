"""A model's directory → what a run would do and cost, without loading a weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchao.core.config import AOBaseConfig

from magr_fx.costs.measure_rates import measured_rates
from magr_fx.costs.planning import Method, Rates, Work, readable
from magr_fx.directories.convert_directory import PROCESS
from magr_fx.directories.prepare_directory import check_length, copies_of
from magr_fx.directories.skipped import check_skipped, rewritable
from magr_fx.errors import ConfigError
from magr_fx.model_files.calibration_text import BATCH
from magr_fx.model_files.model_directory import (
    experts_of,
    find_model,
    read_config,
    read_directory,
    size_of,
)
from magr_fx.model_files.stored_model import check_stored, empty_model
from magr_fx.passes.entries.plan import Plan, plan
from magr_fx.passes.rewriting.check_model import check_group_size
from magr_fx.passes.rewriting.pipeline import resolve_config


@dataclass(frozen=True)
class DirectoryPlan:
    """The plan for a model; ``str`` is what ``magr-fx plan`` prints.

    Attributes:
        name: of the model.
        parameters: of it, each tied one once.
        dtype: that it is worked on in.
        tokens, length: of the calibration.
        method: how it would be solved.
        plan: sites, blocks and costs.
        rates: what this machine does.
    """

    name: str
    parameters: int
    dtype: torch.dtype
    tokens: int
    length: int
    method: Method
    plan: Plan
    rates: Rates

    def __str__(self) -> str:
        costs, sites, rates = self.plan.costs, self.plan.sites, self.rates
        size = sum(site.shape[0] * site.shape[1] for site in sites)
        seconds = costs.seconds(rates)
        memory = {
            "largest block": costs.block,
            "its grams": costs.grams,
            "its solve": costs.solver,
            "activations between blocks": costs.boundary,
            "Python and its libraries": PROCESS,
        }
        operations = {
            f"forward, {costs.passes} times": costs.forward * costs.passes,
            "grams": costs.gram,
            "solves": costs.solve,
        }
        elementwise = sum(work.elementwise for work in operations.values())
        lines = [
            f"{self.name}: {self.parameters:,} parameters, {self.dtype}, "
            f"{readable(costs.model, 'B')} on disk",
            f"rewritten: {len(sites)} sites with {size:,} parameters, in {self.plan.blocks} "
            f"blocks, on {self.tokens:,} tokens in windows of {self.length}",
            *_shapes(self.plan),
            *(["left alone:"] if self.plan.rejections else []),
            *(f"  {r.name} {_by(r.shape)}: {r.reason}" for r in self.plan.rejections),
            f"memory, at most: {readable(sum(memory.values()), 'B')}",
            *(f"  {readable(number, 'B'):>10}  {what}" for what, number in memory.items()),
            f"disk: room for {readable(costs.disk, 'B')}; {readable(costs.states(rates), 'B')} of "
            "states are written on top of each other",
            f"operations: {readable(sum(work.flops for work in operations.values()), 'FLOP')} of "
            f"products and factorisations, {readable(elementwise, 'op')} elementwise",
            *(f"  {_operations(work)}  {what}" for what, work in operations.items()),
            f"time: about {_time(sum(seconds.values()))}, with products at "
            f"{readable(rates.forward, 'FLOP/s')} in {self.dtype} and "
            f"{readable(rates.solve, 'FLOP/s')} in float32, factorisations at "
            f"{readable(rates.factors, 'FLOP/s')}, elementwise operations at "
            f"{readable(rates.elementwise, 'op/s')}, the disk at {readable(rates.disk, 'B/s')}",
            *(f"  {_time(number):>8}  {what}" for what, number in seconds.items()),
        ]
        return "\n".join(lines)


def plan_directory(
    name: str,
    target: AOBaseConfig | None,
    *,
    tokens: int,
    length: int,
    skip: tuple[str, ...] = (),
    head: bool = False,
    gptq: bool = False,
    rate: float | None = None,
) -> DirectoryPlan:
    """What :func:`magr_fx.directories.convert_directory.transform_directory` would do of a model.

    Args:
        name: a directory, or a name on the Hub, of which no weights are downloaded.
        target, tokens, length, skip, head: as for the run.
        gptq: whether it would round by GPTQ.
        rate: operations per second of matrix products; None measures them here, in a second. The
            other rates are always measured here: where a rate is given they are taken to be as
            many times those of this machine as the given one is of its products in float32.

    Raises:
        MagRError: the model is not one that reads a text, damaged, or cannot be traced.
    """
    folder = find_model(name, weights=False)
    raw = read_config(folder)
    if gptq and target is None:
        raise ConfigError("rounding by GPTQ is to the grid of a target: give --target as well")
    # Of a name on the Hub there may be some in the cache, or be coming; a plan is for all of it.
    has_weights = Path(name).is_dir() and any(folder.glob("*.safetensors"))
    tensors = read_directory(folder) if has_weights else None
    model = empty_model(folder, raw)
    check_length(raw, model, length)
    if tensors is not None:
        check_stored(model, folder, tensors)
    check_skipped(model, skip, head=head, linears_only=gptq)
    dtype = next(model.parameters()).dtype
    group_size = resolve_config(None, target).group_size
    searched = target is not None
    method = Method(search=searched, propagate=searched, groups=group_size is not None, gptq=gptq)
    found = plan(
        model,
        -(-tokens // (BATCH * length)) * BATCH * length,
        (BATCH, length),
        method,
        filter_fn=rewritable(model, skip, head=head, linears_only=gptq),
        routed=_routed(raw),
        stored=None if tensors is None else sum(tensor.nbytes for tensor in tensors.values()),
        copies=copies_of(raw, quantized=gptq),
    )
    check_group_size(found.sites, group_size)
    rates = measured_rates(found.largest, dtype, BATCH * length)
    if rate is not None:
        rates = rates.with_products(rate)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return DirectoryPlan(name, parameters, dtype, tokens, length, method, found, rates)


def _routed(config: dict[str, Any]) -> float:
    """The share of the tokens that a router sends to each expert, evenly."""
    experts = experts_of(config)
    chosen = size_of(config, "num_experts_per_tok", "experts_per_token") or 1
    return 1.0 if experts is None else min(1.0, chosen / experts)


def _shapes(found: Plan) -> list[str]:
    """One line for all sites of one kind: their names without numbers, and their shape."""
    kinds: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for site in found.sites:
        name = ".".join("*" if p.isdigit() else p for p in site.name.partition("[")[0].split("."))
        kinds[name, site.shape] += 1
    return [f"  {count:>4} x {name} {_by(shape)}" for (name, shape), count in kinds.items()]


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _operations(work: Work) -> str:
    return f"{readable(work.flops, 'FLOP'):>11}, {readable(work.elementwise, 'op'):>8}"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
