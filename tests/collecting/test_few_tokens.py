"""Experts that few tokens were sent to: their grams against the formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_models import MODELS
from graph_helpers import Analysis, Formula, analyse, assert_gram, gram_of, weight
from tiny_models import activations, token_ids
from torch import Tensor, nn
from toys import report_of, state

from magr_fx import CoverageError, MagRConfig, magr_transform
from magr_fx.passes.collecting.few_tokens import fill_up
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.graphs.trace import calibration_mode

IN, OUT = 8, 4


def tokens(count: int, seed: int) -> Tensor:
    """Each expert's have another mean, so that the mean of them all is none of theirs."""
    return activations(count, IN, seed=seed) + seed


def filled(analysis: Analysis) -> dict[str, tuple[Tensor | None, SharedGram]]:
    """Each site's gram, filled up as soon as the grams are complete."""
    result: dict[str, tuple[Tensor | None, SharedGram]] = {}
    with calibration_mode(analysis.model):
        for finished in analysis.run().collect(progress=False):
            fill_up(finished)
            for shared in finished:
                gram = None if shared.gram is None else shared.gram.clone()
                result.update((site.name, (gram, shared)) for site in shared.sites)
    return result


def routed(*counts: int, **others: nn.Module) -> tuple[Formula, Tensor, Tensor]:
    """A model whose experts get so many tokens each, the tokens, and where they go."""
    model = Formula(
        lambda m, x, at: torch.bmm(x[:, None], m.w[at]),
        w=weight(len(counts), IN, OUT),
        **others,
    )
    x = torch.cat([tokens(count, seed + 1) for seed, count in enumerate(counts)])
    return model, x, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def expected(x: Tensor, at: Tensor, expert: int) -> Tensor:
    """G + (d - n)·P, with P = the mean of xxᵀ over all tokens."""
    own = gram_of(x[at == expert])
    missing = max(IN - int((at == expert).sum()), 0)
    return own + missing * gram_of(x) / len(x)


@pytest.mark.parametrize("counts", [(3, 20, 8), (1, 1), (7, 9, 12, 2), (5, 0, 3)], ids=str)
def test_formula(counts: tuple[int, ...]) -> None:
    model, x, at = routed(*counts)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found = filled(analyse(model, [(x[order], at[order])]))
    for expert, count in enumerate(counts):
        gram, shared = found[f"w[{expert}]"]
        if count == 0:
            assert gram is None
            assert shared.note == ""
            continue
        assert_gram(gram, expected(x, at, expert))
        assert shared.tokens == count
        few = f"{count} tokens for 8 inputs: filled up with the mean of its "
        reached = sum(c > 0 for c in counts)
        assert shared.note == (f"{few}{reached} experts" if count < IN else "")


def test_tokens_of_several_batches_are_one_count() -> None:
    model, x, at = routed(3, 6)
    calib = [(x[::2], at[::2]), (x[1::2], at[1::2]), (x[:4], at[:4])]
    found = filled(analyse(model, calib))
    every = (torch.cat([x, x[:4]]), torch.cat([at, at[:4]]))
    for expert in range(2):
        assert_gram(found[f"w[{expert}]"][0], expected(*every, expert))
    assert found["w[0]"][1].tokens == 6
    assert "6 tokens for 8 inputs" in found["w[0]"][1].notes


def test_all_directions_are_there_afterwards() -> None:
    model, x, at = routed(2, 30)
    gram, _ = filled(analyse(model, [(x, at)]))["w[0]"]
    assert gram is not None
    assert torch.linalg.matrix_rank(gram_of(x[at == 0])) == 2
    assert torch.linalg.matrix_rank(gram.double()) == IN


def test_enough_tokens() -> None:
    model, x, at = routed(8, 9)
    for expert in range(2):
        gram, shared = filled(analyse(model, [(x, at)]))[f"w[{expert}]"]
        assert_gram(gram, gram_of(x[at == expert]))
        assert shared.notes == ""


@pytest.mark.parametrize("counts", [(3,), (3, 0), (0, 0, 3)], ids=str)
def test_a_single_expert_is_not_filled_up(counts: tuple[int, ...]) -> None:
    """There are no others that saw more."""
    model, x, at = routed(*counts)
    found = filled(analyse(model, [(x, at)]))
    gram, shared = next(pair for pair in found.values() if pair[0] is not None)
    assert_gram(gram, gram_of(x))
    assert shared.note == ""


@pytest.mark.parametrize("counts", [(3, 0, 20), (0, 4), (2, 9, 0)], ids=str)
def test_a_stack_that_all_tokens_run_through(counts: tuple[int, ...]) -> None:
    """As Llama 4's experts: each is given all tokens, with zeros in the place of the others'."""
    x = torch.cat([tokens(count, seed + 1) for seed, count in enumerate(counts)])
    at = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    model = Formula(lambda m, x: torch.bmm(x, m.w), w=weight(len(counts), IN, OUT))
    each = torch.stack([x * (at == expert)[:, None] for expert in range(len(counts))])
    found = filled(analyse(model, [each]))
    alone = sum(count > 0 for count in counts) == 1
    for expert, count in enumerate(counts):
        gram, shared = found[f"w[{expert}]"]
        assert shared.tokens == count
        if count:
            own = gram_of(x[at == expert])
            assert_gram(gram, own if alone else expected(x, at, expert))
            fed = f"{sum(n > 0 for n in counts)} experts"
            assert (fed in shared.note) == (count < IN and not alone)


def test_an_expert_of_llama_4_without_a_token_is_left_alone() -> None:
    model, ids = MODELS["llama4"](), [token_ids(1, 2, seed=1)]
    before = state(model)
    magr_transform(model, ids, MagRConfig(alpha=1e-3), trace="make_fx")
    experts = [s for s in report_of(model).sites if ".experts." in s.name]
    assert len(experts) == 8
    assert sum(site.tokens for site in experts) == 2 * 2  # two tokens, one expert each
    unfed = [site for site in experts if not site.tokens]
    assert {site.outcome for site in unfed} == {"skipped"}
    assert len(unfed) >= 4
    for site in unfed:
        name, _, index = site.name.rstrip("]").partition("[")
        assert torch.equal(model.get_parameter(name)[int(index)], before[name][int(index)])
    with pytest.raises(CoverageError, match=r"experts.*no counted calibration token reaches it"):
        magr_transform(MODELS["llama4"](), ids, trace="make_fx", strict=True)


def test_what_is_no_expert_is_not_filled_up() -> None:
    """A plain linear with few tokens, also beside experts, and of one block."""

    def function(m: Any, x: Tensor, at: Tensor) -> Any:
        return torch.bmm(x[:, None], m.w[at]), m.plain(x[:2]), m.other(x[:2])

    experts, x, at = routed(3, 9)
    model = Formula(function, w=experts.w, plain=nn.Linear(IN, OUT), other=nn.Linear(IN, OUT))
    found = filled(analyse(model, [(x, at)]))
    for name in ("plain.weight", "other.weight"):
        gram, shared = found[name]
        assert_gram(gram, gram_of(x[:2]))
        assert shared.note == ""
    assert_gram(found["w[0]"][0], expected(x, at, 0))


def test_each_stack_has_its_own_mean() -> None:
    def function(m: Any, x: Tensor, at: Tensor) -> Any:
        return torch.bmm(x[:, None], m.one[at]), torch.bmm(2 * x[::2, None], m.two[at[::2]])

    model = Formula(function, one=weight(2, IN, OUT), two=weight(2, IN, OUT, seed=1))
    _, x, at = routed(5, 12)
    found = filled(analyse(model, [(x, at)]))
    for expert in range(2):
        assert_gram(found[f"one[{expert}]"][0], expected(x, at, expert))
        assert_gram(found[f"two[{expert}]"][0], expected(2 * x[::2], at[::2], expert))


def test_gate_and_up_of_one_gram_are_filled_up_once() -> None:
    def function(m: Any, x: Tensor, at: Tensor) -> Any:
        rows = x[:, None]
        return torch.bmm(rows, m.gate[at]) * torch.bmm(rows, m.up[at])

    model = Formula(function, gate=weight(2, IN, OUT), up=weight(2, IN, OUT, seed=1))
    _, x, at = routed(3, 12)
    found = filled(analyse(model, [(x, at)]))
    for name in ("gate[0]", "up[0]"):
        assert_gram(found[name][0], expected(x, at, 0))
    assert found["gate[0]"][1] is found["up[0]"][1]


def test_nothing_is_finished() -> None:
    fill_up([])


@pytest.mark.parametrize("unbound", [False, True])
def test_a_stack_that_is_multiplied_matrix_by_matrix(unbound: bool) -> None:
    """As in a loop over the experts, where each has a product of its own."""

    def function(m: Any, x: Tensor) -> Any:
        first, second = m.w.unbind(0) if unbound else (m.w[0], m.w[1])
        return (x[:3] @ first).sum() + (x[3:] @ second).sum()

    model = Formula(function, w=weight(2, IN, OUT))
    _, x, at = routed(3, 12)
    found = filled(analyse(model, [x]))
    for expert in range(2):
        assert_gram(found[f"w[{expert}]"][0], expected(x, at, expert))
