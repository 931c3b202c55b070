"""What a mask holds → which tokens count: ``[batch, tokens]`` of whatever form it was given in.

A mask multiplies (0 and 1, False and True) or is added to scores (0, and a very negative number
for padding). It has a value for each token, ``[batch, tokens]``, or for each pair of a query and a
key, ``[tokens, tokens]``, ``[batch, queries, keys]`` or ``[batch, heads, queries, keys]``. The
latter may be causal as well: a token is padding where no token that counts looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# What is added to a score of padding, at most: exp(-100) is nothing beside any other token.
EXCLUDED = -100.0


@dataclass(frozen=True)
class Convention:
    """How the values of a mask are meant, by all batches that have it.

    Attributes:
        additive: 0 counts and a very negative number does not; else what is not zero is marked.
        marks_padding: what is marked is padding; None where only the values can tell.
        known: whether the values are a mask's at all.
    """

    additive: bool = False
    marks_padding: bool | None = False
    known: bool = True


def convention(masks: Iterable[Tensor], marks_padding: bool | None) -> Convention:
    """Read off what one mask holds in all batches.

    Args:
        masks: its values in each batch, all of them floating, or bool, or whole numbers.
        marks_padding: what its name says of True; None where names differ.
    """
    masks = [mask for mask in masks if mask.numel()]
    numeric = [mask for mask in masks if mask.dtype is not torch.bool]
    floating = any(mask.is_floating_point() for mask in numeric)
    if any(bool((mask < 0).any()) for mask in numeric if mask.dtype.is_signed):
        # A value for each pair may be a bias as well; one for each token is 0 or excludes it.
        biased = any(bool(((mask < 0) & (mask > EXCLUDED)).any()) for mask in masks if _flat(mask))
        return Convention(additive=True, known=not biased)
    marked = any(bool(mask.any()) for mask in masks)
    if floating and not marked:  # nothing is excluded: else no token would be left
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
    """True for each token that counts, ``[sequences, length]``; None where the mask does not say.

    Args:
        mask: in any of the forms above.
        sequences, length: of the tokens.
        how: see :func:`convention`.
        pairs: whether a mask of two dimensions is ``[tokens, tokens]``, one for all sequences.
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
            allowed = allowed.view(sequences, -1, *allowed.shape[1:])  # each head's own
        if allowed.dim() == 4:
            allowed = allowed.any(1)
        if allowed.dim() != 3 or allowed.shape[-1] != length:
            return None
        counted = seen_keys(allowed)
    if counted.shape[0] not in (1, sequences) or counted.shape[1] != length:
        return None
    return counted.expand(sequences, length)


def excludes(mask: Tensor, how: Convention) -> bool:
    """Whether anything at all is excluded by the mask, whatever its form; a sync."""
    return not bool((_allowed(mask, how) if how.known else mask != 0).all())


def is_of_pairs(mask: Tensor, sequences: int, length: int, how: Convention) -> bool:
    """Whether a mask of two dimensions is ``[tokens, tokens]``, where sizes alone do not tell.

    As many sequences as tokens: each row is a query or a sequence. A sequence is padded at one
    end; a query sees itself, and those after it see as much or more. Where both may be, it is
    taken for the former, which loses no token.
    """
    if tuple(mask.shape) != (length, length) or sequences != length:
        return tuple(mask.shape) == (length, length)
    allowed = _allowed(mask, how)
    if bool(allowed.all()) or not bool(allowed.diagonal().all()):
        return False
    return _is_ascending(allowed) or not _is_padded(allowed)


def may_be_either(mask: Tensor, how: Convention) -> bool:
    """Whether a square mask may be of pairs as well as of sequences, of different lengths.

    Not where it is causal and no more: so many sequences hardly have all lengths there are.
    """
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    allowed = _allowed(mask, how)
    either = bool(allowed.diagonal().all()) and _is_ascending(allowed) and _is_padded(allowed)
    causal = torch.equal(allowed, allowed.tril()) or torch.equal(allowed, allowed.triu())
    return either and not causal and not bool(allowed.all())


def seen_keys(allowed: Tensor) -> Tensor:
    """Which keys count, ``[batch, keys]``, of ``[batch, queries, keys]``: who may look at whom.

    A key counts if a query that counts looks at it. Where queries are the keys' own tokens, one
    that does not look at itself does not count: padding is hidden from its own queries too. To
    keep the softmax finite some code lets padding look at everything, or at itself alone; that
    makes no token of it.
    """
    queries, keys = allowed.shape[-2:]
    if queries != keys:
        return allowed.any(1)
    itself = allowed.diagonal(dim1=1, dim2=2)
    lonely = itself & (allowed.sum(1) == 1) & (allowed.sum(2) == 1)
    lonely = lonely & (itself & ~lonely).any(1, keepdim=True)  # all of them: there is no telling
    queries_count = itself & ~lonely & ~_opened(allowed)
    return (allowed & queries_count[:, :, None]).any(1)


def _opened(allowed: Tensor) -> Tensor:
    """The queries ``[batch, queries]`` that look at everything only because they are padding.

    In a mask that hides anything a query may see all keys by right: the last one of a causal
    mask, or a block at its end that is not causal. Those come after one that sees all before it.
    """
    length = allowed.shape[-1]
    everything = allowed.all(2)
    run = everything.flip(1).long().cumprod(1).flip(1).bool()  # up to the last query
    start = length - run.sum(1)  # where that run starts
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
    """Whether it has a value for each token."""
    return mask.dim() == 2 and mask.shape[0] != mask.shape[1]


def _marks_padding(masks: list[Tensor]) -> bool | None:
    """Whether True is padding, by the values; None where they do not tell.

    Pairs: a token looks at itself. Tokens: the longest sequence has no padding, and all others have
    theirs at the end, or all at the start.
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
            all(bool(_run_at(flag.flip(1) if flipped else flag).all()) for flag in flags)
            for flipped in (False, True)
        )
        if padded and all(bool(flag.all(1).any()) for flag in flags):
            found.add(real)
    return None if len(found) != 1 else found == {False}


def _is_ascending(allowed: Tensor) -> bool:
    """Whether each row allows as many as the one before or more, or each as many or less."""
    change = allowed.sum(1).diff()
    return bool((change >= 0).all() | (change <= 0).all())


def _is_padded(allowed: Tensor) -> bool:
    """Whether each row is as a sequence is that is padded at one end, or not at all."""
    return bool((_run_at(allowed) | _run_at(allowed.flip(1))).all())


def _run_at(mask: Tensor) -> Tensor:
    """Which rows are True from the first place on up to some place, and then False."""
    return (mask[:, 1:] <= mask[:, :-1]).all(1) & mask[:, :1].any(1)
