"""Run the traced graphs on the calibration, block by block, and sum each site's gram.

Sites share inputs: q, k and v read one activation, gate and up another. Each distinct activation is
captured once, just before the first matmul that reads it, and added to one gram for all its sites.

With ``propagate`` the model is run twice side by side: the original model, and the model with all
weights quantized that have been solved so far. A block then ends before each matmul whose input is
captured, so that this input was computed with the quantized weights before it. The input error,
the difference between the two runs, is collected as well.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Hashable, Mapping
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from magr_fx.machine.memory import high_water_mark
from magr_fx.machine.ranks import ALONE, Ranks
from magr_fx.passes.collecting.blocks import Block, cut_into_blocks, in_step, read_by
from magr_fx.passes.collecting.boundary import Environment
from magr_fx.passes.collecting.input_capture import (
    CapturedInput,
    FiniteInputs,
    InputCapture,
    place_captures,
)
from magr_fx.passes.collecting.runner import Runner, run_node
from magr_fx.passes.collecting.shared_gram import SharedGram, add_up
from magr_fx.passes.collecting.spill import Spill
from magr_fx.passes.collecting.streams import Streams
from magr_fx.passes.collecting.weight_nodes import Replaced, WeightNodes
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.finding.mask_inputs import MaskInputs
from magr_fx.passes.finding.padding import token_masks
from magr_fx.passes.finding.weight_uses import Call
from magr_fx.passes.graphs.decisions import (
    Decisions,
    is_decision,
    is_random,
    random_state,
    torch_state,
)
from magr_fx.passes.graphs.trace import (
    Trace,
    TracedBatch,
    attributes,
    buffers_kept,
)
from magr_fx.passes.graphs.vmap import vmap_depth
from magr_fx.passes.offloading.resident import Resident, all_resident

Take = Callable[[CapturedInput], None]
Replacements = Mapping[nn.Parameter, torch.Tensor]  # quantized tensors, by their parameters


class CalibrationRun:
    """Runs the calibration batches through the traced graphs.

    Args:
        batches: the batches, each with its trace.
        sites: the sites whose activations are captured.
        propagate: also run the quantized model, see :meth:`collect`. Its activations go into the
            grams, and their difference from the original model's into ``drift``.
        holdout: the share of each activation's tokens, its last ones, that is held out.
        resident: loads the weights that a block reads.
        ranks: the ranks that share the batches. Each knows all traces, so that all have the same
            steps, and runs its own batches. The grams that are yielded are sums over all ranks.
        spill: a directory for the values between blocks; None keeps them in memory.
    """

    def __init__(
        self,
        batches: list[TracedBatch],
        sites: list[Site],
        *,
        propagate: bool = False,
        holdout: float = 0.0,
        resident: Resident = all_resident,
        ranks: Ranks = ALONE,
        spill: str | os.PathLike[str] | None = None,
    ) -> None:
        self.batches = [batch for batch in batches if ranks.owns(batch.index)]
        self.propagate, self.holdout = propagate, holdout
        self.grams = _share(sites)
        self.working_on = ("", 0, 0)  # the layer, and which block of how many
        self._resident, self._ranks = resident, ranks
        self._traces = list(dict.fromkeys(batch.trace for batch in batches))
        stored = [tensor for trace in self._traces for tensor in attributes(trace.graph_module)]
        given = (v for batch in self.batches for v in batch.values if isinstance(v, torch.Tensor))
        self._devices = {tensor.device for tensor in chain(stored, given)}
        self._spill = None if spill is None else Spill(spill, stored)
        self._masks = MaskInputs(batches)
        self._inputs = FiniteInputs()
        self._captures: dict[fx.Node, list[InputCapture]] = {}
        calls: dict[Trace, list[Call]] = defaultdict(list)
        for call in (call for site in sites for call in site.calls):
            calls[call.trace].append(call)
        for trace in self._traces:
            masks = token_masks(trace, calls[trace], self._masks)
            self._captures |= place_captures(trace, calls[trace], self.grams, masks)
        self._blocks = self._cut(calls)
        self._weights = WeightNodes(self._traces, replaceable=propagate)
        self._runners = {trace: Runner(trace) for trace in self._traces}

    def steps(self) -> list[list[Block]]:
        """The steps in running order, each with the blocks of all traces that belong to it."""
        return list(in_step(self._blocks.values()))

    def _cut(self, calls: Mapping[Trace, list[Call]]) -> dict[Trace, list[Block]]:
        """The blocks of each trace; with ``propagate`` a block also ends before each capture."""
        reads = {
            node: [n for capture in captures for n in capture.reads]
            for node, captures in self._captures.items()
        }
        before = self._marks() if self.propagate else {}
        return {
            trace: cut_into_blocks(trace, calls[trace], before=before, reads=reads)
            for trace in self._traces
        }

    def check(self, *, progress: bool | None = None) -> None:
        """Run every batch once and check every activation, before any weight is changed.

        Raises:
            CalibrationError: a counted token of an activation is NaN or Inf; the message names
                the site and the batch.
        """
        streams = Streams(self.batches, self._traces, 1)
        steps = self.steps()
        with buffers_kept(self._blocks):
            bar = tqdm(steps, "checking", unit="block", disable=_disable(progress))
            for number, step in enumerate(bar):
                with self._resident(read_by(step), ahead=_read_after(steps, number)):
                    for block, batch, (environment,) in self._runs(step, streams):
                        look = partial(self._inputs.look, batch=batch.index)
                        self._run(block, batch, environment, look)
                self._inputs.refuse()
                self._ranks.meet()  # if one rank raises, all ranks stop

    def unfed(self) -> list[Site]:
        """The sites that no counted token reaches, on any rank.

        After :meth:`check`, or :meth:`collect` with ``check``.
        """
        seen = torch.tensor([self._inputs.tokens[shared] for shared in self.grams], device="cpu")
        self._ranks.sum(seen)
        pairs = zip(self.grams, seen.tolist(), strict=True)
        return [site for shared, tokens in pairs if not tokens for site in shared.sites]

    @property
    def notes(self) -> list[str]:
        """Remarks for the report: inputs that may be masks but are not used as masks."""
        return self._masks.notes

    def collect(
        self,
        *,
        after: tuple[int, Any] | None = None,
        save: Callable[[int, Callable[[], Any], bool], None] | None = None,
        check: bool = False,
        progress: bool | None = None,
    ) -> Generator[list[SharedGram], Replacements | None, None]:
        """Sum the grams step by step, and yield those that a step completes.

        Only one block's grams, and per batch one boundary (the values that later blocks read), are
        in memory at a time. The caller may rewrite the yielded sites' weights at once, because
        every call that reads them has run. With ``propagate`` the caller sends back a replacement
        for their parameters, for instance a torchao tensor, and the quantized run goes on with it.

        Args:
            after: the number and the boundary of the step after which to resume; None starts anew.
            save: called after each step with its number, a function that returns its boundary, and
                whether it was the last.
            check: whether to check the original model's activations on the way, instead of by
                :meth:`check` before it. Then nothing should be written before the end.
            progress: whether to show a bar; None shows it on a terminal only.

        Raises:
            CalibrationError: with ``check``, as :meth:`check` does.
        """
        streams = Streams(self.batches, self._traces, 1 + self.propagate)
        steps, waiting, done = self.steps(), list(self.grams), -1
        cpu = torch.device("cpu")  # its memory is shown only if there is no other device
        shown = next((device for device in self._devices if device != cpu), cpu)
        with buffers_kept(self._blocks):
            if after is not None:
                done, state = after
                streams.restore(state, self.grams, keep_spilled=self._spill is not None)
                after = state = None  # the streams hold it now, and free it as they go on
            bar = tqdm(steps, "magr", unit="block", disable=_disable(progress))
            for number, step in enumerate(bar):
                finished, waiting = _finished(step, waiting)
                if number <= done:
                    continue
                self.working_on = (step[0].label[0], number + 1, len(steps))
                parameters = [site.parameter for shared in finished for site in shared.sites]
                reads = [*read_by(step), *parameters]
                with self._resident(reads, ahead=_read_after(steps, number)):
                    decisions = self._run_originals(step, streams, check=check)
                    replaced: Replaced = {}
                    if finished:
                        add_up(finished, self._ranks)
                        replacements = yield finished
                        if self.propagate and replacements:
                            replaced = self._weights.by_view(replacements)
                        replacements = None  # frees the quantized tensors after the step
                    for shared in finished:
                        shared.free_matrices()
                    if self.propagate:
                        self._run_quantized(step, streams, decisions, replaced)
                    del replaced  # every node that reads them has run
                if save is not None:
                    state_now = streams.state(self.grams, self._devices)
                    save(number, state_now, number + 1 == len(steps))
                bar.set_postfix_str(f"peak {high_water_mark(shown):.0f} MiB", refresh=False)

    def _run_originals(
        self, step: list[Block], streams: Streams, *, check: bool
    ) -> list[Decisions]:
        """Run the blocks of a step with the original weights, and capture the sites' inputs.

        With ``propagate`` the inputs of both runs are captured, and only the original model is run.
        Its decisions for each block and batch are returned.
        """
        decisions = []
        for block, batch, (env, *originals) in self._runs(step, streams):
            look = partial(self._inputs.look, batch=batch.index) if check else None
            if self.propagate:
                (original,) = originals
                self._take_both(block, batch, env, original, look)
                decisions.append(Decisions())
                self._run(block, batch, original, None, record=decisions[-1])
            else:
                self._run(block, batch, env, partial(self._add, look=look))
        self._inputs.refuse()
        return decisions

    def _run_quantized(
        self, step: list[Block], streams: Streams, decisions: list[Decisions], replaced: Replaced
    ) -> None:
        """Run the blocks of a step in the quantized run, with the replacements of weights."""
        streams.swap_buffers()
        for (block, batch, (env, _)), made in zip(
            self._runs(step, streams), decisions, strict=True
        ):
            self._run(block, batch, env, None, replaced, follow=made)
        streams.swap_buffers()

    def _runs(
        self, step: list[Block], streams: Streams
    ) -> list[tuple[Block, TracedBatch, list[Environment]]]:
        """Each block of a step with each batch of its trace, and the batch's values in each run."""
        return [
            (block, batch, environments)
            for block in step
            for batch, *environments in zip(self.batches, *streams.runs, strict=True)
            if batch.trace is block.trace
        ]

    def _marks(self) -> dict[fx.Node, Hashable]:
        """For each matmul with captures, the numbers of their grams, equal in all traces."""
        place = {id(shared): at for at, shared in enumerate(self.grams)}
        return {
            node: tuple(
                place[id(shared)]
                for capture in captures
                for grams in capture.grams.values()
                for shared in grams
            )
            for node, captures in self._captures.items()
        }

    def _take_both(
        self,
        block: Block,
        batch: TracedBatch,
        env: Environment,
        original: Environment,
        look: Take | None,
    ) -> None:
        """Capture, in both runs, the activations that the block's first matmuls read."""
        self._fetch(env)
        self._fetch(original)
        for node in block.nodes:
            for capture in self._captures.get(node, ()):
                for source in capture.reads:
                    if source not in env:  # a tensor of the model, which is not kept in env
                        runner = self._runners[block.trace]
                        env[source] = original[source] = self._weights.value(source, runner, {})
                # Both runs route each token alike: the quantized run follows the decisions.
                both = zip(capture.take(env, batch), capture.take(original, batch), strict=True)
                for captured, was in both:
                    if look is not None:
                        look(was)
                    for shared in captured.grams:
                        shared.add(
                            captured.tokens,
                            captured.counted,
                            original=was.tokens,
                            holdout=self.holdout,
                        )
        self._keep(env)  # the quantized run of this block starts after all batches are captured

    def _take(self, node: fx.Node, batch: TracedBatch, env: Environment, take: Take) -> None:
        for capture in self._captures.get(node, ()):
            for captured in capture.take(env, batch):
                take(captured)

    def _add(self, captured: CapturedInput, look: Take | None) -> None:
        if look is not None:
            look(captured)
        for shared in captured.grams:
            shared.add(captured.tokens, captured.counted, holdout=self.holdout)

    def _run(
        self,
        block: Block,
        batch: TracedBatch,
        env: Environment,
        take: Take | None,
        replaced: Replaced = MappingProxyType({}),
        *,
        record: Decisions | None = None,
        follow: Decisions | None = None,
    ) -> None:
        """Run one block on one batch; afterwards ``env`` has the values that later blocks read.

        ``record`` stores the decisions of this run, and ``follow`` takes those of another run.
        """
        runner = self._runners[block.trace]
        self._fetch(env)
        weights = self._weights
        for node in [node for node in env if weights.is_made_of(node, replaced)]:
            env[node] = weights.recompute(node, env, runner, replaced)
        for node in self._views_read(block):
            env[node] = weights.value(node, runner, replaced)
        runner.env = env
        for node in block.nodes:
            if take is not None:
                self._take(node, batch, env, take)
            instead = weights.replacement(node, replaced)
            if instead is not None:
                env[node] = instead
            elif follow is not None and node in follow.values:
                env[node] = follow.values[node]
            elif node in block.run:
                state = None if follow is None else follow.random.get(node)
                with random_state(state):
                    if record is not None and is_random(node):
                        record.random[node] = torch_state(self._devices)
                    env[node] = run_node(runner, node, batch, quantized=follow is not None)
                if record is not None and is_decision(env[node]) and not vmap_depth(node):
                    record.values[node] = env[node]
            for dead in block.dead_after.get(node, ()):
                # Sizes take no memory, and may be needed to recompute a view of a weight.
                if not (self.propagate and isinstance(env.get(dead), int)):
                    env.pop(dead, None)
        self._keep(env)

    def _fetch(self, env: Environment) -> None:
        if self._spill is not None:
            self._spill.fetch(env)

    def _keep(self, env: Environment) -> None:
        for node in [node for node in env if self._weights.is_recomputed(node)]:
            del env[node]
        if self._spill is not None:
            self._spill.keep(env)

    def _views_read(self, block: Block) -> list[fx.Node]:
        """The views of weights that a block reads but an earlier block computes."""
        reads = (v for n in block.nodes for v in (*n.all_input_nodes, *self._looked_at(n)))
        return self._weights.views_among(reads, but=set(block.nodes))

    def _looked_at(self, node: fx.Node) -> list[fx.Node]:
        return [value for capture in self._captures.get(node, ()) for value in capture.reads]


def _finished(
    step: list[Block], waiting: list[SharedGram]
) -> tuple[list[SharedGram], list[SharedGram]]:
    """The waiting grams that are complete after this step, and those that are not."""
    visited = {node for block in step for node in block.nodes}
    for shared in waiting:
        shared.pending -= visited
    return [s for s in waiting if not s.pending], [s for s in waiting if s.pending]


def _share(sites: list[Site]) -> list[SharedGram]:
    """One gram for all sites with the same activations, and the same weight dtype and device."""
    shared: dict[Any, SharedGram] = {}
    for site in sites:
        weight = site.parameter
        reads = Counter(call.input_key for call in site.calls)  # one activation may be read twice
        key = (frozenset(reads.items()), weight.dtype, weight.device)
        shared.setdefault(key, SharedGram([])).sites.append(site)
    return list(shared.values())


def _read_after(steps: list[list[Block]], number: int) -> list[torch.Tensor]:
    """The model's tensors that the step after ``number`` reads; none after the last step."""
    return read_by(steps[number + 1]) if number + 1 < len(steps) else []


def _disable(progress: bool | None) -> bool | None:
    """tqdm's ``disable``: None shows the bar on a terminal only."""
    return None if progress is None else not progress
