"""Divide the solves between ranks, and exchange their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from magr_fx.machine.ranks import Ranks
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.handover.target import Target, row_multiple, rows_are_independent
from magr_fx.passes.handover.torchao_rounding import (
    PARTS,
    quantized_copy,
    with_float_zero_point,
)
from magr_fx.passes.rewriting.ledger import Step
from magr_fx.passes.rewriting.rewrite_weights import rewrite_weight
from magr_fx.passes.rewriting.solve_sites import calibrate_with, calibrate_with_torchao_alone

# With at least this cost, and this many rows for each rank, it pays to split the rows of one gram's
# sites over the ranks, although every rank then factorises the gram, and all meet every fifth step.
SPLIT_FROM, LEAST_ROWS = 2**27, 32


def plan(
    finished: Sequence[SharedGram], target: Target | None, ranks: Ranks
) -> tuple[list[SharedGram], list[int], list[SharedGram]]:
    """Decide which grams one rank solves, which rank, and which grams are split by rows.

    A gram is split if its owner would still be at work when all other ranks have finished.

    Returns:
        Grams for one rank each, the rank of each of these, and grams to split over all ranks.
    """
    if ranks.world == 1:
        return list(finished), [0] * len(finished), []
    costs = [cost(shared) for shared in finished]
    share = sum(costs) / ranks.world
    whole: list[SharedGram] = []
    split: list[SharedGram] = []
    for shared, own in zip(finished, costs, strict=True):
        rows = sum(site.shape[0] for site in shared.sites)
        independent, least = True, LEAST_ROWS
        if target is not None:
            independent = rows_are_independent(target.config)
            least = max(least, row_multiple(target.config))
        big = own > max(share, SPLIT_FROM) and rows >= least * ranks.world
        (split if independent and big else whole).append(shared)
    return whole, ranks.least_loaded([cost(shared) for shared in whole]), split


def cost(shared: SharedGram) -> float:
    """About how many multiplications a solve takes: products with the gram, and a factorisation."""
    rows, inputs = sum(site.shape[0] for site in shared.sites), shared.sites[0].shape[1]
    return float(rows * inputs**2 + inputs**3)


def exchange(
    finished: Sequence[SharedGram],
    owners: Sequence[int],
    step: Step,
    target: Target | None,
    ranks: Ranks,
) -> None:
    """Send the results for each gram's sites from its owner to all ranks.

    Args:
        finished: the grams, the same on all ranks.
        owners: the rank that has solved the sites of each.
        step: the results of this rank; those of the others are added, each row once its weight is
            written.
        target: what will quantize the weights; None where they are rewritten without regard to it.
        ranks: the ranks that work together.
    """
    if ranks.world == 1:
        return
    direct = target is not None and target.makes_tensors
    own = {row.name for row in step.rows}
    rows = {row.name: row for part in ranks.gather(step.rows) for row in part}
    for site, owner in _sites(finished, owners):
        row = rows[site.name]
        if row.outcome == "rewritten":
            if target is not None and direct:
                _share_tensor(site, owner, step.tensors, target, ranks)
            else:
                _share_weight(site, owner, ranks)
        if site.name in own:
            continue
        step.rows.append(row)
        if target is None or row.outcome == "skipped":
            continue
        if row.outcome == "failed":
            calibrate_with_torchao_alone(site, target, step)
        elif target.options.propagate:
            made = step.tensors[site.name] if direct else quantized_copy(site.weight, target.config)
            calibrate_with(site, made, step)
    order = {site.name: at for at, (site, _) in enumerate(_sites(finished, owners))}
    step.rows.sort(key=lambda row: order.get(row.name, -1))  # those of other targets stay first


def _sites(finished: Sequence[SharedGram], owners: Sequence[int]) -> Iterator[tuple[Site, int]]:
    for shared, owner in zip(finished, owners, strict=True):
        for site in shared.sites:
            yield site, owner


def _share_weight(site: Site, owner: int, ranks: Ranks) -> None:
    """Send the owner's weight, which the owner has already written, to all ranks."""
    weight = site.weight.contiguous()
    ranks.broadcast(weight, owner)
    if owner != ranks.rank:
        rewrite_weight(site, weight)


def _share_tensor(
    site: Site, owner: int, tensors: dict[str, torch.Tensor], target: Target, ranks: Ranks
) -> None:
    """Send the codes, scales and zero points of the owner's tensor to all ranks."""
    if owner != ranks.rank:
        tensors[site.name] = quantized_copy(site.weight, target.config)
        if target.free_zero_points:
            with_float_zero_point(tensors[site.name])
    for name in PARTS:
        part = getattr(tensors[site.name], name)
        if part is not None:
            ranks.broadcast(part, owner)
