"""Which inputs of a trace are masks, which tokens they are for, and how they are read.

A mask is found by its name: that of the model's own argument, or that of an inner module's argument
if the module is given the same tensor. Any other input that looks like a mask is not used, and a
note in the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from magr_fx.passes.finding.mask_names import (
    MARKS_PADDING,
    OTHERS,
    UNMASKED,
    Role,
    calls_of,
    is_named_as_lengths,
    is_named_as_mask,
    is_read,
    masks_made,
    order_of,
    roles_of,
    tokens_of,
)
from magr_fx.passes.finding.mask_values import (
    Convention,
    convention,
    counted_tokens,
    excludes,
    is_of_pairs,
    may_be_either,
)
from magr_fx.passes.graphs.torch_private import statically_known_true
from magr_fx.passes.graphs.trace import Trace, TracedBatch

_BEST = "Pass the padding mask as attention_mask, with 1 for each token and 0 for padding"


@dataclass(eq=False)
class Mask:
    """One mask input of a trace, and how it is read.

    ``pairs`` is whether a mask of two dimensions is ``[tokens, tokens]``; None if the values have
    to tell. ``tokens_first`` is whether its tokens lie ``[tokens, batch]``, as nn.Transformer takes
    them; None if the sizes have to tell.
    """

    place: int
    role: str
    how: Convention
    pairs: bool | None = None
    tokens_first: bool | None = None
    _excludes: dict[int, bool] = field(default_factory=dict, repr=False)

    def counted(self, batch: TracedBatch, tokens: torch.Tensor) -> torch.Tensor | None:
        """Which of the tokens ``[batch, tokens, ...]`` count, in their order; None if unknown."""
        mask = batch.values[self.place]
        if tokens.dim() < 2:
            return None
        sequences, length = tokens.shape[:2]
        turned = self.tokens_first
        if turned is None:
            turned = tuple(mask.shape) == (length, sequences) and length != sequences
            turned = turned and mask.dim() == 2
        if turned:
            sequences, length = length, sequences
        pairs = self.pairs
        if pairs is None:
            pairs = mask.dim() == 2 and is_of_pairs(mask, sequences, length, self.how)
        counted = counted_tokens(mask, sequences, length, self.how, pairs=pairs)
        return counted.T if turned and counted is not None else counted

    def excludes(self, batch: TracedBatch) -> bool:
        """Whether it excludes any token of the batch; needs a device sync the first time."""
        if batch.index not in self._excludes:
            mask = batch.values[self.place]
            found = excludes(mask, self.how)
            if found and (mask.dim() > 2 or self.pairs) and mask.shape[-1] == mask.shape[-2]:
                # A causal mask excludes pairs, but no token.
                length = mask.shape[-1]
                sequences = mask.shape[0] if mask.dim() > 2 else 1
                read = counted_tokens(mask, sequences, length, self.how, pairs=True)
                found = read is None or not bool(read.all())
            self._excludes[batch.index] = found
        return self._excludes[batch.index]

    def sequences(self, batch: TracedBatch) -> int:
        """The number of sequences in the mask: 1 if they all share it."""
        mask = batch.values[self.place]
        return 1 if self.pairs or mask.dim() < 2 else len(mask)


@dataclass(frozen=True)
class Stream:
    """Inputs whose tokens have the same masks; ``masks`` is empty if they have none.

    A value that depends on any of ``others`` as well does not belong to these tokens.
    """

    tokens: frozenset[int]
    masks: tuple[Mask, ...]
    others: frozenset[int] = frozenset()

    def has(self, sources: frozenset[int]) -> bool:
        """Whether a value that depends on these inputs belongs to these tokens."""
        return bool(self.tokens & sources) and not sources & self.others


class MaskInputs:
    """The masks among the inputs of all batches."""

    def __init__(self, batches: Iterable[TracedBatch]) -> None:
        self._batches: dict[Trace, list[TracedBatch]] = {}
        for batch in batches:
            self._batches.setdefault(batch.trace, []).append(batch)
        # An exported graph has other inputs too, which are no masks and have no tokens.
        self._tensors = {
            trace: frozenset(
                at for at, v in enumerate(own[0].values) if isinstance(v, torch.Tensor)
            )
            for trace, own in self._batches.items()
        }
        self._roles = {
            trace: {at: role for at, role in roles_of(trace).items() if at in tensors}
            for trace, tensors in self._tensors.items()
        }
        self._streams: dict[Trace, list[Stream]] = {}

    def streams(self, trace: Trace) -> list[Stream]:
        """The streams of tokens of a trace; a value belongs to the first stream that has it."""
        if trace not in self._streams:
            self._streams[trace] = self._find(trace)
        return self._streams[trace]

    @property
    def notes(self) -> list[str]:
        """Notes for the report on inputs that may mark padding, but are not used or misread."""
        notes: dict[str, None] = {}
        for trace in self._batches:
            notes |= dict.fromkeys(self._notes_of(trace))
        return list(notes)

    def _notes_of(self, trace: Trace) -> list[str]:
        read = {m.place: m for s in self.streams(trace) for m in s.masks if m.how.known}
        notes = [
            note
            for place in range(len(trace.input_names))
            if place in self._tensors[trace]
            and (note := self._note_of(trace, place, read.get(place), alone=not read))
        ]
        made = masks_made(trace)
        if made and not read and not notes:
            notes.append(
                f"the model makes the mask {made[0]!r} itself. It is not used here, so padding is "
                f"counted. {_BEST}"
            )
        return notes

    def _note_of(self, trace: Trace, place: int, mask: Mask | None, *, alone: bool) -> str:
        """The note on an input or "". ``mask``: how it is read; ``alone``: no mask is read."""
        name, values = trace.input_names[place], [b.values[place] for b in self._batches[trace]]
        if mask is not None:
            if mask.pairs is not None or not any(may_be_either(v, mask.how) for v in values):
                return ""
            return (
                f"the input {name!r} of shape {tuple(values[0].shape)} is read as a mask for pairs "
                "of tokens, shared by all sequences. If it marks padding instead, padding is "
                "counted. A batch with another number of sequences than of tokens makes this clear"
            )
        shape = next((tuple(v.shape) for v in values if _may_exclude(v)), None)
        if shape is None:
            return ""
        if place in self._roles[trace] or self._may_be_mask(trace, place):
            return (
                f"the input {name!r} of shape {shape} looks like a mask, but it is unknown what "
                "its values mean, or which tokens it is for. It is not used, so padding is "
                f"counted. {_BEST}"
            )
        if alone and len(shape) == 1 and is_named_as_lengths(name):
            return (
                f"the input {name!r} may be the lengths of padded sequences. It is not used, so "
                f"padding is counted. {_BEST}"
            )
        return ""

    def _find(self, trace: Trace) -> list[Stream]:
        roles = self._roles[trace]
        others = self._tensors[trace] - roles.keys()
        masks_of: dict[frozenset[int], list[Mask]] = {}
        for place, role in sorted(roles.items(), key=lambda item: order_of(item[1][0])):
            tokens = self._tokens_of(trace, place, role, others)
            masks_of.setdefault(tokens, []).append(self._mask(trace, place, role, tokens))
        streams = []
        arguments = {(name, at) for call in calls_of(trace) for name, at in call.arguments}
        unmasked = {at for name, at in arguments if name in UNMASKED and at in others}
        unmasked -= {at for tokens in masks_of for at in tokens}
        if unmasked and masks_of:
            streams.append(Stream(frozenset(unmasked), ()))
        for tokens, masks in masks_of.items():
            if self._contradict(trace, masks):
                continue
            rest: frozenset[int] = frozenset()
            if any(is_read(mask.role) for mask in masks):
                rest = frozenset(at for at in others - tokens if not self._may_be_mask(trace, at))
            streams.append(Stream(tokens, tuple(masks), rest))
        return streams

    def _tokens_of(
        self, trace: Trace, place: int, role: Role, others: frozenset[int]
    ) -> frozenset[int]:
        """The inputs whose tokens a mask is for: by name, otherwise by size."""
        name, call = role
        root = calls_of(trace)[0]
        for one in (call, root):
            found = {at for key, at in one.arguments if key in tokens_of(name) and at in others}
            if found:
                return frozenset(found | self._same_tensors(trace, found, others))
        given = (one for key, one in call.arguments if key not in OTHERS and one in others)
        candidates = frozenset(given)
        if not candidates:
            candidates = others - {at for key, at in root.arguments if key in OTHERS} or others
        if name in ("attention_mask", "input_mask") and call.arguments == root.arguments:
            return candidates
        fitting = frozenset(at for at in candidates if self._fits(trace, place, at))
        words = {name.partition("_")[0], *trace.input_names[place].split("_")}
        named = {at for at in fitting if words & set(trace.input_names[at].split("_"))}
        return frozenset(named) or fitting or candidates

    def _same_tensors(
        self, trace: Trace, found: set[int], others: frozenset[int]
    ) -> frozenset[int]:
        """Inputs that are the same tensors as these; they are in all batches of a trace."""
        values = self._batches[trace][0].values
        return frozenset(at for at in others if any(values[at] is values[one] for one in found))

    def _fits(self, trace: Trace, place: int, at: int) -> bool:
        """Whether an input has a token for each value of a mask, in all batches."""
        pairs = ((b.values[place], b.values[at]) for b in self._batches[trace])
        return all(
            tokens.dim() > 1
            and mask.shape[-1:] in (tokens.shape[1:2], tokens.shape[:1])
            and (mask.dim() != 2 or sorted(mask.shape) == sorted(tokens.shape[:2]))
            for mask, tokens in pairs
        )

    def _mask(self, trace: Trace, place: int, role: Role, tokens: frozenset[int]) -> Mask:
        name, call = role
        kind = _kind(self._batches[trace][0].values[place])
        alike = [value for value in self._masks_named(name) if _kind(value) == kind]
        mask = Mask(place, name, convention(alike, MARKS_PADDING[name]))
        if alike[0].dim() != 2 or not tokens:
            return mask
        at = min(tokens)
        if name.endswith("key_padding_mask"):
            mask.pairs = False
            given = tokens & {one for _, one in call.arguments}
            if given and call.batch_first is not None:  # which is about its own arguments
                mask.tokens_first = not call.batch_first
            else:
                mask.tokens_first = self._is_turned(trace, place, at)
        else:
            mask.pairs = self._is_of_pairs(trace, place, at)
        return mask

    def _masks_named(self, name: str) -> Iterator[torch.Tensor]:
        """The masks with this name in all batches of all traces."""
        for trace, batches in self._batches.items():
            for place, (found, _) in self._roles[trace].items():
                if found == name:
                    yield from (batch.values[place] for batch in batches)

    def _is_turned(self, trace: Trace, place: int, at: int) -> bool | None:
        """Whether the mask has the first two dimensions of the input ``at`` exchanged, or None."""
        mask, tokens = _traced_shape(trace, place), _traced_shape(trace, at)[:2]
        straight, turned = _same(mask, tokens), _same(mask, tokens[::-1])
        if straight != turned:
            return turned
        for batch in self._batches[trace]:
            shape, given = (tuple(batch.values[p].shape[:2]) for p in (place, at))
            if shape != shape[::-1] and shape in (given, given[::-1]):
                return shape != given
        return None

    def _is_of_pairs(self, trace: Trace, place: int, at: int) -> bool | None:
        """Whether a mask of two dimensions is ``[tokens, tokens]``, by symbols or sizes.

        None if all batches have as many sequences as tokens.
        """
        mask, tokens = _traced_shape(trace, place), _traced_shape(trace, at)[:2]
        straight, square = _same(mask, tokens), _same(mask, (*tokens[1:], *tokens[1:]))
        if straight != square:
            return square
        for batch in self._batches[trace]:
            shape, given = tuple(batch.values[place].shape), tuple(batch.values[at].shape[:2])
            if len(given) == 2 and given[0] != given[1]:
                if shape == (given[1], given[1]):
                    return True
                if shape == given:
                    return False
        return None

    def _contradict(self, trace: Trace, masks: list[Mask]) -> bool:
        """Whether the masks are for different tokens, but it is unknown which is for which."""
        values = self._batches[trace][0].values
        different = {id(values[mask.place]) for mask in masks}
        roles = [mask.role for mask in masks]
        return len(different) > 1 and (
            len(set(roles)) < len(roles) or len({order_of(role) for role in roles}) > 1
        )

    def _may_be_mask(self, trace: Trace, place: int) -> bool:
        """Whether an input may be a mask, by its name, or by its values if that does not tell."""
        batches, name = self._batches[trace], trace.input_names[place]
        named = is_named_as_mask(name)
        if named is not None:
            return named
        first = batches[0].values
        value = first[place]
        if value.dim() < 2:
            return False
        given = (first[at] for at in self._tensors[trace] if at != place)
        leading = [tuple(tensor.shape[:2]) for tensor in given if tensor.dim() > 1]
        fits = any(value.shape[0] == b and value.shape[-1] in (b, n) for b, n in leading)
        return fits and all(_is_binary(batch.values[place]) for batch in batches)


def _kind(value: torch.Tensor) -> str:
    if value.dtype is torch.bool:
        return "bool"
    return "floating" if value.is_floating_point() else "whole"


def _is_binary(value: torch.Tensor) -> bool:
    """Whether the values are 0 and 1, or 0 and -100 or less, which excludes a token."""
    if value.is_complex():
        return False
    if value.dtype is torch.bool:
        return True
    low = bool(((value == 0) | (value <= -100)).all()) if value.dtype.is_signed else False
    return low or bool(((value == 0) | (value == 1)).all())


def _may_exclude(value: Any) -> bool:
    """Whether a mask may exclude a token: not if all values are equal, or a query sees each key."""
    if value.is_complex() or not value.numel() or not bool((value != value.flatten()[0]).any()):
        return False
    if value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        return True
    how = convention([value], None)
    if not how.known:
        return True
    counted = counted_tokens(value, max(len(value), 1), value.shape[-1], how, pairs=True)
    return counted is None or not bool(counted.all())


def _traced_shape(trace: Trace, place: int) -> tuple[Any, ...]:
    nodes = trace.graph_module.graph.find_nodes(op="placeholder")
    value = nodes[place].meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(
        statically_known_true(a == b) for a, b in zip(one, other, strict=True)
    )
