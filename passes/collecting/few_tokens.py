"""Experts that few tokens were sent to: their grams are filled up with what the others saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from magr_fx.passes.collecting.shared_gram import SharedGram


def fill_up(finished: Sequence[SharedGram]) -> None:
    """Shrink the grams of experts with fewer tokens than inputs toward the pooled one, in place.

    With n tokens for d inputs, n < d, the gram says nothing of at least d - n directions. It
    becomes G + (d - n)·P, where P is the mean over the tokens of all experts of the same stack
    (which became complete together with it): as if d - n average tokens had been sent there too.
    An expert without any token keeps none, and so its weight.
    """
    stacks: dict[int, list[SharedGram]] = defaultdict(list)
    for shared in finished:
        site = shared.sites[0]
        if shared.gram is not None and all(call.stacked for call in site.calls):
            stacks[id(site.parameter)].append(shared)
    for experts in stacks.values():
        counts = ((shared, int(shared.tokens)) for shared in experts)
        tokens = {shared: count for shared, count in counts if count}
        inputs = experts[0].sites[0].shape[1]
        few = [shared for shared in tokens if tokens[shared] < inputs]
        if not few or len(tokens) == 1:
            continue
        mean = sum(s.collected for s in tokens) / sum(tokens.values())
        for shared in few:
            shared.collected.add_(mean, alpha=inputs - tokens[shared])
            shared.note = (
                f"{tokens[shared]} tokens for {inputs} inputs: filled up with the mean of its "
                f"{len(tokens)} experts"
            )
