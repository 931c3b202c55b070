"""Which rank solves what, and how all of them come to have what each has made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from magr_fx.machine.ranks import Ranks
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.handover.target import Target, row_multiple, rows_are_independent
from magr_fx.passes.handover.torchao_rounding import quantized_copy
from magr_fx.passes.rewriting.ledger import Step
from magr_fx.passes.rewriting.rewrite_weights import rewrite_weight
from magr_fx.passes.rewriting.solve_sites import go_on_with, go_on_with_torchao_alone

# What a torchao tensor on a grid consists of, see torchao_rounding.GridTensor.
_PARTS = ("qdata", "scale", "zero_point")


# From this cost on, and this many rows for each rank, the rows of a gram's sites are worth
# splitting over the ranks: all of them factorise the gram then, and agree on every fifth step.
SPLIT_FROM, LEAST_ROWS = 2**27, 32


def plan(
    finished: Sequence[SharedGram], target: Target | None, ranks: Ranks
) -> tuple[list[SharedGram], list[int], list[SharedGram]]:
    """What to solve as a whole, each on one rank, its owner; and what to split over all by rows.

    Split is what would keep its owner busy while all others have finished.
    """
    if ranks.world == 1:
        return list(finished), [0] * len(finished), []
    costs = [cost(shared) for shared in finished]
    share = sum(costs) / ranks.world
    whole: list[SharedGram] = []
    split: list[SharedGram] = []
    for shared, own in zip(finished, costs, strict=True):
        rows = sum(site.shape[0] for site in shared.sites)
        alike, least = True, LEAST_ROWS
        if target is not None:
            alike = rows_are_independent(target.config)
            least = max(least, row_multiple(target.config))
        big = own > max(share, SPLIT_FROM) and rows >= least * ranks.world
        (split if alike and big else whole).append(shared)
    return whole, ranks.least_loaded([cost(shared) for shared in whole]), split


def cost(shared: SharedGram) -> float:
    """Of a solve, in multiplications: each row's products with the gram, and a factorisation."""
    rows, inputs = sum(site.shape[0] for site in shared.sites), shared.sites[0].shape[1]
    return float(rows * inputs**2 + inputs**3)


def exchange(
    finished: Sequence[SharedGram],
    owners: Sequence[int],
    step: Step,
    target: Target | None,
    ranks: Ranks,
) -> None:
    """Have, on every rank, what the owner of each gram made of its sites.

    Args:
        finished: the grams, the same on all ranks.
        owners: who solved the sites of each.
        step: what is done of the own sites; that of the others is added, each row once its weight
            is written.
        target: what will quantize the sites, and takes part.
        ranks: those that work together.
    """
    if ranks.world == 1:
        return
    gptq = target is not None and target.options.rounding == "gptq"
    own = {row.name for row in step.rows}
    rows = {row.name: row for part in ranks.gather(step.rows) for row in part}
    for site, owner in _sites(finished, owners):
        row = rows[site.name]
        if row.outcome == "rewritten":
            if target is not None and gptq:
                _share_tensor(site, owner, step.tensors, target, ranks)
            else:
                _share_weight(site, owner, ranks)
        if site.name in own:
            continue
        step.rows.append(row)
        if target is None or row.outcome == "skipped":
            continue
        if row.outcome == "failed":
            go_on_with_torchao_alone(site, target, step)
        elif target.options.propagate:
            made = step.tensors[site.name] if gptq else quantized_copy(site.weight, target.config)
            go_on_with(site, made, step)
    order = {site.name: at for at, (site, _) in enumerate(_sites(finished, owners))}
    step.rows.sort(key=lambda row: order[row.name])


def _sites(finished: Sequence[SharedGram], owners: Sequence[int]) -> Iterator[tuple[Site, int]]:
    for shared, owner in zip(finished, owners, strict=True):
        for site in shared.sites:
            yield site, owner


def _share_weight(site: Site, owner: int, ranks: Ranks) -> None:
    """The owner's weight, which it has written already."""
    weight = site.weight.contiguous()
    ranks.broadcast(weight, owner)
    if owner != ranks.rank:
        rewrite_weight(site, weight)


def _share_tensor(
    site: Site, owner: int, tensors: dict[str, torch.Tensor], target: Target, ranks: Ranks
) -> None:
    """The codes, scales and zero points of the owner's tensor, in one that torchao makes here."""
    if owner != ranks.rank:
        tensors[site.name] = quantized_copy(site.weight, target.config)
    for name in _PARTS:
        part = getattr(tensors[site.name], name)
        if part is not None:
            ranks.broadcast(part, owner)
