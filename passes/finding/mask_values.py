"""Read from a mask of any form which tokens count, as ``[batch, tokens]``.

A mask multiplies (0 and 1, False and True) or is added to scores (0, and a very negative number
for padding). It has a value for each token, ``[batch, tokens]``, or for each pair of a query and a
key, ``[tokens, tokens]``, ``[batch, queries, keys]`` or ``[batch, heads, queries, keys]``. A mask
of pairs may be causal too. In it, a token is padding if no token that counts attends to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# A mask adds this or less to the scores of padding: exp(-100) is negligible in a softmax.
EXCLUDED = -100.0


@dataclass(frozen=True)
class Convention:
    """What the values of a mask mean, read from all batches that have it.

    Attributes:
        additive: whether 0 counts and a very negative number does not. In other masks, a value that
            is not zero is marked.
        marks_padding: whether marked values are padding; None if only the values can tell.
        known: whether the values can be read as a mask at all.
    """

    additive: bool = False
    marks_padding: bool | None = False
    known: bool = True


def convention(masks: Iterable[Tensor], marks_padding: bool | None) -> Convention:
    """Determine the convention of one mask from its values in all batches.

    Args:
        masks: its values in each batch: all floating-point, all boolean or all integers.
        marks_padding: whether True is padding by its name; None if the name does not tell.
    """
    masks = [mask for mask in masks if mask.numel()]
    numeric = [mask for mask in masks if mask.dtype is not torch.bool]
    floating = any(mask.is_floating_point() for mask in numeric)
    if any(bool((mask < 0).any()) for mask in numeric if mask.dtype.is_signed):
        # A value for a pair may also be a bias; a value for a token is 0 or excludes the token.
        biased = any(bool(((mask < 0) & (mask > EXCLUDED)).any()) for mask in masks if _flat(mask))
        return Convention(additive=True, known=not biased)
    marked = any(bool(mask.any()) for mask in masks)
    if floating and not marked:  # all zeros: if not additive, no token would count
        return Convention(additive=True)
    if floating and not all(bool((mask == mask.round()).all()) for mask in numeric):
        return Convention(known=False)
    if marks_padding is None:
        marks_padding = _marks_padding(masks)
        if marks_padding is None and marked:
            return Convention(known=False)
    return Convention(marks_padding=bool(marks_padding))


def counted_tokens(
    mask: Tensor, sequences: int, length: int, how: Convention, *, pairs: bool = False
) -> Tensor | None:
    """True for each token that counts, ``[sequences, length]``; None if the mask does not tell.

    Args:
        mask: in any of the forms above.
        sequences, length: the number of sequences, and of tokens in each.
        how: see :func:`convention`.
        pairs: whether a mask of two dimensions is ``[tokens, tokens]``, shared by all sequences.
    """
    if not how.known:
        return None
    allowed = _allowed(mask, how)
    if allowed.dim() == 2 and not pairs:
        counted = allowed
    else:
        if allowed.dim() == 2:
            allowed = allowed[None]
        elif allowed.dim() == 3 and sequences and len(allowed) not in (1, sequences):
            if len(allowed) % sequences:
                return None
            allowed = allowed.view(sequences, -1, *allowed.shape[1:])  # one for each head
        if allowed.dim() == 4:
            allowed = allowed.any(1)
        if allowed.dim() != 3 or allowed.shape[-1] != length:
            return None
        counted = seen_keys(allowed)
    if counted.shape[0] not in (1, sequences) or counted.shape[1] != length:
        return None
    return counted.expand(sequences, length)


def excludes(mask: Tensor, how: Convention) -> bool:
    """Whether a mask of any form excludes anything; needs a device sync."""
    return not bool((_allowed(mask, how) if how.known else mask != 0).all())


def is_of_pairs(mask: Tensor, sequences: int, length: int, how: Convention) -> bool:
    """Whether a mask of two dimensions is ``[tokens, tokens]``, by its values if sizes do not tell.

    With as many sequences as tokens, a row may be a query or a sequence. A sequence is padded at
    one end. A query sees itself, and the queries after it see as many keys or more. If the rows may
    be either, they are taken for queries, which loses no token.
    """
    if tuple(mask.shape) != (length, length) or sequences != length:
        return tuple(mask.shape) == (length, length)
    allowed = _allowed(mask, how)
    if bool(allowed.all()) or not bool(allowed.diagonal().all()):
        return False
    return _is_ascending(allowed) or not _is_padded(allowed)


def may_be_either(mask: Tensor, how: Convention) -> bool:
    """Whether a square mask may be one of pairs as well as one of padded sequences.

    Not if it is just a causal mask: sequences hardly ever have each possible length once.
    """
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    allowed = _allowed(mask, how)
    either = bool(allowed.diagonal().all()) and _is_ascending(allowed) and _is_padded(allowed)
    causal = torch.equal(allowed, allowed.tril()) or torch.equal(allowed, allowed.triu())
    return either and not causal and not bool(allowed.all())


def seen_keys(allowed: Tensor) -> Tensor:
    """Which keys count, ``[batch, keys]``, by which keys each query sees.

    ``allowed`` is ``[batch, queries, keys]``. A key counts if a query that counts sees it. If
    queries and keys are the same tokens, a token that does not see itself does not count: padding
    is hidden from its own queries too. Some code lets padding see everything, or itself alone, to
    keep the softmax finite. Such padding does not count either.
    """
    queries, keys = allowed.shape[-2:]
    if queries != keys:
        return allowed.any(1)
    itself = allowed.diagonal(dim1=1, dim2=2)
    lonely = itself & (allowed.sum(1) == 1) & (allowed.sum(2) == 1)
    lonely = lonely & (itself & ~lonely).any(1, keepdim=True)  # if all are, it tells nothing
    queries_count = itself & ~lonely & ~_padding_that_sees_all(allowed)
    return (allowed & queries_count[:, :, None]).any(1)


def _padding_that_sees_all(allowed: Tensor) -> Tensor:
    """The queries ``[batch, queries]`` that see every key only because they are padding.

    Other queries may see every key too: the last one of a causal mask, or a block at its end that
    is not causal. These come after a query that sees every key before the block.
    """
    length = allowed.shape[-1]
    everything = allowed.all(2)
    run = everything.flip(1).long().cumprod(1).flip(1).bool()  # the run at the end
    start = length - run.sum(1)  # where it starts
    before = (start - 1).clamp(min=0)
    places = torch.arange(length, device=allowed.device)
    row = allowed[torch.arange(len(allowed), device=allowed.device), before]
    causal = (row | (places >= start[:, None])).all(1)
    by_right = run & causal[:, None]
    return everything & ~by_right


def _allowed(mask: Tensor, how: Convention) -> Tensor:
    if how.additive:
        return mask > EXCLUDED
    marked = mask != 0
    return ~marked if how.marks_padding else marked


def _flat(mask: Tensor) -> bool:
    """Whether the mask surely has a value for each token, not for each pair."""
    return mask.dim() == 2 and mask.shape[0] != mask.shape[1]


def _marks_padding(masks: list[Tensor]) -> bool | None:
    """Whether True is padding, by the values; None if they do not tell.

    In a mask of pairs, a token sees itself. In a mask of tokens, the longest sequence has no
    padding, and all others have it at the end, or all have it at the start.
    """
    square = [m != 0 for m in masks if m.dim() > 2 or (m.dim() == 2 and m.shape[0] == m.shape[1])]
    square = [m for m in square if m.shape[-1] == m.shape[-2]]
    if len(square) == len(masks):
        itself = [m.diagonal(dim1=-2, dim2=-1) for m in square]
        if all(bool(one.all()) for one in itself):
            return False
        if not any(bool(one.any()) for one in itself):
            return True
    rows = [m != 0 for m in masks if m.dim() == 2]
    if len(rows) < len(masks):
        return None
    found = set()
    for real in (True, False):
        flags = [m == real for m in rows]
        padded = any(
            all(bool(_true_then_false(flag.flip(1) if flipped else flag).all()) for flag in flags)
            for flipped in (False, True)
        )
        if padded and all(bool(flag.all(1).any()) for flag in flags):
            found.add(real)
    return None if len(found) != 1 else found == {False}


def _is_ascending(allowed: Tensor) -> bool:
    """Whether no row allows fewer than the row before it, or no row allows more."""
    change = allowed.sum(1).diff()
    return bool((change >= 0).all() | (change <= 0).all())


def _is_padded(allowed: Tensor) -> bool:
    """Whether each row looks like a sequence that is padded at one end, or not at all."""
    return bool((_true_then_false(allowed) | _true_then_false(allowed.flip(1))).all())


def _true_then_false(mask: Tensor) -> Tensor:
    """Which rows begin with True, and stay False from the first False on."""
    return (mask[:, 1:] <= mask[:, :-1]).all(1) & mask[:, :1].any(1)
