"""A value of the running graph → the tokens that each weight is multiplied with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from magr_fx.errors import CalibrationError
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.padding import TokenMask, rows_that_count
from magr_fx.passes.finding.weight_uses import Call
from magr_fx.passes.graphs.trace import Trace, TracedBatch


class CapturedInput(NamedTuple):
    """Tokens ``[tokens, in]``, the indices of those that count (None: all), and their grams."""

    grams: list[SharedGram]
    tokens: torch.Tensor
    counted: torch.Tensor | None


class FiniteInputs:
    """Looks at activations; one sync with the device for many of them.

    Attributes:
        tokens: how many counted tokens of each gram were looked at.
    """

    def __init__(self) -> None:
        self.tokens: Counter[SharedGram] = Counter()
        self._seen: list[tuple[str, int]] = []
        self._finite: list[torch.Tensor] = []

    def look(self, captured: CapturedInput, batch: int) -> None:
        """Take note of an activation of the batch with this number."""
        # One pass over the tokens: a sum is finite only if all its terms are.
        good = captured.tokens.sum(-1, dtype=torch.float32).isfinite()
        counted = good if captured.counted is None else good[captured.counted]
        self._seen.append((captured.grams[0].sites[0].name, batch))
        self._finite.append(counted.all())
        for shared in captured.grams:
            self.tokens[shared] += len(counted)

    def refuse(self) -> None:
        """Raise if a counted token since the last call was not finite.

        Raises:
            CalibrationError: the message names the site and the batch.
        """
        seen, finite = self._seen, self._finite
        self._seen, self._finite = [], []
        flags = torch.stack([f.to(finite[0].device) for f in finite]).tolist() if finite else []
        if all(flags):
            return
        name, index = seen[flags.index(False)]
        raise CalibrationError(
            f"the input of {name} holds NaN or Inf in calibration batch {index}; "
            "nothing was changed. Look for overflow (float16?) or broken values "
            "before that layer, or leave the batch out"
        )


@dataclass(frozen=True, eq=False)
class InputCapture:
    """One distinct activation, which is captured just before the first call that reads it.

    Attributes:
        call: one of the calls that read it.
        mask: which of its tokens are padding; None: no mask is known.
        grams: the grams it is added to. With a route, the keys are the positions of the matrices
            in their stack; otherwise there is one key.
    """

    call: Call
    mask: TokenMask | None
    grams: dict[int, list[SharedGram]] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose values :meth:`take` needs."""
        return self.call.reads if self.mask is None else (*self.call.reads, *self.mask.gathers)

    def add(self, call: Call, gram: SharedGram) -> None:
        """Add the activation to one more gram, or once more to the same gram."""
        self.grams.setdefault(_place(call), []).append(gram)

    def take(self, env: Mapping[fx.Node, Any], batch: TracedBatch) -> Iterator[CapturedInput]:
        """The activation's tokens, from the values of a run; with a route, for each matrix."""
        rows = self.call.rows.of(env[self.call.input])
        keep = self._keep(rows, env, batch)
        route = self.call.route
        if route is None:
            (grams,) = self.grams.values()
            yield self._of_matrix(grams, rows, keep, batch)
            return
        places = env[route.node]
        if route.ends:  # rows [tokens, in]
            rows, keep = rows.unsqueeze(1), None if keep is None else keep.unsqueeze(1)
        elif places.dim() == 0:  # all rows go to one matrix
            rows, keep = rows.flatten(0, -2), None if keep is None else keep.flatten()
            rows, keep = rows.unsqueeze(0), None if keep is None else keep.unsqueeze(0)
        else:  # rows [*places, tokens, in], or broadcast to that
            last = rows.shape[-2:]
            rows = rows.expand(*places.shape, *last).flatten(0, -3)
            if keep is not None:
                keep = keep.expand(*places.shape, last[0]).flatten(0, -2)
        split = list(route.split(places))
        for (place, index), counted in zip(split, _counted(keep, split), strict=True):
            if place in self.grams:
                own = rows[index.to(rows.device)].reshape(-1, rows.shape[-1])
                yield CapturedInput(self.grams[place], own, counted)

    def _keep(
        self, rows: torch.Tensor, env: Mapping[fx.Node, Any], batch: TracedBatch
    ) -> torch.Tensor | None:
        """Which rows count, bool ``[..., tokens]``; None: all of them."""
        if self.mask is None:
            return None
        keep = self.mask.keep(batch, rows.device, env)
        if keep is not None:
            every, single = rows.shape[:-1], rows.shape[self.call.rows.stacked : -1]
            if keep.numel() in (every.numel(), single.numel()):  # of the stack, or of one matrix
                shape = every if keep.numel() == every.numel() else single
                return keep.reshape(shape).expand(every)
        if self.mask.misses_padding(batch, rows[..., 0].numel()):
            for shared in (gram for grams in self.grams.values() for gram in grams):
                shared.padding_counted = True
        return None

    def _of_matrix(
        self,
        grams: list[SharedGram],
        rows: torch.Tensor,
        keep: torch.Tensor | None,
        batch: TracedBatch,
    ) -> CapturedInput:
        """The tokens that one matrix is multiplied with; ``call.batch`` is its index in a stack."""
        for axis, index in enumerate(reversed(self.call.batch)):  # from the innermost dimension
            dim = rows.dim() - 3 - axis
            if index >= 0 and dim >= 0:
                place = min(index, rows.shape[dim] - 1)  # a size of 1 is broadcast over the stack
                rows = rows.narrow(dim, place, 1)
                keep = None if keep is None else keep.narrow(dim, place, 1)
        tokens = rows.reshape(-1, rows.shape[-1])
        # An expert that runs on all tokens gets zeros in place of those of other experts.
        if self.call.stacked:
            own = tokens.any(-1)
            return CapturedInput(
                grams, tokens, rows_that_count(own if keep is None else keep.reshape(-1) & own)
            )
        if keep is None or self.mask is None:
            return CapturedInput(grams, tokens, None)
        return CapturedInput(grams, tokens, self.mask.rows(batch, keep))


def place_captures(
    trace: Trace,
    calls: Iterable[Call],
    grams: Sequence[SharedGram],
    masks: Mapping[Call, TokenMask],
) -> dict[fx.Node, list[InputCapture]]:
    """The captures to make before each node of a graph: one for each distinct activation.

    Args:
        trace: the graph.
        calls: the calls of sites in this graph.
        grams: the grams of all sites. The nodes of the calls are added to their ``pending``.
        masks: the masks of the calls that have one.
    """
    gram_of = {id(call): gram for gram in grams for s in gram.sites for call in s.calls}
    # All sites of a gram read an activation equally often, so only the first site's calls count.
    counted = {id(call) for gram in grams for call in gram.sites[0].calls}
    order = {node: at for at, node in enumerate(trace.graph_module.graph.nodes)}
    placed: dict[fx.Node, list[InputCapture]] = defaultdict(list)
    captures: dict[tuple[object, ...], InputCapture] = {}
    for call in sorted(calls, key=lambda call: order[call.node]):
        if call.activation not in captures:
            captures[call.activation] = capture = InputCapture(call, masks.get(call))
            placed[call.node].append(capture)
        gram = gram_of[id(call)]
        gram.pending.add(call.node)
        if id(call) in counted:
            captures[call.activation].add(call, gram)
    return dict(placed)


def _counted(
    keep: torch.Tensor | None, split: list[tuple[int, torch.Tensor]]
) -> list[torch.Tensor | None]:
    """For each matrix of ``split``: the indices of its tokens that count; None: all of them.

    Args:
        keep: bool ``[rows, tokens]``: whether each token of each row counts.
        split: the matrices, each with the indices of the rows that are sent to it.
    """
    if keep is None or not split:
        return [None] * len(split)
    kept = keep[torch.cat([index for _, index in split]).to(keep.device)]  # in the matrices' order
    counts = [0, *kept.flatten(1).sum(1).cumsum(0).tolist()]  # one sync for all matrices
    places, tokens = kept.flatten().nonzero().squeeze(1), kept.shape[1:].numel()
    result: list[torch.Tensor | None] = []
    start = 0
    for _, index in split:
        end = start + len(index)
        first, last = counts[start], counts[end]
        every = last - first == len(index) * tokens
        result.append(None if every else places[first:last] - start * tokens)
        start = end
    return result


def _place(call: Call) -> int:
    """The position of the matrix in its stack, 0 in a stack of one; -1 without a route."""
    return -1 if call.route is None else max(call.batch[-1], 0)
