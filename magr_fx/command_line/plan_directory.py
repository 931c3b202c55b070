"""``magr-fx plan``: what a run on a directory's model would do and cost, without its weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from torchao.core.config import AOBaseConfig

from magr_fx.costs.planning import Method, measured_rate, readable
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
) -> tuple[Plan, int]:
    """Plan a run on a model; also the bytes of disk that it needs beside the model.

    Args:
        name: a directory, or a name on the Hub, whose weights are not downloaded.
        target, tokens, length, skip, head: as for
            :class:`magr_fx.directories.prepare_directory.Job`.
        gptq: whether the run would quantize with GPTQ.

    Raises:
        MagRError: the model does not read texts, is damaged, or cannot be traced.
    """
    folder = find_model(name, weights=False)
    raw = read_config(folder)
    if gptq and target is None:
        raise ConfigError("GPTQ rounds to the grid of a target: give --target as well")
    model = empty_model(folder, raw)
    check_length(raw, model, length)
    # Weights of a name on the Hub are not read: the cache may have only a part of them.
    if Path(name).is_dir() and any(folder.glob("*.safetensors")):
        check_stored(model, folder, read_directory(folder))
    check_skipped(model, skip, head=head, linears_only=gptq)
    group_size = resolve_config(None, target).group_size
    experts = experts_of(raw)
    chosen = size_of(raw, "num_experts_per_tok", "experts_per_token") or 1
    found = plan(
        model,
        -(-tokens // (BATCH * length)) * BATCH * length,
        (BATCH, length),
        Method(search=target is not None, groups=group_size is not None, gptq=gptq),
        filter_fn=rewritable(model, skip, head=head, linears_only=gptq),
        routed=1.0 if experts is None else min(1.0, chosen / experts),
    )
    for site in found.found.sites:
        check_group_size(site, group_size)
    # A saved state is kept until the next is complete.
    return found, copies_of(raw, quantized=gptq) * found.model + 2 * found.boundary


def describe(found: Plan, disk: int, rate: float | None = None) -> str:
    """The plan as text, with a time by the FLOP/s of products, which are measured by default."""
    rate = measured_rate() if rate is None else rate
    sites, memory = found.found.sites, found.memory + PROCESS
    kinds = Counter(
        ".".join("*" if part.isdigit() else part for part in site.name.partition("[")[0].split("."))
        + f" {'x'.join(map(str, site.shape))}"
        for site in sites
    )
    parameters = sum(math.prod(site.shape) for site in sites)
    minutes = [flops / rate / 60 for flops in (found.calibration, found.solve)]
    return "\n".join([
        f"rewritten: {len(sites)} sites with {parameters:,} parameters, in {found.blocks} blocks",
        *(f"  {count:>4} x {kind}" for kind, count in kinds.items()),
        *(f"not rewritten: {r.name} {'x'.join(map(str, r.shape))}: {r.reason}"
          for r in found.found.rejections),
        f"memory, at most: {readable(memory, 'B')}: the largest block {readable(found.block, 'B')},"
        f" its grams {readable(found.grams, 'B')}, a solve {readable(found.solver, 'B')}, the "
        f"activations between blocks {readable(found.boundary, 'B')}, "
        f"Python {readable(PROCESS, 'B')}",
        f"disk: room for {readable(disk, 'B')}",
        f"time, with products at {readable(rate, 'FLOP/s')}: about {minutes[0]:.1f} minutes for "
        f"the calibration, {minutes[1]:.1f} for the solves",
    ])  # fmt: skip
