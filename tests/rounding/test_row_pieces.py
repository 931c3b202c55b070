"""Stacks of rows are cut so that few are worked on at a time, and none is lost."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from targets import ASYMMETRIC, INT8, ON_GRIDS, PACKED, intx, quantized, weights

from magr_fx.config import QuantizeOptions
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.handover.target import Target, describe, row_multiple
from magr_fx.passes.handover.torchao_rounding import TorchaoRounding
from magr_fx.passes.rewriting import share_solves as spread
from magr_fx.rounding.row_pieces import CPU_NUMBERS, MULTIPLE, cut, pieces, within

CPU = torch.device("cpu")


@given(rows=st.integers(1, 200_000), columns=st.integers(1, 30_000))
def test_every_row_is_in_one_piece(rows: int, columns: int) -> None:
    count = pieces(rows, columns, CPU)
    found = cut(rows, count)
    assert len(found) == count
    assert (found[0].start, found[-1].stop) == (0, rows)
    assert all(one.stop == two.start for one, two in pairwise(found))
    assert all(piece.start % MULTIPLE == 0 for piece in found)
    sizes = [piece.stop - piece.start for piece in found]
    assert max(sizes) <= max(columns, CPU_NUMBERS // columns) + MULTIPLE
    assert max(sizes) - min(sizes) <= 2 * MULTIPLE  # none so small that ranks would go without


@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [(3072, 576, 1), (576, 1536, 1), (5632, 1024, 3), (28672, 4096, 7), (4096, 14336, 1)],
)
def test_what_fits_stays_whole(rows: int, columns: int, count: int) -> None:
    assert pieces(rows, columns, CPU) == count


def test_a_device_takes_more_at_once() -> None:
    assert pieces(22016, 4096, torch.device("cuda")) == 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_the_rows_of_each_weight_in_a_part(rows: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, sum(rows) - 1))
    part = slice(start, data.draw(st.integers(start + 1, sum(rows))))
    owner = [at for at, count in enumerate(rows) for _ in range(count)][part]
    assert within(rows, part) == [owner.count(at) for at in dict.fromkeys(owner)]


@given(
    rows=st.integers(1, 5000),
    world=st.sampled_from([1, 2, 3, 5, 8]),
    multiple=st.sampled_from([1, 16, MULTIPLE]),
)
def test_every_row_is_of_one_rank(rows: int, world: int, multiple: int) -> None:
    parts = [Ranks(None, rank, world).part_of(rows, multiple) for rank in range(world)]
    assert (parts[0].start, parts[-1].stop) == (0, rows)
    assert all(one.stop == two.start for one, two in pairwise(parts))
    assert all(part.start % multiple == 0 for part in parts if part.start < rows)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) < 2 * multiple
    assert min(sizes) > 0 or rows < multiple * world  # which is not split


# Of each stack the rows of its weights, in panels of 16, which is all that packing asks for.
STACKS = [(192, 48, 80), (16, 368), (1000 * 16,), (64, 16, 16, 16, 400), (336,)]


@pytest.mark.parametrize("rows", STACKS, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_cuts_go_through_no_panel(rows: tuple[int, ...], world: int) -> None:
    """Neither those for ranks nor those for memory, counted from each weight's first row."""
    assert sum(rows) >= world * row_multiple(PACKED)
    for rank in range(world):
        own = Ranks(None, rank, world).part_of(sum(rows), row_multiple(PACKED))
        for count in (1, 2):
            pieces_of = cut(own.stop - own.start, min(count, (own.stop - own.start) // MULTIPLE))
            for piece in pieces_of:
                part = slice(own.start + piece.start, own.start + piece.stop)
                assert all(n % 16 == 0 for n in within(rows, part)), (rank, part)


@pytest.mark.parametrize("target", [PACKED, INT8[0], intx(3, ASYMMETRIC, 16)], ids=describe)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_parts_are_quantized_as_the_whole(target: Any, world: int) -> None:
    rows = [192, 48, 80]
    weight = torch.cat(weights(rows))
    quantized(weight, target)  # skips where there is no kernel for it
    whole = TorchaoRounding(target, rows).values(weight)
    for rank in range(world):
        own = Ranks(None, rank, world).part_of(sum(rows), row_multiple(target))
        made = TorchaoRounding(target, within(rows, own)).values(weight[own])
        assert torch.equal(made, whole[own])


def test_what_is_plain_is_cut_anywhere() -> None:
    assert [row_multiple(target) for target in ON_GRIDS] == len(ON_GRIDS) * [1]
    assert [row_multiple(target) for target in (PACKED,)] == [MULTIPLE]


@pytest.mark.parametrize(("rows", "split"), [(191, False), (192, True)])
def test_few_rows_of_a_packed_target_stay_with_one_rank(
    rows: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "SPLIT_FROM", 0)
    shared: Any = SimpleNamespace(sites=[SimpleNamespace(shape=(rows, 64))])
    target = Target(PACKED, QuantizeOptions())
    whole, owners, parts = spread.plan([shared], target, Ranks(None, 0, 3))
    assert (len(whole), len(owners), len(parts)) == ((0, 0, 1) if split else (1, 1, 0))
    assert spread.plan([shared], None, Ranks(None, 0, 3))[2] == [shared]
