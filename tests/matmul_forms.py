"""Every way to write a matmul with a weight, each with the weights and the inputs that it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from graph_helpers import Analysis, Formula, analyse, weight
from tiny_models import activations
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

OUT, IN, STACK = 6, 8, 3


class Expected(NamedTuple):
    """One site: where its weight ``[out, in]`` is, and the rows that meet it for an input."""

    weight: Callable[[Any], Tensor]
    rows: Callable[[Tensor], Tensor]
    calls: int = 1


class Form(NamedTuple):
    function: Callable[..., Any]
    parts: dict[str, Callable[[], Any]]
    inputs: list[Tensor]
    sites: dict[str, Expected]
    direct: bool = False  # a plain linear with a whole parameter: what torchao's tensors can run

    def model(self) -> Formula:
        return Formula(self.function, **{name: make() for name, make in self.parts.items()})


def same(x: Tensor) -> Tensor:
    return x


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


TOKENS = [activations(2, 5, IN, seed=1), activations(3, 4, IN, seed=2)]
ROWS = [activations(5, IN, seed=1), activations(7, IN, seed=2)]
STACKED = [activations(STACK, 5, IN, seed=1), activations(STACK, 4, IN, seed=2)]
IN_STACKS = [activations(2, STACK, 5, IN, seed=1), activations(4, STACK, 3, IN, seed=2)]
ONE_STACK = [activations(2, 1, 5, IN, seed=1), activations(4, 1, 3, IN, seed=2)]


def ends(*at: int) -> nn.Buffer:
    """Where the segments of grouped_mm end."""
    return nn.Buffer(torch.tensor(at, dtype=torch.int32))


def index(*at: int) -> nn.Buffer:
    return nn.Buffer(torch.tensor(at))


out_in = {"w": lambda: weight(OUT, IN)}
in_out = {"w": lambda: weight(IN, OUT)}
whole = {"w": Expected(lambda m: m.w, same)}
turned = {"w": Expected(lambda m: m.w.T, same)}


def stack(
    matrix: Callable[[Tensor], Tensor], rows: Callable[[Tensor, int], Tensor]
) -> dict[str, Expected]:
    """One site for each matrix of a stacked parameter."""

    def site(at: int) -> Expected:
        return Expected(lambda m: matrix(m.w[at]), lambda x: rows(x, at))

    return {f"w[{at}]": site(at) for at in range(STACK)}


def stacks() -> dict[str, Expected]:
    """One site for each matrix [in, out] of stacks of them."""

    def site(i: int, j: int) -> Expected:
        return Expected(lambda m: m.w[i, j].T, lambda x: x[i, j])

    return {f"w[{i}, {j}]": site(i, j) for i in range(2) for j in range(STACK)}


def _thirds(m: Any, x: Tensor) -> Any:
    q, k, v = m.w.chunk(3)
    return F.linear(x, q) + F.linear(x.relu(), k) + F.linear(x.tanh(), v)


def _experts(m: Any, x: Tensor) -> Any:
    return sum((x * (at + 1)) @ expert for at, expert in enumerate(m.w.unbind(0)))


FORMS: dict[str, Form] = {
    "nn.Linear": Form(
        lambda m, x: m.a(x),
        {"a": linear},
        TOKENS,
        {"a.weight": Expected(lambda m: m.a.weight, same)},
        direct=True,
    ),
    "F.linear": Form(lambda m, x: F.linear(x, m.w), out_in, TOKENS, whole, direct=True),
    "F.linear by keyword": Form(
        lambda m, x: F.linear(weight=m.w, input=x), out_in, TOKENS, whole, direct=True
    ),
    "F.linear of a vector": Form(
        lambda m, x: F.linear(x[0, 0], m.w),
        out_in,
        TOKENS,
        {"w": Expected(lambda m: m.w, lambda x: x[0, :1])},
        direct=True,
    ),
    "F.linear, weight first": Form(lambda m, x: F.linear(m.w, x), out_in, ROWS, whole),
    "x @ W.T": Form(lambda m, x: x @ m.w.T, out_in, TOKENS, whole),
    "x @ W": Form(lambda m, x: x @ m.w, in_out, TOKENS, turned),
    "x @ W.T.contiguous()": Form(lambda m, x: x @ m.w.T.contiguous(), out_in, TOKENS, whole),
    "W @ x": Form(lambda m, x: m.w @ x.mT, out_in, TOKENS, whole),
    "W.T @ x": Form(lambda m, x: m.w.T @ x.mT, in_out, TOKENS, turned),
    "W @ vector": Form(
        lambda m, x: m.w @ x[0, 0],
        out_in,
        TOKENS,
        {"w": Expected(lambda m: m.w, lambda x: x[0, :1])},
    ),
    "vector @ W": Form(
        lambda m, x: x[0, 0] @ m.w,
        in_out,
        TOKENS,
        {"w": Expected(lambda m: m.w.T, lambda x: x[0, :1])},
    ),
    "mm": Form(lambda m, x: torch.mm(x, m.w), in_out, ROWS, turned),
    "mm by keyword": Form(lambda m, x: torch.mm(mat2=m.w, input=x), in_out, ROWS, turned),
    "mm, weight first": Form(lambda m, x: torch.mm(m.w, x.T), out_in, ROWS, whole),
    "addmm": Form(
        lambda m, x: torch.addmm(m.b, x, m.w), {**in_out, "b": lambda: weight(OUT)}, ROWS, turned
    ),
    "addmm, weight first": Form(
        lambda m, x: torch.addmm(m.b, m.w, x.T), {**out_in, "b": lambda: weight(1)}, ROWS, whole
    ),
    "addmm on itself": Form(lambda m, x: torch.addmm(x[:, :OUT], x, m.w), in_out, ROWS, turned),
    "inner": Form(lambda m, x: torch.inner(x, m.w), out_in, TOKENS, whole),
    "inner, weight first": Form(lambda m, x: torch.inner(m.w, x), out_in, TOKENS, whole),
    "mv": Form(
        lambda m, x: torch.mv(m.w, x[0]),
        out_in,
        ROWS,
        {"w": Expected(lambda m: m.w, lambda x: x[:1])},
    ),
    "addmv": Form(
        lambda m, x: torch.addmv(x[1, :OUT], m.w, x[0]),
        out_in,
        ROWS,
        {"w": Expected(lambda m: m.w, lambda x: x[:1])},
    ),
    "tensordot": Form(lambda m, x: torch.tensordot(x, m.w, dims=1), in_out, TOKENS, turned),
    "tensordot, weight first": Form(
        lambda m, x: torch.tensordot(m.w, x, dims=([1], [2])), out_in, TOKENS, whole
    ),
    "tensordot over two": Form(
        lambda m, x: torch.tensordot(x.unflatten(-1, (2, -1)), m.w, dims=([2, 3], [0, 1])),
        {"w": lambda: weight(2, IN // 2, OUT)},
        TOKENS,
        {"w": Expected(lambda m: m.w.flatten(0, 1).T, same)},
    ),
    "addbmm": Form(
        lambda m, x: torch.addbmm(x[0, :, :OUT], x, m.w),
        {"w": lambda: weight(STACK, IN, OUT)},
        STACKED,
        stack(lambda w: w.T, lambda x, at: x[at]),
    ),
    "bmm": Form(
        lambda m, x: torch.bmm(x, m.w),
        {"w": lambda: weight(STACK, IN, OUT)},
        STACKED,
        stack(lambda w: w.T, lambda x, at: x[at]),
    ),
    "bmm, weight first": Form(
        lambda m, x: torch.bmm(m.w, x.mT),
        {"w": lambda: weight(STACK, OUT, IN)},
        STACKED,
        stack(same, lambda x, at: x[at]),
    ),
    "bmm of a stack of one": Form(
        lambda m, x: torch.bmm(x[:1], m.w),
        {"w": lambda: weight(1, IN, OUT)},
        STACKED,
        {"w": Expected(lambda m: m.w[0].T, lambda x: x[:1])},
    ),
    "bmm, one matrix expanded": Form(
        lambda m, x: torch.bmm(x, m.w.T.expand(x.shape[0], -1, -1)), out_in, TOKENS, whole
    ),
    "bmm, expanded and flattened": Form(
        lambda m, x: torch.bmm(
            x.flatten(0, 1), m.w.expand(x.shape[0], x.shape[1], IN, OUT).reshape(-1, IN, OUT)
        ),
        {"w": lambda: weight(1, 1, IN, OUT)},
        IN_STACKS,
        {"w": Expected(lambda m: m.w[0, 0].T, same)},
    ),
    "bmm, expanded over the batch alone and flattened": Form(
        lambda m, x: torch.bmm(
            x.flatten(0, 1), m.w.expand(x.shape[0], 3, IN, OUT).reshape(-1, IN, OUT)
        ),
        {"w": lambda: weight(1, 1, IN, OUT)},
        IN_STACKS,
        {"w": Expected(lambda m: m.w[0, 0].T, same)},
    ),
    "baddbmm": Form(
        lambda m, x: torch.baddbmm(m.b, x, m.w),
        {"w": lambda: weight(STACK, IN, OUT), "b": lambda: weight(STACK, 1, OUT)},
        STACKED,
        stack(lambda w: w.T, lambda x, at: x[at]),
    ),
    "matmul, a stack each": Form(
        lambda m, x: x @ m.w,
        {"w": lambda: weight(STACK, IN, OUT)},
        IN_STACKS,
        stack(lambda w: w.T, lambda x, at: x[:, at]),
    ),
    "matmul, all meet the stack": Form(
        lambda m, x: x @ m.w,
        {"w": lambda: weight(STACK, IN, OUT)},
        ONE_STACK,
        stack(lambda w: w.T, lambda x, at: x),
    ),
    "matmul, rows meet the stack": Form(
        lambda m, x: x @ m.w,
        {"w": lambda: weight(STACK, IN, OUT)},
        ROWS,
        stack(lambda w: w.T, lambda x, at: x),
    ),
    "matmul, stack first": Form(
        lambda m, x: m.w @ x.mT,
        {"w": lambda: weight(STACK, OUT, IN)},
        IN_STACKS,
        stack(same, lambda x, at: x[:, at]),
    ),
    "matmul, stacks of stacks": Form(
        lambda m, x: x @ m.w,
        {"w": lambda: weight(2, STACK, IN, OUT)},
        [activations(2, STACK, 5, IN, seed=1), activations(2, STACK, 4, IN, seed=2)],
        stacks(),
    ),
    "a slice": Form(
        lambda m, x: F.linear(x, m.w[2:6]),
        out_in,
        TOKENS,
        {"w[2:6]": Expected(lambda m: m.w[2:6], same)},
    ),
    "a column slice": Form(
        lambda m, x: F.linear(x[..., 2:], m.w[:, 2:]),
        out_in,
        TOKENS,
        {"w[:, 2:8]": Expected(lambda m: m.w[:, 2:], lambda x: x[..., 2:])},
    ),
    "every other column": Form(
        lambda m, x: F.linear(x[..., ::2], m.w[:, ::2]),
        out_in,
        TOKENS,
        {"w[:, 0:7]": Expected(lambda m: m.w[:, ::2], lambda x: x[..., ::2])},
    ),
    "chunks for other inputs": Form(
        _thirds,
        {"w": lambda: weight(3 * OUT, IN)},
        TOKENS,
        {
            "w[0:6]": Expected(lambda m: m.w[:6], same),
            "w[6:12]": Expected(lambda m: m.w[6:12], torch.relu),
            "w[12:18]": Expected(lambda m: m.w[12:], torch.tanh),
        },
    ),
    "unbound experts": Form(
        _experts,
        {"w": lambda: weight(STACK, IN, OUT)},
        TOKENS,
        stack(lambda w: w.T, lambda x, at: x * (at + 1)),
    ),
    "one head of a view": Form(
        lambda m, x: F.linear(x, m.w.view(2, OUT // 2, IN)[1]),
        out_in,
        TOKENS,
        {"w[3:6]": Expected(lambda m: m.w[3:], same)},
    ),
    "a flat parameter": Form(
        lambda m, x: F.linear(x, m.w.view(OUT, IN)),
        {"w": lambda: weight(OUT * IN)},
        TOKENS,
        {"w": Expected(lambda m: m.w.view(OUT, IN), same)},
    ),
    "a parameter stored transposed": Form(
        lambda m, x: F.linear(x, m.w),
        {"w": lambda: nn.Parameter(weight(IN, OUT).detach().T)},
        TOKENS,
        whole,
        direct=True,
    ),
    "a cast weight": Form(lambda m, x: F.linear(x.double(), m.w.double()), out_in, TOKENS, whole),
    "a bfloat16 weight": Form(
        lambda m, x: x @ m.w.to(x.dtype).T,
        {"w": lambda: nn.Parameter(weight(OUT, IN).detach().bfloat16())},
        TOKENS,
        whole,
    ),
    "a weight on its way to a device": Form(
        lambda m, x: F.linear(x, m.w.to(x.device).clone().detach()), out_in, TOKENS, whole
    ),
    "a layer used twice": Form(
        lambda m, x: m.a(F.pad(m.a(x), (0, IN - OUT))),
        {"a": linear},
        TOKENS,
        {
            "a.weight": Expected(
                lambda m: m.a.weight,
                lambda x: torch.cat([x, F.pad(linear()(x), (0, IN - OUT))]).detach(),
                calls=2,
            )
        },
        direct=True,
    ),
    "a layer used twice on one input": Form(
        lambda m, x: m.a(x) + m.a(x.relu()) + m.a(x),
        {"a": linear},
        TOKENS,
        {
            "a.weight": Expected(
                lambda m: m.a.weight, lambda x: torch.cat([x, x.relu(), x]), calls=3
            )
        },
        direct=True,
    ),
    "a layer beside one used twice": Form(
        lambda m, x: m.a(x) + m.a(x) + F.linear(x, m.w),
        {"a": linear, **out_in},
        TOKENS,
        {
            "a.weight": Expected(lambda m: m.a.weight, lambda x: torch.cat([x, x]), calls=2),
            **whole,
        },
        direct=True,
    ),
    "a linear of learned queries": Form(
        lambda m, x: (
            m.a(F.layer_norm(m.queries.expand(x.shape[0], -1, -1), [IN])) @ x[..., :OUT].mT
        ),
        {"a": linear, "queries": lambda: weight(4, IN, seed=3)},
        TOKENS,
        {
            "a.weight": Expected(
                lambda m: m.a.weight,
                lambda x: F.layer_norm(weight(4, IN, seed=3), [IN]).expand(len(x), -1, -1).detach(),
            )
        },
        direct=True,
    ),
    "a slice for learned queries": Form(
        lambda m, x: (
            F.linear(m.queries.repeat(x.shape[0], 1, 1), m.w[:OUT]) @ F.linear(x, m.w[OUT:]).mT
        ),
        {"w": lambda: weight(2 * OUT, IN), "queries": lambda: weight(4, IN, seed=3)},
        TOKENS,
        {
            "w[0:6]": Expected(
                lambda m: m.w[:OUT], lambda x: weight(4, IN, seed=3).detach().repeat(len(x), 1, 1)
            ),
            "w[6:12]": Expected(lambda m: m.w[OUT:], same),
        },
    ),
    "einsum": Form(lambda m, x: torch.einsum("bti,oi->bto", x, m.w), out_in, TOKENS, whole),
    "einsum, weight first": Form(
        lambda m, x: torch.einsum("io,bti->bot", m.w, x), in_out, TOKENS, turned
    ),
    "einsum with an ellipsis": Form(
        lambda m, x: torch.einsum("...i,io->...o", x, m.w), in_out, TOKENS, turned
    ),
    "einsum without an arrow": Form(
        lambda m, x: torch.einsum("ti,io", x, m.w), in_out, ROWS, turned
    ),
    "einsum to heads": Form(
        lambda m, x: torch.einsum("bti,ihk->bhtk", x, m.w),
        {"w": lambda: weight(IN, 2, 3)},
        TOKENS,
        {"w": Expected(lambda m: m.w.flatten(1).T, same)},
    ),
    "einsum from heads": Form(
        lambda m, x: torch.einsum("bthk,hko->bto", x.unflatten(-1, (2, -1)), m.w),
        {"w": lambda: weight(2, IN // 2, OUT)},
        TOKENS,
        {"w": Expected(lambda m: m.w.flatten(0, 1).T, same)},
    ),
    "einsum of a stack": Form(
        lambda m, x: torch.einsum("beti,eio->teob", x, m.w),
        {"w": lambda: weight(STACK, IN, OUT)},
        IN_STACKS,
        stack(lambda w: w.T, lambda x, at: x[:, at]),
    ),
    "einsum, all meet the stack": Form(
        lambda m, x: torch.einsum("eti,eoi->eto", x.expand(STACK, -1, -1), m.w),
        {"w": lambda: weight(STACK, OUT, IN)},
        [activations(1, 5, IN, seed=1), activations(1, 4, IN, seed=2)],
        stack(same, lambda x, at: x[0]),
    ),
    "grouped_mm": Form(
        lambda m, x: F.grouped_mm(x, m.w.mT, offs=m.ends),
        {"w": lambda: weight(STACK, OUT, IN), "ends": lambda: ends(2, 3, 5)},
        [activations(5, IN, seed=1), activations(5, IN, seed=2)],
        stack(same, lambda x, at: x[(0, 2, 3)[at] : (2, 3, 5)[at]]),
    ),
    "matrices picked by an index": Form(
        lambda m, x: torch.bmm(x, m.w[m.index]),
        {"w": lambda: weight(STACK, IN, OUT), "index": lambda: index(2, 0, 1, 2)},
        [activations(4, 5, IN, seed=1), activations(4, 3, IN, seed=2)],
        stack(lambda w: w.T, lambda x, at: x[torch.tensor([2, 0, 1, 2]) == at]),
    ),
    "matrices picked by an index, weight first": Form(
        lambda m, x: torch.bmm(m.w[m.index], x.mT),
        {"w": lambda: weight(STACK, OUT, IN), "index": lambda: index(2, 0, 1, 2)},
        [activations(4, 5, IN, seed=1), activations(4, 3, IN, seed=2)],
        stack(same, lambda x, at: x[torch.tensor([2, 0, 1, 2]) == at]),
    ),
    "matrices picked by index_select": Form(
        lambda m, x: torch.einsum("kti,koi->kto", x, m.w.index_select(0, m.index)),
        {"w": lambda: weight(STACK, OUT, IN), "index": lambda: index(2, 0, 1, 2)},
        [activations(4, 5, IN, seed=1), activations(4, 3, IN, seed=2)],
        stack(same, lambda x, at: x[torch.tensor([2, 0, 1, 2]) == at]),
    ),
    "a weight and a shape of it": Form(
        lambda m, x: F.linear(x, m.w) * m.w.shape[0] / m.w.numel(),
        out_in,
        TOKENS,
        whole,
        direct=True,
    ),
}


@functools.cache
def form_analysis(name: str) -> Analysis:
    """One of ``FORMS``, traced once for all tests: they leave its weights alone."""
    return analyse(FORMS[name].model(), FORMS[name].inputs)
