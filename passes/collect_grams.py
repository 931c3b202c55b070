"""Run the traced graphs on the calibration, block by block, and sum each site's gram.

Inputs are shared: q, k and v read one activation, gate and up another. Each distinct activation is
taken once, where the first matmul is about to read it, and goes into one gram for all its sites.

With ``propagate`` the model is run twice side by side: as it was, and with every weight quantized
that has been solved so far. A block then ends before each matmul whose input is taken, so that what
is taken there already passed through the quantized weights before it; the difference between the
two runs is taken as well.
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
from torch.nn import functional
from tqdm import tqdm

from magr_fx.errors import CalibrationError
from magr_fx.memory import high_water_mark, is_out_of_memory
from magr_fx.passes.blocks import Block, cut_into_blocks, in_step
from magr_fx.passes.boundary import Environment, boundary, restore
from magr_fx.passes.decisions import (
    Decisions,
    is_decision,
    is_random,
    random_state,
    torch_state,
)
from magr_fx.passes.find_linears import Site
from magr_fx.passes.inline import autocast_of
from magr_fx.passes.mask_inputs import MaskInputs
from magr_fx.passes.padding import token_masks
from magr_fx.passes.ranks import ALONE, Ranks
from magr_fx.passes.resident import Resident, all_resident, read_by
from magr_fx.passes.shared_gram import SharedGram, add_up
from magr_fx.passes.spill import Spill
from magr_fx.passes.taps import Taken, Tap
from magr_fx.passes.trace import (
    Trace,
    TracedBatch,
    attribute,
    attributes,
    buffers_kept,
    is_mutation,
    written_in_place,
)
from magr_fx.passes.unsupported_weights import blame, is_plain
from magr_fx.passes.vmap import vmap_depth
from magr_fx.passes.weight_uses import Call
from magr_fx.passes.weight_views import VIEWS, WeightView

Take = Callable[[Taken], None]
Weights = Mapping[WeightView, torch.Tensor]  # what to read in the place of parameters


class CalibrationRun:
    """The calibration batches on their way through the traced graphs.

    Args:
        batches: what to run, each with its trace.
        sites: whose activations to take.
        propagate: take what the model computes with the weights that :meth:`replace` was given,
            and by how much that misses what it computed originally.
        holdout: the share of each activation's tokens, its last ones, that is kept aside.
        resident: has those weights in memory that a block reads.
        ranks: who shares the batches. Each knows all traces, so that all come to the same steps,
            and runs its own batches; the grams that are yielded are everybody's.
        spill: a directory to keep the values between blocks in; None keeps them in memory.
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
        self._resident, self._ranks = resident, ranks
        traced = dict.fromkeys(batch.trace for batch in batches)
        stored = [tensor for trace in traced for tensor in attributes(trace.graph_module)]
        given = (v for batch in self.batches for v in batch.values if isinstance(v, torch.Tensor))
        self._devices = {tensor.device for tensor in chain(stored, given)}
        cpu = torch.device("cpu")  # the device whose memory is shown, if it is the only one
        self._shown = next((device for device in self._devices if device != cpu), cpu)
        self._spill = None if spill is None else Spill(spill, stored)
        self.propagate, self.holdout = propagate, holdout
        self.grams = _share(sites)
        self.working_on = ("", 0, 0)  # the layer, and which block of how many
        self._taps: dict[fx.Node, list[Tap]] = defaultdict(list)
        self._blocks: dict[Trace, list[Block]] = {}
        self._runners: dict[Trace, fx.Interpreter] = {}
        self._stored: dict[fx.Node, WeightView] = {}
        self._views: dict[nn.Parameter, WeightView] = {}  # as they are before they are resident
        self._taken_of: dict[fx.Node, set[WeightView]] = {}
        self._views_of_weights: set[fx.Node] = set()
        self._replaced: dict[WeightView, torch.Tensor] = {}
        self._seen: dict[SharedGram, int] = dict.fromkeys(self.grams, 0)
        self._masks = MaskInputs(batches)
        for trace in dict.fromkeys(batch.trace for batch in batches):
            calls = [call for site in sites for call in site.calls if call.trace is trace]
            self._place_taps(trace, calls)
            self._blocks[trace] = cut_into_blocks(
                trace,
                calls,
                before=self._marks() if propagate else {},
                reads={
                    node: [n for t in taps for n in t.reads] for node, taps in self._taps.items()
                },
            )
            self._views_of_weights |= _views_of_weights(trace)
            if propagate:
                self._find_weights(trace)
            self._runners[trace] = _Runner(trace)

    def check(self, *, progress: bool | None = None) -> None:
        """Run every batch once and look at every activation, before anything is changed.

        Raises:
            CalibrationError: a counted token of an activation is NaN or Inf; the message names
                the site and the batch.
        """
        stream = [self._start(batch) for batch in self.batches]
        steps = list(in_step(self._blocks.values()))
        with buffers_kept(self._blocks):
            bar = tqdm(steps, "checking", unit="block", disable=_disable(progress))
            for number, step in enumerate(bar):
                seen: list[tuple[str, int]] = []
                finite: list[torch.Tensor] = []  # read together: one sync per step
                with self._resident(read_by(step), ahead=_read_after(steps, number)):
                    for block, batch, (environment,) in self._runs(step, [stream]):
                        look = partial(self._look, batch, seen, finite)
                        self._run(block, batch, environment, look)
                flags = (
                    torch.stack([f.to(finite[0].device) for f in finite]).tolist() if finite else []
                )
                if not all(flags):
                    name, index = seen[flags.index(False)]
                    raise CalibrationError(
                        f"the input of {name} holds NaN or Inf in calibration batch {index}; "
                        "nothing was changed. Look for overflow (float16?) or broken values "
                        "before that layer, or leave the batch out"
                    )
                self._ranks.meet()  # where one found something all stop

    def unfed(self) -> list[Site]:
        """After :meth:`check`: the sites that no counted token reaches, on any rank."""
        seen = torch.tensor([self._seen[shared] for shared in self.grams], device="cpu")
        self._ranks.sum(seen)
        pairs = zip(self.grams, seen.tolist(), strict=True)
        return [site for shared, tokens in pairs if not tokens for site in shared.sites]

    @property
    def notes(self) -> list[str]:
        """What the report should say of the inputs: those that may be masks, and are not read."""
        return self._masks.notes

    def collect(
        self,
        *,
        after: tuple[int, Any] | None = None,
        save: Callable[[int, Callable[[], Any], bool], None] | None = None,
        progress: bool | None = None,
    ) -> Generator[list[SharedGram], None, None]:
        """Sum the grams block by block; yields those whose last activation a block had, together.

        One block's grams and one boundary (the values that later blocks read) per batch are
        alive at a time. The caller may rewrite the yielded sites' weights at once: every call
        that reads them has run.

        Args:
            after: a step's number and its boundary, to go on after.
            save: is called after each step with its number, with what makes its boundary, and
                with whether it was the last.
            progress: whether to show a bar.
        """
        streams = [
            [self._start(batch) for batch in self.batches] for _ in range(1 + self.propagate)
        ]
        steps = list(in_step(self._blocks.values()))
        waiting = list(self.grams)
        buffers = written_in_place(self._blocks)
        other = [buffer.detach().clone() for buffer in buffers]  # of the quantized run
        stored = [t for trace in self._blocks for t in attributes(trace.graph_module)]
        with buffers_kept(self._blocks):
            if after is not None:
                graphs = [batch.trace.graph_module.graph for batch in self.batches]
                changed = [*buffers, *other]
                away = self._spill is not None
                restore(after[1], streams, graphs, self.grams, changed, stored, away=away)
                after = (after[0], None)  # the streams have it now, and let go of it
            bar = tqdm(steps, "magr", unit="block", disable=_disable(progress))
            for number, step in enumerate(bar):
                visited = {node for block in step for node in block.nodes}
                for shared in waiting:
                    shared.pending -= visited
                finished = [shared for shared in waiting if not shared.pending]
                waiting = [shared for shared in waiting if shared.pending]
                if after is not None and number <= after[0]:
                    continue
                self.working_on = (step[0].label[0], number + 1, len(steps))
                parameters = [site.parameter for shared in finished for site in shared.sites]
                reads = [*read_by(step), *parameters]
                with self._resident(reads, ahead=_read_after(steps, number)):
                    runs = self._runs(step, streams)
                    decisions = [Decisions() for _ in runs]
                    for (block, batch, environments), decided in zip(runs, decisions, strict=True):
                        if not self.propagate:
                            self._run(block, batch, environments[0], self._add)
                            continue
                        self._take_both(block, batch, *environments)
                        # The original run goes ahead while the weights are what they were.
                        self._run(block, batch, environments[1], None, record=decided)
                    if finished:
                        add_up(finished, self._ranks)
                        yield finished
                    for shared in finished:
                        shared.let_go()
                    if self.propagate:
                        _swap(buffers, other)
                        for (block, batch, envs), decided in zip(runs, decisions, strict=True):
                            self._run(block, batch, envs[0], None, self._replaced, follow=decided)
                        _swap(buffers, other)
                        self._replaced.clear()  # everything that reads them has run
                if save is not None:
                    written = [*buffers, *other]
                    state = partial(boundary, streams, self.grams, written, stored, self._devices)
                    save(number, state, number + 1 == len(steps))
                bar.set_postfix_str(f"peak {high_water_mark(self._shown):.0f} MiB", refresh=False)

    def replace(self, parameter: nn.Parameter, quantized: torch.Tensor) -> None:
        """Go on with ``quantized`` in the place of a parameter whose sites were just yielded."""
        self._replaced[self._views[parameter]] = quantized

    def replacement(self, parameter: nn.Parameter) -> torch.Tensor:
        """What is in the parameter's place, or else itself."""
        return self._replaced.get(self._views[parameter], parameter)

    def _runs(
        self, step: list[Block], streams: list[list[Environment]]
    ) -> list[tuple[Block, TracedBatch, list[Environment]]]:
        """What a step runs: each of its blocks on each batch of its trace, with their values."""
        return [
            (block, batch, environments)
            for block in step
            for batch, *environments in zip(self.batches, *streams, strict=True)
            if batch.trace is block.trace
        ]

    def _marks(self) -> dict[fx.Node, Hashable]:
        """For each matmul before which something is taken, what it is taken for, in all traces."""
        place = {id(shared): at for at, shared in enumerate(self.grams)}
        return {
            node: tuple(
                place[id(shared)]
                for tap in taps
                for grams in tap.grams.values()
                for shared in grams
            )
            for node, taps in self._taps.items()
        }

    def _find_weights(self, trace: Trace) -> None:
        """Which nodes read a weight that may be replaced, or are made of such weights alone."""
        for node in trace.graph_module.graph.nodes:
            stored, taken_of = attribute(trace, node), set[WeightView]()
            if isinstance(stored, nn.Parameter) and is_plain(stored) and stored.dim() >= 2:
                self._stored[node] = self._views[stored] = WeightView.of(stored)
                taken_of = {self._stored[node]}
            elif not is_mutation(node) and all(map(self._is_weight_or_size, node.all_input_nodes)):
                taken_of = set().union(
                    *(self._taken_of.get(source, set()) for source in node.all_input_nodes)
                )
            if taken_of:
                self._taken_of[node] = taken_of

    def _is_weight_or_size(self, node: fx.Node) -> bool:
        return node in self._taken_of or isinstance(node.meta.get("val"), (int, torch.SymInt))

    def _place_taps(self, trace: Trace, calls: list[Call]) -> None:
        gram_of = {id(call): gram for gram in self.grams for s in gram.sites for call in s.calls}
        # Sites of one gram read the same as often: the calls of one of them tell how often.
        counted = {id(call) for gram in self.grams for call in gram.sites[0].calls}
        masks = token_masks(trace, calls, self._masks)
        order = {node: at for at, node in enumerate(trace.graph_module.graph.nodes)}
        taps: dict[tuple[object, ...], Tap] = {}
        for call in sorted(calls, key=lambda call: order[call.node]):
            if call.activation not in taps:
                taps[call.activation] = tap = Tap(call, masks.get(call))
                self._taps[call.node].append(tap)
            gram = gram_of[id(call)]
            gram.pending.add(call.node)
            if id(call) in counted:
                taps[call.activation].add(call, gram)

    def _start(self, batch: TracedBatch) -> Environment:
        graph = batch.trace.graph_module.graph
        values = batch.values
        if any(is_mutation(node) for node in graph.nodes):
            # The model may work in place on its inputs, which are the caller's tensors.
            values = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in values)
        return dict(zip(graph.find_nodes(op="placeholder"), values, strict=True))

    def _take_both(
        self, block: Block, batch: TracedBatch, env: Environment, original: Environment
    ) -> None:
        """Take the activations that the block's first matmuls are about to read, of both runs."""
        self._fetch(env)
        self._fetch(original)
        for node in block.nodes:
            for tap in self._taps.get(node, ()):
                for source in tap.reads:
                    if source not in env:  # a stored tensor, which a block reads as it starts
                        runner = self._runners[block.trace]
                        env[source] = original[source] = self._stored_value(source, runner, {})
                # Both send each token the same way: the quantized run follows the decisions.
                both = zip(tap.take(env, batch), tap.take(original, batch), strict=True)
                for taken, was in both:
                    for shared in taken.grams:
                        shared.add(
                            taken.tokens, taken.counted, original=was.tokens, holdout=self.holdout
                        )
        self._keep(env)  # its turn comes when all batches have been taken

    def _look(
        self,
        batch: TracedBatch,
        seen: list[tuple[str, int]],
        finite: list[torch.Tensor],
        taken: Taken,
    ) -> None:
        # One pass: a sum is finite only if all that it sums is.
        good = taken.tokens.sum(-1, dtype=torch.float32).isfinite()
        seen.append((taken.grams[0].sites[0].name, batch.index))
        counted = good if taken.counted is None else good[taken.counted]
        finite.append(counted.all())
        for shared in taken.grams:
            self._seen[shared] += len(counted)

    def _take(self, node: fx.Node, batch: TracedBatch, env: Environment, take: Take) -> None:
        for tap in self._taps.get(node, ()):
            for taken in tap.take(env, batch):
                take(taken)

    def _add(self, taken: Taken) -> None:
        for shared in taken.grams:
            shared.add(taken.tokens, taken.counted, holdout=self.holdout)

    def _run(
        self,
        block: Block,
        batch: TracedBatch,
        env: Environment,
        take: Take | None,
        replaced: Weights = MappingProxyType({}),
        *,
        record: Decisions | None = None,
        follow: Decisions | None = None,
    ) -> None:
        """Run one block of one batch; ``env`` is left with what later blocks read.

        ``record`` keeps what the run decides, for another run of the same block to ``follow``.
        """
        runner = self._runners[block.trace]
        self._fetch(env)
        for node in [
            node for node in env if not self._taken_of.get(node, set()).isdisjoint(replaced)
        ]:
            env[node] = self._anew(node, env, runner, replaced)
        for node in self._views_read(block):
            env[node] = self._stored_value(node, runner, replaced)
        runner.env = env
        for node in block.nodes:
            if take is not None:
                self._take(node, batch, env, take)
            stored = self._stored.get(node)
            if stored is not None and stored in replaced:
                env[node] = replaced[stored]
            elif follow is not None and node in follow.values:
                env[node] = follow.values[node]
            elif node in block.run:
                state = None if follow is None else follow.random.get(node)
                with random_state(state):
                    if record is not None and is_random(node):
                        record.random[node] = torch_state(self._devices)
                    env[node] = _run_node(runner, node, batch, quantized=follow is not None)
                if record is not None and is_decision(env[node]) and not vmap_depth(node):
                    record.values[node] = env[node]
            for dead in block.dead_after.get(node, ()):
                # Sizes cost nothing, and a weight's view may have to be taken anew with them.
                if not (self.propagate and isinstance(env.get(dead), int)):
                    env.pop(dead, None)
        self._keep(env)

    def _fetch(self, env: Environment) -> None:
        if self._spill is not None:
            self._spill.fetch(env)

    def _keep(self, env: Environment) -> None:
        # Views as well: they would hold the memory of weights that are somewhere else by then.
        for node in [n for n in env if n.op == "get_attr" or n in self._views_of_weights]:
            del env[node]
        if self._spill is not None:
            self._spill.keep(env)

    def _views_read(self, block: Block) -> list[fx.Node]:
        """The views of weights that a block reads and an earlier one has taken."""
        taken = self._views_of_weights.difference(block.nodes)
        reads = (v for n in block.nodes for v in (*n.all_input_nodes, *self._looked_at(n)))
        return [value for value in dict.fromkeys(reads) if value in taken]

    def _looked_at(self, node: fx.Node) -> list[fx.Node]:
        return [value for tap in self._taps.get(node, ()) for value in tap.reads]

    def _stored_value(self, node: fx.Node, runner: fx.Interpreter, replaced: Weights) -> Any:
        """What a node reads of the model, or its view of that."""
        stored = self._stored.get(node)
        if stored is not None and stored in replaced:
            return replaced[stored]
        runner.env = {n: self._stored_value(n, runner, replaced) for n in node.all_input_nodes}
        return runner.run_node(node)

    def _anew(
        self, node: fx.Node, env: Environment, runner: fx.Interpreter, replaced: Weights
    ) -> Any:
        """What was taken of weights in an earlier block, a view or a cast, now of the replaced."""
        if node in self._stored and self._stored[node] in replaced:
            return replaced[self._stored[node]]
        if node.op != "get_attr" and node not in self._taken_of:
            return env[node]  # a size
        sources = {s: self._anew(s, env, runner, replaced) for s in node.all_input_nodes}
        runner.env = sources
        return runner.run_node(node)


class _Runner(fx.Interpreter):
    """Runs nodes of a traced graph, also with torchao's tensors in the place of weights."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.graph_module, garbage_collect_values=False)
        self._pure = not any(map(is_mutation, trace.graph_module.graph.nodes))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.linear.default:
            target = functional.linear  # torchao's tensors run in this, not in the op it calls
        elif target is torch.ops.aten.view.default and self._pure:
            # On another device than it was traced on, what it views may have other strides; a copy
            # is as good, where nothing is written to.
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def _run_node(
    runner: fx.Interpreter, node: fx.Node, batch: TracedBatch, *, quantized: bool = False
) -> Any:
    """The node's value; what it raises names the layer and the batch."""
    try:
        with autocast_of(node):
            return runner.run_node(node)
    except Exception as error:  # whatever an op raises on real values
        if is_out_of_memory(error):
            raise
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        where = (stack[-1][0] if stack else "") or "the model"
        remedy = "Check that the model itself runs on this batch"
        if quantized:
            remedy = (
                "The weights before it were quantized by the target; calibrate with "
                "propagate=False, or choose another target"
            )
        read = ((str(n.target), attribute(batch.trace, n)) for n in node.all_input_nodes)
        remedy = blame((name, t) for name, t in read if isinstance(t, nn.Parameter)) or remedy
        raise CalibrationError(
            f"calibration batch {batch.index} fails in {where}, at {node.target}: "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error


def _share(sites: list[Site]) -> list[SharedGram]:
    """One gram for all sites that read exactly the same activations and are solved alike."""
    shared: dict[Any, SharedGram] = {}
    for site in sites:
        weight = site.parameter
        reads = Counter(call.input_key for call in site.calls)  # one activation may be read twice
        key = (frozenset(reads.items()), weight.dtype, weight.device)
        shared.setdefault(key, SharedGram([])).sites.append(site)
    return list(shared.values())


def _views_of_weights(trace: Trace) -> set[fx.Node]:
    """The nodes that are views of a stored tensor and depend on nothing else."""
    found: set[fx.Node] = set()
    for node in trace.graph_module.graph.nodes:
        sources = node.all_input_nodes
        if node.target not in VIEWS or len(sources) != 1:
            continue
        if sources[0] in found or isinstance(attribute(trace, sources[0]), nn.Parameter):
            found.add(node)
    return found


def _read_after(steps: list[list[Block]], number: int) -> list[torch.Tensor]:
    """The stored tensors that the step after one reads; after the last one there are none."""
    return read_by(steps[number + 1]) if number + 1 < len(steps) else []


@torch.no_grad()
def _swap(buffers: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Exchange their values: each of the two runs has its own."""
    for buffer, values in zip(buffers, other, strict=True):
        kept = buffer.detach().clone()
        buffer.copy_(values)
        values.copy_(kept)


def _disable(progress: bool | None) -> bool | None:
    """tqdm's ``disable``: None shows the bar on a terminal only."""
    return None if progress is None else not progress
