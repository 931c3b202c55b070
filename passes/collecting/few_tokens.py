"""Experts that got few tokens: their grams are filled up with the mean gram of their stack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from magr_fx.passes.collecting.shared_gram import SharedGram


def fill_up(finished: Sequence[SharedGram]) -> None:
    """Add the pooled gram to the grams of experts with fewer tokens than inputs, in place.

    With n tokens for d inputs, n < d, the gram G of an expert is singular: its rank is at most n.
    It becomes G + (d - n)·P. P is the sum of the grams of all experts of the stack that are in
    ``finished``, divided by their number of tokens. So G is as if d - n average tokens had been
    sent to the expert too. An expert without any token gets no gram, and its weight stays.
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
