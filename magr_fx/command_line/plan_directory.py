"""Plan what a run on a model's directory would do and cost, without reading a weight."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig

from magr_fx.costs.measure_rates import measured_rates
from magr_fx.costs.planning import Method, readable
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


def plan_directory(
    name: str,
    target: AOBaseConfig | None,
    *,
    tokens: int,
    length: int,
    skip: tuple[str, ...] = (),
    head: bool = False,
    gptq: bool = False,
) -> tuple[Plan, nn.Module]:
    """Plan :func:`magr_fx.directories.convert_directory.transform_directory` on a model.

    Args:
        name: a directory, or a name on the Hub, whose weights are not downloaded.
        target, tokens, length, skip, head: as in
            :class:`magr_fx.directories.prepare_directory.Job`.
        gptq: whether the run would quantize with GPTQ.

    Returns:
        The plan, and the model without weights.

    Raises:
        MagRError: the model does not read texts, is damaged, or cannot be traced.
    """
    folder = find_model(name, weights=False)
    raw = read_config(folder)
    if gptq and target is None:
        raise ConfigError("GPTQ rounds to the grid of a target: give --target as well")
    # Weights of a name on the Hub are not read: the cache may have only a part of them.
    has_weights = Path(name).is_dir() and any(folder.glob("*.safetensors"))
    tensors = read_directory(folder) if has_weights else None
    model = empty_model(folder, raw)
    check_length(raw, model, length)
    if tensors is not None:
        check_stored(model, folder, tensors)
    check_skipped(model, skip, head=head, linears_only=gptq)
    group_size = resolve_config(None, target).group_size
    found = plan(
        model,
        -(-tokens // (BATCH * length)) * BATCH * length,
        (BATCH, length),
        Method(search=target is not None, groups=group_size is not None, gptq=gptq),
        filter_fn=rewritable(model, skip, head=head, linears_only=gptq),
        routed=_routed(raw),
        stored=None if tensors is None else sum(tensor.nbytes for tensor in tensors.values()),
        copies=copies_of(raw, quantized=gptq),
    )
    check_group_size(found.sites, group_size)
    return found, model


def describe(found: Plan, model: nn.Module, rate: float | None = None) -> str:
    """The text that ``magr-fx plan`` prints. It measures this machine for about a second.

    Args:
        found: the plan.
        model: the model, for its number of parameters and its dtype.
        rate: another machine's FLOP/s in products; the FLOP/s of its solver's steps is assumed to
            differ by the same factor.
    """
    costs, dtype = found.costs, next(model.parameters()).dtype
    product, step = measured_rates(found.largest, dtype)
    if rate is not None:
        product, step = rate, step * rate / product
    memory = {
        "largest block": costs.block,
        "its grams": costs.grams,
        "its solve": costs.solver,
        "activations between blocks": costs.boundary,
        "Python and its libraries": PROCESS,
    }
    flops = {"calibration": costs.forward + costs.gram, "solves": costs.solve}
    rates = {"calibration": product, "solves": step}
    lines = [
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtype}, "
        f"{readable(costs.model, 'B')} on disk",
        f"rewritten: {len(found.sites)} sites with "
        f"{sum(math.prod(site.shape) for site in found.sites):,} parameters, in {found.blocks} "
        "blocks",
        *_shapes(found),
        *(["not rewritten:"] if found.rejections else []),
        *(f"  {r.name} {_by(r.shape)}: {r.reason}" for r in found.rejections),
        f"memory, at most: {readable(sum(memory.values()), 'B')}",
        *(f"  {readable(number, 'B'):>10}  {what}" for what, number in memory.items()),
        f"disk: room for {readable(costs.disk, 'B')}",
        f"time: about {_time(costs.seconds(product, step))}, without reading and writing",
        *(
            f"  {_time(number / rates[what]):>10}  {what}: {readable(number, 'FLOP')} at "
            f"{readable(rates[what], 'FLOP/s')}"
            for what, number in flops.items()
        ),
    ]
    return "\n".join(lines)


def _routed(config: dict[str, Any]) -> float:
    """The share of the tokens that each expert gets if the router distributes them evenly."""
    experts = experts_of(config)
    chosen = size_of(config, "num_experts_per_tok", "experts_per_token") or 1
    return 1.0 if experts is None else min(1.0, chosen / experts)


def _shapes(found: Plan) -> list[str]:
    """One line per kind of site: the count, the name with ``*`` for numbers, and the shape."""
    kinds: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for site in found.sites:
        name = ".".join("*" if p.isdigit() else p for p in site.name.partition("[")[0].split("."))
        kinds[name, site.shape] += 1
    return [f"  {count:>4} x {name} {_by(shape)}" for (name, shape), count in kinds.items()]


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
