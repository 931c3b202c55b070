"""Stacks of rows are cut so that few are worked on at a time, and none is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magr_fx.row_pieces import CPU_NUMBERS, MULTIPLE, cut, pieces, within

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
