"""The tokens that reach each matrix of a stack, against an oracle that sees the products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, Formula, analyse, assert_gram, collect, gram_of, weight
from tiny_models import activations
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from weight_oracle import Matrix, Row, oracle, site_matrix

aten = torch.ops.aten
IN, OUT, STACK = 8, 4, 3


def x(*shape: int, seed: int = 0) -> Tensor:
    return activations(*shape, IN, seed=seed)


def index(*at: Any) -> Tensor:
    return torch.tensor(at, dtype=torch.int64)


def in_out() -> nn.Parameter:
    return weight(STACK, IN, OUT)


def out_in() -> nn.Parameter:
    return weight(STACK, OUT, IN)


def by_row(grams: Iterable[tuple[Matrix, Tensor]]) -> dict[Row, Tensor]:
    """The gram of each row, whatever matrices it is multiplied in."""
    rows: dict[Row, Tensor] = {}
    for matrix, gram in grams:
        for row in matrix.rows:
            rows[row] = rows.get(row, 0) + gram
    return rows


def assert_as_the_oracle(analysis: Analysis) -> None:
    """Every row that meets a token has its gram, and no other one has any."""
    expected = by_row(oracle(analysis.model, analysis.batches).items())
    collected = collect(analysis)
    measured = by_row(
        site_matrix(analysis.model, site, gram)
        for site in analysis.found.sites
        if (gram := collected[site.name].gram) is not None and collected[site.name].tokens
    )
    assert measured.keys() == expected.keys()
    for row, gram in measured.items():
        assert_gram(gram.float(), expected[row])


# name → (function, parameter, calibration)
Routed = tuple[Callable[..., Any], Callable[[], nn.Parameter], list[Any]]
ROUTED: dict[str, Routed] = {
    "one index for each row": (
        lambda m, x, at: torch.bmm(x[:, None], m.w[at]),
        in_out,
        [(x(5), index(0, 2, 2, 0, 2)), (x(3), index(1, 1, 0))],
    ),
    "weight first": (
        lambda m, x, at: m.w[at] @ x[..., None],
        out_in,
        [(x(5), index(0, 2, 2, 0, 2))],
    ),
    "an index for each sequence": (
        lambda m, x, at: x @ m.w[at].mT,
        out_in,
        [(x(4, 5), index(2, 0, 1, 2)), (x(3, 2), index(1, 1, 0))],
    ),
    "several indices for each row": (
        lambda m, x, at: x[:, None, None] @ m.w[at],
        in_out,
        [(x(4), index([0, 2], [2, 2], [1, 0], [2, 1]))],
    ),
    "all rows go to each": (
        lambda m, x, at: x @ m.w[at],
        in_out,
        [(x(6), index(2, 0, 2)), (x(5), index(1, 1))],
    ),
    "a view of the stack": (
        lambda m, x, at: torch.bmm(x, m.w.mT[at]),
        out_in,
        [(x(4, 2), index(0, 2, 2, 0))],
    ),
    "a cast of what is picked": (
        lambda m, x, at: torch.bmm(x.double(), m.w[at].double()),
        in_out,
        [(x(4, 2), index(0, 2, 2, 0))],
    ),
    "a part of what is picked": (
        lambda m, x, at: torch.bmm(x, m.w[at][..., :2]),
        in_out,
        [(x(4, 2), index(0, 2, 2, 0))],
    ),
    "one stack of several": (
        lambda m, x, at: torch.bmm(x, m.w[1][at]),
        lambda: weight(2, STACK, IN, OUT),
        [(x(4, 2), index(0, 2, 2, 0))],
    ),
    "a stack of one": (
        lambda m, x, at: torch.bmm(x, m.w[at]),
        lambda: weight(1, IN, OUT),
        [(x(4, 2), index(0, 0, 0, 0))],
    ),
    "index_select": (
        lambda m, x, at: torch.bmm(x, m.w.index_select(0, at)),
        in_out,
        [(x(4, 2), index(0, 2, 2, 0))],
    ),
    "einsum": (
        lambda m, x, at: torch.einsum("tki,tkio->tko", x, m.w[at]),
        in_out,
        [(x(4, 2), index([0, 2], [2, 2], [1, 0], [2, 1]))],
    ),
    "einsum of other orders": (
        lambda m, x, at: torch.einsum("tkoi,kti->okt", m.w[at], x),
        out_in,
        [(x(2, 4), index([0, 2], [2, 2], [1, 0], [2, 1]))],
    ),
    "einsum, all rows go to each": (
        lambda m, x, at: torch.einsum("ti,koi->tko", x, m.w[at]),
        out_in,
        [(x(4), index(0, 2, 2))],
    ),
    "one index for all": (
        lambda m, x, at: F.linear(x, aten.index.Tensor(m.w, [at])),
        out_in,
        [(x(4, 5), torch.tensor(2)), (x(2, 3), torch.tensor(0))],
    ),
    "no row": (
        lambda m, x, at: torch.bmm(x, m.w[at]),
        in_out,
        [(x(4, 2), index(0, 2, 2, 0)), (x(0, 2), index())],
    ),
    "the chosen of a router": (
        lambda m, x: torch.bmm(x[:, None], m.w[(x @ x[0]).argsort() % STACK]),
        in_out,
        [x(5), x(7, seed=1)],
    ),
    "grouped_mm": (
        lambda m, x, ends: F.grouped_mm(x, m.w, offs=ends),
        in_out,
        [(x(7), index(2, 2, 7).int()), (x(4), index(0, 1, 4).int()), (x(7), index(0, 0, 7).int())],
    ),
    "grouped_mm, sorted": (
        lambda m, x, at: F.grouped_mm(
            x[at.argsort()], m.w, offs=(at[:, None] <= torch.arange(STACK)).sum(0).int()
        ),
        in_out,
        [(x(5), index(2, 0, 0, 2, 2)), (x(6), index(2, 1, 1, 2, 0, 1))],
    ),
}


@pytest.mark.parametrize("name", sorted(ROUTED))
def test_each_matrix_has_the_rows_that_are_sent_to_it(name: str) -> None:
    function, make, calib = ROUTED[name]
    assert_as_the_oracle(analyse(Formula(function, w=make()), calib))


def picked(*steps: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def function(m: Any, x: Tensor, at: Tensor) -> Any:
        value = m.w[at]
        for step in steps:
            value = step(value)
        return x @ value

    return function


# Forms whose rows go elsewhere than the index says; each may be refused, but not miscounted.
DECEPTIVE: dict[str, tuple[str, Routed]] = {
    "negative indices": (
        "an index that counts from the end is no place of the stack",
        (lambda m, x, at: torch.bmm(x, m.w[at]), in_out, [(x(4, 2), index(-3, -1, 2, 0))]),
    ),
    "one of those that are picked": (
        "a select after the index is taken for one of the matrix",
        (picked(lambda w: w[0]), in_out, [(x(4, 5), index(0, 2, 2, 1))]),
    ),
    "unbound": (
        "as with select",
        (picked(lambda w: w.unbind(0)[0]), in_out, [(x(4, 5), index(0, 2, 2, 1))]),
    ),
    "the first of those that are picked": (
        "a slice of what is picked is taken for all of it",
        (picked(lambda w: w[:2]), in_out, [(x(5), index(0, 2, 2, 1))]),
    ),
    "transposed index": (
        "the dimensions of the index are taken to be in order",
        (
            picked(lambda w: w.transpose(0, 1)),
            in_out,
            [(x(2, 2, 4), index([0, 1], [2, 2]))],
        ),
    ),
    "flattened index": (
        "the rows are expanded to the dimensions of the index",
        (picked(lambda w: w.flatten(0, 1)), in_out, [(x(4, 5), index([0, 1], [2, 2]))]),
    ),
    "index of one element": (
        "as with select",
        (picked(lambda w: w[0]), in_out, [(x(4, 5), index(1))]),
    ),
    "stacks that are picked": (
        "the matrices of a stack that is picked are all at its place",
        (
            picked(),
            lambda: weight(2, STACK, IN, OUT),
            [(x(4, STACK, 5), index(0, 1, 1, 0))],
        ),
    ),
    "einsum over the index": (
        "the matrices that are picked are one beside the other",
        (
            lambda m, x, at: torch.einsum("tki,kio->to", x, m.w[at]),
            in_out,
            [(x(5, 4), index(0, 2, 2, 1))],
        ),
    ),
    "einsum, some of the index": (
        "the rows are taken to have all dimensions of the index, or none",
        (
            lambda m, x, at: torch.einsum("tki,tjkoi->tjko", x, m.w[at]),
            out_in,
            [(x(3, 2), index([[0, 2], [1, 1]], [[2, 2], [0, 0]], [[1, 2], [0, 2]]))],
        ),
    ),
    "einsum, the first of the index": (
        "as before, where two sizes agree by chance",
        (
            lambda m, x, at: torch.einsum("tbi,bkoi->tbko", x, m.w[at]),
            out_in,
            [(x(5, 2), index([0, 1], [2, 2]))],
        ),
    ),
    "einsum that broadcasts": (
        "an einsum may broadcast what it sums over",
        (
            lambda m, x, at: torch.einsum("ti,oi->to", x[:, :1], m.w[0]),
            out_in,
            [(x(5), index(0))],
        ),
    ),
}


@pytest.mark.parametrize(
    "name",
    sorted(DECEPTIVE),
)
def test_what_the_index_does_not_tell(name: str) -> None:
    function, make, calib = DECEPTIVE[name][1]

    def beside_another_site(m: Any, *inputs: Tensor) -> Any:
        return function(m, *inputs), m.other(inputs[0])

    model = Formula(beside_another_site, w=make(), other=nn.Linear(IN, OUT, bias=False))
    analysis = analyse(model, calib)
    if "w" in analysis.reasons:
        assert "other.weight" in analysis.shapes
    else:
        assert_as_the_oracle(analysis)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, at: x @ m.w[:, at],
        lambda m, x, at: x @ m.w[at, at],
        lambda m, x, at: F.linear(x, m.w[0][at]),
        lambda m, x, at: x @ m.w[at > 0],
        lambda m, x, at: x @ m.w[at][at],
        lambda m, x, at: x @ m.w[at].relu(),
        lambda m, x, at: x @ m.w.take_along_dim(at[:, None, None], 0),
    ],
)
def test_what_is_picked_in_other_ways_is_left_alone(function: Callable[..., Any]) -> None:
    def beside_another_site(m: Any, x: Tensor, at: Tensor) -> Any:
        return function(m, x, at).sum(), m.other(x)

    model = Formula(beside_another_site, w=weight(IN, IN, IN), other=nn.Linear(IN, OUT))
    analysis = analyse(model, [(x(IN), index(0, 2, 2, 1, 3, 4, 5, 2))])
    assert list(analysis.shapes) == ["other.weight"]
    assert list(analysis.reasons) == ["w"]


def test_one_look_at_an_activation_serves_all_matrices() -> None:
    model = Formula(lambda m, x, at: torch.bmm(x, m.w[at]), w=in_out())
    analysis = analyse(model, [(x(4, 2), index(0, 2, 2, 0))])
    calls = [call for site in analysis.found.sites for call in site.calls]
    assert len({call.activation for call in calls}) == 1
    assert len({call.input_key for call in calls}) == STACK
    assert all(call.stacked and not call.direct for call in calls)
    (reads,) = {call.reads for call in calls}
    assert len(reads) == 2
    assert len(analysis.run().grams) == STACK


def test_several_stacks_of_the_same_experts_share_grams() -> None:
    """gate and up meet the same rows: one gram for the two matrices of each expert."""
    model = Formula(
        lambda m, x, at: torch.bmm(x, m.gate[at]) * torch.bmm(x, m.up[at]),
        gate=in_out(),
        up=weight(STACK, IN, OUT, seed=1),
    )
    analysis = analyse(model, [(x(4, 2), index(0, 2, 2, 1))])
    grams = [[site.name for site in shared.sites] for shared in analysis.run().grams]
    assert grams == [[f"gate[{at}]", f"up[{at}]"] for at in range(STACK)]
    assert_as_the_oracle(analysis)


# ---- padding


class Masked(nn.Module):
    """``function(self, inputs_embeds)`` on tokens of which some are padding."""

    def __init__(self, function: Callable[..., Any], w: nn.Parameter) -> None:
        super().__init__()
        self.function, self.w = function, w

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return self.function(self, inputs_embeds) + attention_mask.sum()


def experts(tokens: Tensor) -> Tensor:
    """Where each token goes: by its greatest input."""
    return tokens.argmax(-1) % STACK


def _sorted(m: Any, x: Tensor) -> Any:
    rows = x.flatten(0, 1)
    at = experts(rows)
    ends = (at[:, None] <= torch.arange(STACK)).sum(0).int()
    return F.grouped_mm(rows[at.argsort(stable=True)], m.w, offs=ends).sum()


MASKED: dict[str, Callable[..., Any]] = {
    "each token's own matrix": lambda m, x: torch.einsum("bti,btio->bto", x, m.w[experts(x)]).sum(),
    "rows": lambda m, x: torch.bmm(x.flatten(0, 1)[:, None], m.w[experts(x.flatten(0, 1))]).sum(),
    "sorted": _sorted,
    "all meet the stack": lambda m, x: torch.einsum("bti,eio->beto", x, m.w).sum(),
    "plain einsum": lambda m, x: torch.einsum("...i,io->...o", x, m.w[0]).sum(),
}


@pytest.mark.parametrize("name", sorted(MASKED))
def test_padding_does_not_count(name: str) -> None:
    masks = [index([1, 1, 1, 0], [1, 0, 0, 0]), index([0, 1, 1], [1, 1, 1], [0, 0, 1])]
    calib = [
        {"inputs_embeds": x(*mask.shape, seed=at + 1), "attention_mask": mask}
        for at, mask in enumerate(masks)
    ]
    analysis = analyse(Masked(MASKED[name], in_out()), calib)
    collected = collect(analysis)
    kept = torch.cat([item["inputs_embeds"][item["attention_mask"].bool()] for item in calib])
    routed = name not in ("all meet the stack", "plain einsum")
    for expert in range(1 if name == "plain einsum" else STACK):
        shared = collected[f"w[{expert}]"]
        rows = kept[experts(kept) == expert] if routed else kept
        assert len(rows) > 0
        assert not shared.padding_counted
        assert shared.tokens == len(rows)
        assert_gram(shared.gram, gram_of(rows))
