"""Grams against XᵀX of what the model itself computes, and the order in which they are made."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from graph_helpers import (
    Formula,
    analyse,
    architecture,
    assert_gram,
    collect,
    gram_of,
    hook_grams,
    weight,
)
from matmul_forms import FORMS, form_analysis
from tiny_models import ARCHITECTURES, activations, tiny_llama, token_ids
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from magr_fx.errors import CalibrationError
from magr_fx.grams.gram import add_to_gram
from magr_fx.passes.collecting import collect_grams, shared_gram
from magr_fx.passes.collecting.blocks import Block, cut_into_blocks
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.weight_uses import Call
from magr_fx.passes.graphs.trace import Trace, TracedBatch, calibration_mode

# ---- the grams are right


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.slow_unless("vit")
def test_architectures(name: str) -> None:
    analysis = architecture(name)
    expected, tokens = hook_grams(analysis.model, analysis.calib)
    collected = collect(analysis)
    assert set(collected) == {site.name for site in analysis.found.sites}
    for site, shared in collected.items():
        assert_gram(shared.gram, expected[site])
        assert shared.tokens == tokens[site]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_forms(name: str) -> None:
    form = FORMS[name]
    collected = collect(form_analysis(name))
    for site, shared in collected.items():
        rows = [form.sites[site].rows(x) for x in form.inputs]
        assert_gram(shared.gram, gram_of(*rows))
        assert shared.tokens == sum(x[..., 0].numel() for x in rows)


def test_half_precision_is_summed_in_float32() -> None:
    """Against float64 grams of the very same rounded activations."""
    model = tiny_llama(num_hidden_layers=1).bfloat16()
    calib = [token_ids(4, 60, seed=seed) for seed in range(4)]
    expected, tokens = hook_grams(model, calib)
    collected = collect(analyse(model, calib))
    assert len(collected) == 8
    for name, shared in collected.items():
        assert_gram(shared.gram, expected[name])
        assert shared.tokens == tokens[name] == 960


def test_double_precision() -> None:
    model = nn.Linear(8, 3).double()
    calib = [activations(2, 5, 8).double()]
    assert_gram(collect(analyse(model, calib))["weight"].gram, gram_of(*calib))


def test_more_rows_than_are_converted_at_once() -> None:
    calib = [activations(3, 6001, 4, seed=1), activations(2, 3, 4, seed=2)]
    shared = collect(analyse(nn.Linear(4, 3), calib))["weight"]
    assert_gram(shared.gram, gram_of(*calib))
    assert shared.tokens == 18009


def test_on_the_device_of_the_weight(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    calib = [activations(2, 5, 8), activations(3, 4, 8)]
    collected = collect(analyse(model, calib))
    with torch.no_grad():
        hidden = [model[:2](x.to(device)).cpu() for x in calib]
    for name, rows in {"0.weight": calib, "2.weight": hidden}.items():
        gram = collected[name].gram
        assert gram is not None
        assert gram.device.type == device.type
        assert_gram(gram.cpu(), gram_of(*rows))


def test_a_call_with_an_input_that_another_site_has_too() -> None:
    """a reads x and y, b only x: their grams differ, and each input is still taken once."""
    model = Formula(
        lambda m, x: m.a(x) + m.a(x.relu()) + m.b(x), a=nn.Linear(8, 3), b=nn.Linear(8, 3)
    )
    x = activations(2, 5, 8)
    collected = collect(analyse(model, [x]))
    assert_gram(collected["a.weight"].gram, gram_of(x, x.relu()))
    assert_gram(collected["b.weight"].gram, gram_of(x))
    assert (collected["a.weight"].tokens, collected["b.weight"].tokens) == (20, 10)


def test_weights_that_are_solved_apart_have_a_gram_each() -> None:
    model = Formula(
        lambda m, x: F.linear(x, m.a) + F.linear(x, m.b.float()),
        a=weight(3, 8),
        b=nn.Parameter(weight(3, 8).detach().bfloat16()),
    )
    analysis = analyse(model, [activations(2, 5, 8)])
    assert [[site.name for site in g.sites] for g in analysis.run().grams] == [["a"], ["b"]]


def test_a_site_that_only_some_batches_reach() -> None:
    def function(m: Formula, x: Tensor, deep: bool) -> Any:
        return m.b(m.a(x)) if deep else m.a(x)

    model = Formula(function, a=nn.Linear(8, 8), b=nn.Linear(8, 3))
    x, y = activations(2, 5, 8, seed=1), activations(3, 4, 8, seed=2)
    collected = collect(analyse(model, [(x, False), (y, True), (x, True)]))
    with torch.no_grad():
        assert_gram(collected["b.weight"].gram, gram_of(model.a(y), model.a(x)))
    assert_gram(collected["a.weight"].gram, gram_of(x, y, x))
    assert (collected["a.weight"].tokens, collected["b.weight"].tokens) == (32, 22)


def test_no_rows() -> None:
    with pytest.raises(CalibrationError, match="their inputs are empty"):
        analyse(nn.Linear(8, 3), [activations(0, 8)])
    some = collect(analyse(nn.Linear(8, 3), [activations(0, 8), activations(5, 8)]))["weight"]
    assert some.tokens == 5


# ---- block by block


def whole(trace: Trace, calls: list[Call], **options: Any) -> list[Block]:
    """All blocks as one."""
    blocks = cut_into_blocks(trace, calls)
    nodes = tuple(dict.fromkeys(node for block in blocks for node in block.nodes))
    run = frozenset().union(*(block.run for block in blocks))
    return [Block(trace, ("", 1), nodes, run, blocks[0].dead_after)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.slow_unless("vit")
def test_blocks_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = architecture(name)
    in_blocks = collect(analysis)
    monkeypatch.setattr(collect_grams, "cut_into_blocks", whole)
    at_once = collect(analysis)
    for site, shared in in_blocks.items():
        torch.testing.assert_close(shared.gram, at_once[site].gram, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_weight_may_be_rewritten_as_soon_as_its_gram_is_there(name: str) -> None:
    """Every later gram is still that of the model as it was given."""
    analysis = architecture(name)
    expected = collect(analysis)
    weights = [site.weight.clone() for site in analysis.found.sites]
    with calibration_mode(analysis.model):
        for shared in chain.from_iterable(analysis.run().collect(progress=False)):
            for site in shared.sites:
                torch.testing.assert_close(shared.gram, expected[site.name].gram, rtol=0, atol=0)
                site.weight.fill_(float("nan"))
    for site, saved in zip(analysis.found.sites, weights, strict=True):
        assert site.weight.isnan().all()
        site.weight.copy_(saved)  # the analysis is shared with other tests


def test_a_shared_layer_is_done_after_its_last_call() -> None:
    def function(m: Formula, x: Tensor) -> Any:
        for _ in range(2):
            for layer in m.layers:
                x = x + layer(x).relu()
        return x

    model = Formula(function, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(2)))
    calib = [activations(2, 5, 8, seed=1), activations(3, 4, 8, seed=2)]
    expected, tokens = hook_grams(model, calib)
    analysis = analyse(model, calib)
    with calibration_mode(model):
        for shared in chain.from_iterable(analysis.run().collect(progress=False)):
            (site,) = shared.sites
            assert_gram(shared.gram, expected[site.name])
            assert shared.tokens == tokens[site.name] == 44
            site.weight.zero_()


class Alive:
    """How many grams there are at a time, counted by the grams themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: set[int] = set()
        self.most = 0
        add = SharedGram.add

        def counted(shared: SharedGram, *args: Any, **options: Any) -> None:
            is_new = shared.gram is None
            add(shared, *args, **options)
            if is_new:
                key = id(shared)
                self.now.add(key)
                self.most = max(self.most, len(self.now))
                weakref.finalize(shared.gram, self.now.discard, key)

        monkeypatch.setattr(SharedGram, "add", counted)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("llama", 5),  # a layer's four inputs, and the head's
        ("qwen2", 4),
        ("gpt_neox", 5),
        ("bert", 5),
        ("t5", 7),  # a decoder layer's six, and the output of the encoder
    ],
)
def test_only_one_blocks_grams_are_alive(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = architecture(name)
    alive = Alive(monkeypatch)
    finished = 0
    with calibration_mode(analysis.model):
        run = analysis.run()
        for shared in chain.from_iterable(run.collect(progress=False)):
            finished += 1
            assert id(shared) in alive.now
            del shared
    assert alive.most == most < len(run.grams) == finished
    assert alive.now == set()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_between_blocks_only_what_later_ones_read_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = architecture(name)
    (trace,) = analysis.traces
    run = analysis.run()
    blocks = run._blocks[trace]
    seen: list[tuple[int, set[fx.Node]]] = []
    original = CalibrationRun._run

    def watched(
        self: CalibrationRun, block: Block, batch: TracedBatch, env: Any, take: Any
    ) -> None:
        original(self, block, batch, env, take)
        seen.append((blocks.index(block), set(env)))

    monkeypatch.setattr(CalibrationRun, "_run", watched)
    with calibration_mode(analysis.model):
        assert list(run.collect(progress=False))
    assert [at for at, _ in seen] == [at for at in range(len(blocks)) for _ in analysis.traced]
    for at, kept in seen:
        later = {v for b in blocks[at + 1 :] for node in b.nodes for v in node.all_input_nodes}
        assert all(node.op != "get_attr" for node in kept)
        assert {node for node in kept if node.op != "placeholder"} <= later
        layers = sum(
            node.meta["val"].dim() >= 3 for node in kept if hasattr(node.meta["val"], "dim")
        )
        assert layers < 12, "a boundary, not everything that was computed"
    assert {node.op for node in seen[-1][1]} <= {"placeholder"}


def test_each_distinct_input_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = architecture("llama")
    taken = 0

    def counted(*args: Any) -> None:
        nonlocal taken
        taken += 1
        add_to_gram(*args)

    monkeypatch.setattr(shared_gram, "add_to_gram", counted)
    collect(analysis)
    assert taken == 9 * len(analysis.traced)


def test_the_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    analysis = analyse(nn.Linear(8, 3), [activations(2, 8)])
    for progress, shown in [(True, True), (False, False), (None, False)]:
        run = analysis.run()
        run.check(progress=progress)
        list(run.collect(progress=progress))
        error = capsys.readouterr().err
        assert ("checking" in error) == ("magr" in error) == shown


# ---- the check


def overflowing(m: Formula, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).exp()))


def three() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {"a": nn.Linear(8, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)}


def check_on_the_way(run: CalibrationRun) -> None:
    list(run.collect(check=True, progress=False))


def check_before(run: CalibrationRun) -> None:
    run.check(progress=False)


@pytest.mark.parametrize("check", [check_before, check_on_the_way])
@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e5])
def test_the_check_names_site_and_batch_and_changes_nothing(
    bad: float, propagate: bool, check: Callable[[CalibrationRun], None]
) -> None:
    model = Formula(overflowing, **three())
    model.register_buffer("seen", torch.zeros(1))
    model.function = lambda m, x: (m.seen.add_(1), overflowing(m, x))[1]
    calib = [activations(2, 5, 8, seed=seed) for seed in range(4)]
    batches_ok = analyse(model, calib)
    calib[2][1, 3] = bad  # the very tensor that the batch holds
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    at = "b.weight" if bad == 1e5 else "a.weight"
    with (
        calibration_mode(model),
        pytest.raises(
            CalibrationError, match=rf"input of {at} holds NaN or Inf in .* batch 2; noth"
        ),
    ):
        check(CalibrationRun(batches_ok.traced, batches_ok.found.sites, propagate=propagate))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_the_check_passes_a_good_calibration_and_leaves_the_run_fresh() -> None:
    analysis = architecture("llama")
    with calibration_mode(analysis.model):
        run = analysis.run()
        run.check(progress=False)
        assert all(shared.gram is None for shared in run.grams)
        assert all(int(shared.tokens) == 0 for shared in run.grams)
        grams = {s.sites[0].name: s.gram for s in chain.from_iterable(run.collect(progress=False))}
    expected = collect(analysis)
    for name, gram in grams.items():
        torch.testing.assert_close(gram, expected[name].gram, rtol=0, atol=0)


@pytest.mark.parametrize("check", [check_before, check_on_the_way])
@pytest.mark.parametrize("propagate", [False, True])
def test_either_check_knows_the_sites_that_no_token_reaches(
    propagate: bool, check: Callable[[CalibrationRun], None]
) -> None:
    model = Formula(lambda m, x: (m.a(x[:, :0]), m.b(x))[1], a=nn.Linear(8, 4), b=nn.Linear(8, 4))
    analysis = analyse(model, [activations(2, 5, 8)])
    with calibration_mode(model):
        run = CalibrationRun(analysis.traced, analysis.found.sites, propagate=propagate)
        check(run)
        assert [site.name for site in run.unfed()] == ["a.weight"]


def test_without_the_check_activations_may_be_infinite() -> None:
    model = Formula(lambda m, x: m.a(x), a=nn.Linear(8, 4))
    x = activations(2, 5, 8)
    analysis = analyse(model, [x])
    x[0, 0] = float("inf")
    with calibration_mode(model):
        (found,) = next(analysis.run().collect(progress=False))
        assert not found.collected.isfinite().all()


def test_the_check_looks_at_what_a_matmul_reads_only() -> None:
    """What follows the last matmul, or never meets one, may be Inf: a mask's fill, say."""
    model = Formula(lambda m, x: m.a(x).exp().exp().exp() / 0, a=nn.Linear(8, 4))
    analysis = analyse(model, [activations(2, 5, 8)])
    with calibration_mode(model):
        analysis.run().check(progress=False)


def test_buffers_are_put_back_when_the_run_is_left_early() -> None:
    def function(m: Any, x: Tensor) -> Any:
        m.count += 1
        return m.layers[1](m.layers[0](x))

    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 3)])
    model = Formula(function, layers=layers)
    model.register_buffer("count", torch.zeros(1))
    analysis = analyse(model, [activations(2, 5, 8)])
    with calibration_mode(model):
        collecting = analysis.run().collect(progress=False)
        next(collecting)
        assert model.count.item() == 1
        collecting.close()
    assert model.count.item() == 0


def test_batches_of_several_traces_run_turn_by_turn() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    calib = [activations(batch, 5, 8, seed=batch) for batch in (2, 1, 3, 1, 4)]
    analysis = analyse(layers, calib)
    assert len(analysis.traces) == 2
    expected, tokens = hook_grams(layers, calib)
    for name, shared in collect(analysis).items():
        assert_gram(shared.gram, expected[name])
        assert shared.tokens == tokens[name] == 55
