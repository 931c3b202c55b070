"""Masks of every form → which tokens count: for random lengths, against the lengths themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magr_fx.passes.finding.mask_values import convention, counted_tokens, is_of_pairs

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=4)
LOW = (float("-inf"), -1e9, -1e4, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min)


def padding(lengths: list[int], *, left: bool, extra: int = 0) -> Tensor:
    mask = torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask


def read(mask: Tensor, real: Tensor, *, marks_padding: bool | None = False) -> Tensor | None:
    how = convention([mask], marks_padding)
    pairs = mask.dim() == 2 and is_of_pairs(mask, len(real), real.shape[1], how)
    return counted_tokens(mask, len(real), real.shape[1], how, pairs=pairs)


def same(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.booleans(), st.sampled_from(LOW), st.integers(0, 3))
def test_a_value_for_each_token(lengths: list[int], left: bool, low: float, extra: int) -> None:
    real = padding(lengths, left=left, extra=extra)
    if real.shape[0] == real.shape[1]:
        return  # may be of pairs as well
    additive = torch.zeros(real.shape).masked_fill(~real, low)
    for mask in (real, real.long(), real.float(), real.to(torch.uint8), additive):
        assert same(read(mask, real), real)
    assert same(read(additive, real, marks_padding=True), real)
    for mask in (~real, (~real).float()):
        assert same(read(mask, real, marks_padding=True), real)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.booleans())
def test_the_values_tell_what_is_marked(lengths: list[int], left: bool) -> None:
    real = padding(lengths, left=left)
    if real.shape[0] == real.shape[1]:
        return
    assert same(read(real, real, marks_padding=None), real)
    assert same(read((~real).long(), real, marks_padding=None), real)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_sees", ["nothing", "everything", "itself"])
@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.booleans(), st.integers(0, 3), st.sampled_from(LOW), st.integers(1, 2))
def test_a_value_for_each_pair(
    causal: bool,
    padding_sees: str,
    lengths: list[int],
    left: bool,
    extra: int,
    low: float,
    heads: int,
) -> None:
    """Rows of padding are as the model makes them, or opened so that the softmax is finite."""
    real = padding(lengths, left=left, extra=extra)
    length = real.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool)
    sees = (sees.tril() if causal else sees) & real[:, None, :]
    empty = ~sees.any(-1, keepdim=True)
    if padding_sees == "everything":
        sees = sees | empty
    elif padding_sees == "itself":
        sees = sees | (torch.eye(length, dtype=torch.bool) & empty)
        if min(lengths) == 1 and length > 1:
            return  # one token, and padding that looks at itself: all look alike
    additive = torch.zeros(sees.shape).masked_fill(~sees, low)
    forms = [sees, sees.long(), additive]
    forms += [form[:, None].expand(-1, heads, -1, -1) for form in forms]
    for form in forms:
        assert same(read(form, real), real)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_sliding_window(window: int) -> None:
    """Queries of padding far behind the last token see nothing, and are opened."""
    real = padding([3, 8, 5], left=False, extra=4)
    length = real.shape[1]
    band = torch.ones(length, length).tril().triu(1 - window).bool()
    sees = band & real[:, None, :]
    expected = real
    if window > 1:  # where each token sees itself alone there is no telling it from padding
        assert same(read(sees | ~sees.any(-1, keepdim=True), real), expected)
    assert same(read(sees, real), expected)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("form", ["bool", "whole", "added"])
def test_a_square_mask_loses_no_token(length: int, batch: int, prefix: int, form: str) -> None:
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[:, :prefix] = True
    mask = {
        "bool": sees,
        "whole": sees.long(),
        "added": torch.zeros(sees.shape).masked_fill(~sees, -torch.inf),
    }[form]
    every = torch.ones(batch, length, dtype=torch.bool)
    if batch != length and length in (batch, 1):
        return
    assert same(read(mask, every), every)


def test_a_block_at_the_end_that_is_not_causal() -> None:
    """As the tokens of an image after those of a text."""
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    sees[3:, 3:] = True
    assert same(read(sees[None], torch.ones(1, 6).bool()), torch.ones(1, 6).bool())


def test_tokens_that_all_see() -> None:
    sees = torch.eye(5, dtype=torch.bool)
    sees[0], sees[:, 0] = True, True
    assert same(read(sees[None], torch.ones(1, 5).bool()), torch.ones(1, 5).bool())


def test_queries_of_others() -> None:
    real = padding([4, 2], left=False)
    assert same(read(real[:, None, None, :].expand(-1, 1, 3, -1), real), real)


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[0.5, 1, 0], [1, 1, 0.1]]), torch.tensor([[0, -3.0, -1e9], [0, 0, -7.0]])],
)
def test_what_is_no_mask_by_its_values(mask: Tensor) -> None:
    assert read(mask, torch.ones(2, 3).bool()) is None


def test_zeros_that_are_added_exclude_nothing() -> None:
    every = torch.ones(2, 3).bool()
    assert same(read(torch.zeros(2, 3), every), every)
    assert same(read(torch.zeros(2, 3).long(), every), ~every)
    # What other batches hold tells: there the mask multiplies.
    how = convention([torch.zeros(2, 3), torch.ones(2, 4)], False)
    assert same(counted_tokens(torch.zeros(2, 3), 2, 3, how), ~every)
