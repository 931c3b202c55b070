"""Finding the weights: every form of a matmul, and a reason for each weight that is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import (
    Analysis,
    Formula,
    analyse,
    architecture,
    assert_gram,
    collect,
    gram_of,
    trace,
    weight,
)
from matmul_forms import FORMS, IN, OUT, ROWS, TOKENS, form_analysis
from tiny_models import ARCHITECTURES, activations, tiny_llama, tiny_qwen2, token_ids
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from magr_fx.errors import ConfigError, ModelError
from magr_fx.passes.finding.find_linears import UNREACHED, find_linears

# ---- what is found


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_form_of_a_matmul(name: str) -> None:
    form = FORMS[name]
    analysis = form_analysis(name)
    assert {site.name for site in analysis.found.sites} == set(form.sites)
    for site in analysis.found.sites:
        expected = form.sites[site.name]
        torch.testing.assert_close(
            site.weight, expected.weight(analysis.model).detach(), rtol=0, atol=0
        )
        assert site.shape == site.weight.shape
        assert len(site.calls) == expected.calls * len(analysis.traces)
        assert [call.direct for call in site.calls] == [form.direct] * len(site.calls)
        assert not site.weight.requires_grad


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_site_writes_what_the_matmul_reads(name: str) -> None:
    """With every site doubled, the model computes what it does with every weight doubled."""
    form = FORMS[name]
    analysis, doubled = form_analysis(name), form.model()
    with torch.no_grad():
        for expected in form.sites.values():
            expected.weight(doubled).mul_(2)
        for site in analysis.found.sites:
            site.weight.mul_(2)
        for item in form.inputs:
            torch.testing.assert_close(analysis.model(item), doubled(item), rtol=0, atol=0)
        for site in analysis.found.sites:
            site.weight.div_(2)  # the analysis is shared with other tests


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures(name: str) -> None:
    _, _, sites, inputs = ARCHITECTURES[name]
    analysis = architecture(name)
    assert len(analysis.found.sites) == sites
    assert len(analysis.run().grams) == inputs
    tables = {id(m.weight) for m in analysis.model.modules() if isinstance(m, nn.Embedding)}
    linears = {
        f"{module_name}.weight": tuple(module.weight.shape)
        for module_name, module in analysis.model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in tables
    }
    assert analysis.shapes == linears
    for site in analysis.found.sites:
        assert site.owner is analysis.model.get_submodule(site.owner_name)
        assert site.is_linear_weight
        assert [call.direct for call in site.calls] == [True]


def attention(*inputs: Tensor) -> Analysis:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    return analyse(model, [inputs])


def test_self_attention_is_one_input() -> None:
    x = activations(2, 5, 8)
    analysis = attention(x, x, x)
    assert analysis.shapes == {"in_proj_weight": (24, 8), "out_proj.weight": (8, 8)}


def test_cross_attention_reads_slices_of_one_parameter() -> None:
    query, key, value = (activations(2, length, 8, seed=length) for length in (3, 5, 5))
    analysis = attention(query, key, value + 1)
    assert analysis.shapes == {
        "in_proj_weight[0:8]": (8, 8),
        "in_proj_weight[8:16]": (8, 8),
        "in_proj_weight[16:24]": (8, 8),
        "out_proj.weight": (8, 8),
    }
    grams = collect(analysis)
    for name, x in zip(["[0:8]", "[8:16]", "[16:24]"], [query, key, value + 1], strict=True):
        gram = grams[f"in_proj_weight{name}"].gram
        assert_gram(gram, gram_of(x))


def test_keys_that_are_values_are_one_slice() -> None:
    query, memory = activations(2, 3, 8), activations(2, 5, 8, seed=1)
    assert attention(query, memory, memory).shapes == {
        "in_proj_weight[0:8]": (8, 8),
        "in_proj_weight[8:24]": (16, 8),
        "out_proj.weight": (8, 8),
    }


def test_the_fast_path_hides_no_linear() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    analysis = analyse(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), TOKENS)
    names = [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]
    assert list(analysis.shapes) == [f"layers.{i}.{name}" for i in range(2) for name in names]


def linear(width: int = IN, out: int = OUT) -> nn.Linear:
    torch.manual_seed(width * out)
    return nn.Linear(width, out)


def test_aliases_are_one_site_under_the_first_name() -> None:
    shared = linear()
    model = Formula(lambda m, x: m.a(x) + m.b(x.relu()), a=shared, b=nn.Linear(IN, OUT))
    model.b.weight = shared.weight
    analysis = analyse(model, TOKENS)
    assert analysis.shapes == {"a.weight": (OUT, IN)}
    (site,) = analysis.found.sites
    assert len(site.calls) == 2
    gram = collect(analysis)["a.weight"].gram
    assert_gram(gram, gram_of(*TOKENS, *(x.relu() for x in TOKENS)))


def test_parameters_over_one_memory_are_one_site() -> None:
    memory = activations(OUT, IN)
    parts = {name: nn.Parameter(memory) for name in "abc"}
    analysis = analyse(
        Formula(lambda m, x: F.linear(x, m.a) + F.linear(x.relu(), m.b) + x @ m.c.T, **parts),
        TOKENS,
    )
    assert analysis.shapes == {"a": (OUT, IN)}
    assert len(analysis.found.sites[0].calls) == 3
    assert analysis.reasons == {}


def test_parameters_side_by_side_in_one_memory_are_apart() -> None:
    """As flattened parameters are."""
    flat = activations(2 * OUT * IN)
    parts = {
        n: nn.Parameter(part.view(OUT, IN)) for n, part in zip("ab", flat.chunk(2), strict=True)
    }
    model = Formula(lambda m, x: F.linear(x, m.a) + F.linear(x, m.b).sum() * m.b.sum(), **parts)
    analysis = analyse(model, TOKENS)
    assert analysis.shapes == {"a": (OUT, IN)}
    assert list(analysis.reasons) == ["b"]


def test_sites_of_several_traces_are_one() -> None:
    analysis = analyse(linear(), [TOKENS[0], TOKENS[0][:1], ROWS[0]])
    assert len(analysis.traces) == 3
    (site,) = analysis.found.sites
    assert [call.trace for call in site.calls] == analysis.traces


def test_dropout_and_training_mode_are_no_obstacle() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.9), linear(OUT, OUT)).train()
    analysis = analyse(model, TOKENS)
    assert list(analysis.shapes) == ["0.weight", "2.weight"]
    assert all(module.training for module in model.modules())
    gram = collect(analysis)["2.weight"].gram
    with torch.no_grad():
        assert_gram(gram, gram_of(*(model[0](x) for x in TOKENS)))


def on_the_result(x: Tensor) -> None:
    x.mul_(2)


def through_a_view(x: Tensor) -> None:
    """The graph then still names the tensor as before."""
    x.view(-1)[:].mul_(2)


@pytest.mark.parametrize("double", [on_the_result, through_a_view])
def test_an_in_place_op_makes_another_input(double: Callable[[Tensor], None]) -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = x * 1
        before = m.a(x) + m.b(x)
        double(x)
        return before + m.c(x) + m.d(x)

    analysis = analyse(Formula(function, **{name: linear() for name in "abcd"}), TOKENS)
    assert [[site.name for site in gram.sites] for gram in analysis.run().grams] == [
        ["a.weight", "b.weight"],
        ["c.weight", "d.weight"],
    ]
    grams = collect(analysis)
    assert_gram(grams["a.weight"].gram, gram_of(*TOKENS))
    assert_gram(grams["c.weight"].gram, 4 * gram_of(*TOKENS))


# ---- what is left alone


def tied(m: Any, ids: Tensor) -> Any:
    return F.linear(m.table(ids), m.table.weight)


def half_tied(m: Any, ids: Tensor) -> Any:
    return F.linear(m.table(ids), m.w)


def keeps(m: Any, x: Tensor) -> Any:
    return F.linear(x, m.w), m.w


IDS = [token_ids(2, 5), token_ids(3, 4)]
square = {"w": lambda: weight(IN, IN)}

# name → (function, parts, calibration, {parameter: reason})
LEFT_ALONE: dict[str, tuple[Callable[..., Any], dict[str, Any], list[Any], dict[str, str]]] = {
    "LoRA": (
        lambda m, x: F.linear(x, m.w + m.b @ m.a),
        {"w": weight(OUT, IN), "a": weight(2, IN), "b": weight(OUT, 2)},
        TOKENS,
        dict.fromkeys(
            "wab", r"read by aten\.linear, after aten\.add\.Tensor computed the weight: no matmul"
        ),
    ),
    "a scaled weight": (
        lambda m, x: F.linear(x, m.w * m.s),
        {"w": weight(OUT, IN), "s": weight(OUT, 1)},
        TOKENS,
        {"w": r"after aten\.mul\.Tensor computed", "s": r"after aten\.mul\.Tensor computed"},
    ),
    "a weight of two": (
        lambda m, x: F.linear(x, torch.cat([m.a, m.b])),
        {"a": weight(OUT, IN), "b": weight(OUT, IN)},
        TOKENS,
        {"a": r"after aten\.cat computed", "b": r"after aten\.cat computed"},
    ),
    "a view of what was computed": (
        lambda m, x: x @ m.w.tanh().T,
        {"w": weight(OUT, IN)},
        TOKENS,
        {"w": r"read by aten\.matmul, after aten\.tanh computed the weight"},
    ),
    "a weight that a buffer masks": (
        lambda m, x: F.linear(x, m.w * m.mask) + m.a(x),
        {"a": linear(), "w": weight(OUT, IN), "mask": nn.Buffer(torch.ones(OUT, IN))},
        TOKENS,
        {"w": r"aten\.linear, after aten\.mul\.Tensor computed the weight: no matmul"},
    ),
    "LoRA by F.linear": (
        lambda m, x: F.linear(x, m.w + F.linear(m.a.T, m.b).T) + m.c(x),
        {"w": weight(OUT, IN), "a": weight(2, IN), "b": weight(OUT, 2), "c": linear()},
        TOKENS,
        {
            "w": r"aten\.linear, after aten\.add\.Tensor computed the weight",
            "a": r"read by aten\.linear as its input",
        },
    ),
    "recurrence": (
        lambda m, x: m.a(m.rnn(x)[0]),
        {"a": linear(), "rnn": nn.LSTM(IN, IN, batch_first=True)},
        TOKENS,
        {
            "rnn.weight_ih_l0": r"read by aten\.lstm\.input: no matmul that can be rewritten",
            "rnn.weight_hh_l0": r"read by aten\.lstm\.input: no matmul that can be rewritten",
        },
    ),
    "a product of three": (
        lambda m, x: m.a(x[0]) + torch.linalg.multi_dot([x[0], m.w, m.v]),
        {"a": linear(), "w": weight(IN, IN), "v": weight(IN, OUT)},
        TOKENS,
        dict.fromkeys("wv", r"read by aten\.linalg_multi_dot: no matmul that can be rewritten"),
    ),
    "a bilinear form": (
        lambda m, x: m.a(m.two(x, x.relu())),
        {"a": linear(), "two": nn.Bilinear(IN, IN, IN)},
        TOKENS,
        {"two.weight": r"read by aten\.bilinear: no matmul that can be rewritten"},
    ),
    "a tied bag of embeddings": (
        lambda m, ids: F.linear(F.embedding_bag(ids, m.w), m.w),
        {"w": weight(64, IN)},
        IDS,
        {"w": "tied: an embedding shares this weight"},
    ),
    "an embedding table": (
        lambda m, ids: m.a(m.table(ids)),
        {"table": nn.Embedding(64, IN), "a": linear()},
        IDS,
        {"table.weight": "an embedding table, not a matmul"},
    ),
    "a tied head": (
        tied,
        {"table": nn.Embedding(64, IN)},
        IDS,
        {"table.weight": "tied: an embedding shares this weight, and would change with it"},
    ),
    "a head over the table's memory": (
        half_tied,
        {"table": (table := nn.Embedding(64, IN)), "w": nn.Parameter(table.weight.data)},
        IDS,
        {"table.weight": "an embedding table", "w": "tied: an embedding shares this weight"},
    ),
    "a head over a part of the table": (
        half_tied,
        {"table": table, "w": nn.Parameter(table.weight.data[8:16])},
        IDS,
        {"table.weight": "an embedding table", "w": "tied: an embedding shares this weight"},
    ),
    "a functional embedding": (
        lambda m, ids: F.linear(F.embedding(ids, m.w), m.w),
        {"w": weight(64, IN)},
        IDS,
        {"w": "tied: an embedding shares this weight"},
    ),
    "an embedding module that is not run": (
        lambda m, x: F.linear(x, m.table.weight),
        {"table": nn.Embedding(64, IN)},
        TOKENS,
        {"table.weight": "tied: an embedding shares this weight"},
    ),
    "read elsewhere": (
        lambda m, x: F.linear(x, m.w) + m.w.sum(),
        {"w": weight(OUT, IN)},
        TOKENS,
        {"w": r"also read by aten\.add\.Tensor, whose result would change"},
    ),
    "read elsewhere under another name": (
        lambda m, x: F.linear(x, m.w) * m.v[0, 0],
        {"w": (first := weight(OUT, IN)), "v": nn.Parameter(first.data)},
        TOKENS,
        {"w": r"also read by aten\.mul\.Tensor", "v": r"read by aten\.mul\.Tensor"},
    ),
    "a part read elsewhere under another name": (
        lambda m, x: F.linear(x, m.w) + (x @ m.v.sum(0))[..., None],
        {"w": first, "v": nn.Parameter(first.data[1:3])},
        TOKENS,
        {"w": r"also read by aten\.matmul, after aten\.sum\.dim_IntList", "v": "read by"},
    ),
    "read in several ways": (
        lambda m, x: (F.linear(x, m.w) * m.w.sum()).relu() + m.w[0, 0],
        {"w": weight(OUT, IN)},
        TOKENS,
        {"w": r"also read by aten\.mul\.Tensor, aten\.add\.Tensor, whose"},
    ),
    "returned": (keeps, {"w": weight(OUT, IN)}, TOKENS, {"w": r"also read by the model's output"}),
    "only returned": (
        lambda m, x: (m.a(x), m.w),
        {"a": linear(), "w": weight(OUT, IN)},
        TOKENS,
        {"w": r"read by the model's output: no matmul"},
    ),
    "a bias": (
        lambda m, x: torch.addmm(m.b, x, m.w) + torch.mm(x, m.b),
        {"w": weight(IN, IN), "b": weight(IN, IN)},
        [activations(IN, IN)],
        {"b": r"also read by aten\.addmm as a bias"},
    ),
    "a weight that is its own bias": (
        lambda m, x: torch.addmm(m.w, x, m.w),
        {"w": weight(IN, IN)},
        [activations(IN, IN)],
        {"w": r"read by aten\.addmm: no matmul"},
    ),
    "both operands": (
        lambda m, x: m.a(x) @ (m.w @ m.v),
        {"a": linear(), "w": weight(OUT, IN), "v": weight(IN, OUT)},
        TOKENS,
        {"w": r"after aten\.matmul computed", "v": r"after aten\.matmul computed"},
    ),
    "overlapping slices": (
        lambda m, x: F.linear(x, m.w[:4]).sum() + F.linear(x.relu(), m.w[2:]).sum(),
        {"w": weight(OUT, IN)},
        TOKENS,
        {"w[0:4]": r"overlaps w\[2:6\]", "w[2:6]": r"overlaps w\[0:4\]"},
    ),
    "a slice and the whole": (
        lambda m, x: F.linear(x, m.w[:4]).sum() + F.linear(x, m.w),
        {"w": weight(OUT, IN)},
        TOKENS,
        {"w[0:4]": r"overlaps w, which is multiplied with other inputs", "w": r"overlaps w\[0:4\]"},
    ),
    "a weight and its transpose": (
        lambda m, x: F.linear(F.linear(x, m.w), m.w.T),
        {"w": weight(OUT, IN)},
        TOKENS,
        {"w": "overlaps w, which is multiplied with other inputs"},
    ),
    "a slice as long as the input": (
        lambda m, x: m.a(x) + (m.w[: x.shape[1], : x.shape[1]] @ x)[..., :OUT],
        {"a": linear(), "w": weight(9, 9)},
        TOKENS,
        {"w": r"aten\.matmul, whose operand is no view of the stored parameter"},
    ),
    "a matrix chosen by the input's length": (
        lambda m, x: m.a(x) + x @ m.w[x.shape[1] - 3],
        {"a": linear(), "w": weight(4, IN, OUT)},
        TOKENS,
        {"w": r"aten\.matmul, whose operand is no view of the stored parameter"},
    ),
    "rows repeated as often as the input is long": (
        lambda m, x: m.a(x) + (m.w.expand(x.shape[1], IN) @ x.mT).sum(),
        {"a": linear(), "w": weight(1, IN)},
        TOKENS,
        {"w": r"aten\.matmul, whose operand is no view of the stored parameter"},
    ),
    "a matrix that repeats a row": (
        lambda m, x: m.a(x) + F.linear(x, m.w.expand(OUT, IN)),
        {"a": linear(), "w": weight(1, IN)},
        TOKENS,
        {"w": r"aten\.linear, whose operand is a matrix that repeats its elements"},
    ),
    "a merged view of a transposed weight": (
        lambda m, x: m.a(x) + F.linear(x, m.w.T.reshape(OUT, IN)),
        {"a": linear(), "w": weight(OUT, IN)},
        TOKENS,
        {"w": r"aten\.linear, whose operand is no view of the stored parameter"},
    ),
    "a vector": (
        lambda m, x: m.a(x) + (x @ m.w[0])[..., None],
        {"a": linear(), "w": weight(OUT, IN)},
        TOKENS,
        {"w": r"aten\.matmul, whose operand is a vector"},
    ),
    "a convolution": (
        lambda m, x: m.a(m.conv(x.mT).mT),
        {"a": linear(), "conv": nn.Conv1d(IN, IN, 3, padding=1)},
        TOKENS,
        {"conv.weight": r"read by aten\.conv1d: no matmul that can be rewritten"},
    ),
    "an einsum": (
        lambda m, x: m.a(torch.einsum("bti,oij->bto", x, m.w)),
        {"a": linear(), "w": weight(IN, IN, 2)},
        TOKENS,
        {"w": r"read by aten\.einsum: no matmul that can be rewritten"},
    ),
    "changed in place": (
        lambda m, x: F.linear(x, m.w.detach().clamp_(-1, 1)) + m.a(x),
        {"a": linear(), "w": weight(OUT, IN)},
        TOKENS,
        {"w": r"aten\.clamp_"},
    ),
    "complex numbers": (
        lambda m, x: m.a((x.to(torch.complex64) @ m.w).real),
        {"a": linear(), "w": nn.Parameter(weight(IN, IN).data.to(torch.complex64))},
        TOKENS,
        {"w": r"stored as torch\.complex64"},
    ),
    "a weight made complex": (
        lambda m, x: m.a((x.to(torch.complex64) @ m.w.to(torch.complex64)).real),
        {"a": linear(), "w": weight(IN, IN)},
        TOKENS,
        {"w": r"aten\.matmul in torch\.complex64, of a torch\.float32 weight"},
    ),
    "stored integers": (
        lambda m, x: F.linear(x, m.w.float()) + m.a(x),
        {
            "a": linear(),
            "w": nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False),
        },
        TOKENS,
        {"w": r"stored as torch\.int8"},
    ),
    "not used": (
        lambda m, x: m.a(x),
        {"a": linear(), "unused": nn.Linear(3, 4)},
        TOKENS,
        {"unused.weight": f"^{UNREACHED}$"},
    ),
    "only its shape is used": (
        lambda m, x: m.a(x) * m.unused.weight.shape[0],
        {"a": linear(), "unused": nn.Linear(3, 4)},
        TOKENS,
        {"unused.weight": f"^{UNREACHED}$"},
    ),
}


@pytest.mark.parametrize("name", sorted(LEFT_ALONE))
@pytest.mark.slow_if("recurrence", "returned")
def test_a_weight_is_left_alone_with_its_reason(name: str) -> None:
    function, parts, calib, reasons = LEFT_ALONE[name]

    def beside_another_site(m: Any, x: Tensor) -> Any:
        return function(m, x), m.extra(torch.ones(2, IN))

    model = Formula(beside_another_site, extra=linear(), **parts)
    analysis = analyse(model, calib)
    assert set(analysis.reasons) == set(reasons)
    for rejection in analysis.found.rejections:
        assert re.search(reasons[rejection.name], rejection.reason), rejection.reason
        parameter = rejection.name.partition("[")[0]
        assert model.get_parameter(parameter) is rejection.parameter
        assert model.get_submodule(parameter.rpartition(".")[0]) is rejection.owner
    left_alone = {reason.partition("[")[0] for reason in reasons}
    others = {n for n, p in model.named_parameters() if p.dim() > 1} - left_alone
    assert others == {site.name for site in analysis.found.sites}


def test_overlapping_parts_are_each_reported_with_their_shape() -> None:
    model = Formula(
        lambda m, x: F.linear(F.linear(x, m.w), m.w.T) + m.a(x), w=weight(OUT, IN), a=linear(IN, IN)
    )
    analysis = analyse(model, TOKENS)
    assert sorted(r.shape for r in analysis.found.rejections) == [(OUT, IN), (IN, OUT)]


@pytest.mark.parametrize(
    ("parametrise", "names"),
    [
        (nn.utils.parametrizations.weight_norm, {"original0", "original1"}),
        (nn.utils.parametrizations.orthogonal, {"original"}),
    ],
)
def test_a_parametrised_weight_is_left_alone(
    parametrise: Callable[..., nn.Module], names: set[str]
) -> None:
    model = nn.Sequential(linear(IN, IN), parametrise(linear(IN, IN)))
    analysis = analyse(model, TOKENS)
    assert analysis.shapes == {"0.weight": (IN, IN)}
    assert set(analysis.reasons) == {f"1.parametrizations.weight.{name}" for name in names}
    for reason in analysis.reasons.values():
        assert re.search(r"read by aten\.\w+, after .* computed the weight", reason)


def test_a_linear_in_an_autocast_region_is_found() -> None:
    def function(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = m.a(x)
        return m.b(y.float())

    analysis = analyse(Formula(function, a=linear(), b=linear(OUT, OUT)), TOKENS)
    assert analysis.shapes == {"a.weight": (OUT, IN), "b.weight": (OUT, OUT)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [analysis.model.get_submodule("a")(x).float() for x in TOKENS]
    grams = collect(analysis)
    assert_gram(grams["a.weight"].gram, gram_of(*TOKENS))
    assert_gram(grams["b.weight"].gram, gram_of(*outputs))


def test_an_operand_that_is_a_buffer_is_an_input() -> None:
    model = Formula(
        lambda m, x: F.linear(m.positions, m.w)[: x.shape[1]] + m.a(x),
        w=weight(OUT, IN),
        a=linear(),
    )
    model.register_buffer("positions", activations(9, IN))
    gram = collect(analyse(model, TOKENS))["w"].gram
    assert_gram(gram, 2 * gram_of(model.positions))


# ---- filter_fn


def test_the_filter_is_asked_with_the_owner_and_its_name() -> None:
    model = tiny_llama(num_hidden_layers=1)
    _, traced = trace(model, [token_ids(2, 5)])
    asked: dict[str, nn.Module] = {}

    def only_mlp(module: nn.Module, fqn: str) -> bool:
        asked[fqn] = module
        return ".mlp." in fqn

    found = find_linears([traced[0].trace], model, only_mlp)
    assert asked == {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert [site.name for site in found.sites] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    reasons = {r.name: r.reason for r in found.rejections}
    assert reasons.pop("model.embed_tokens.weight") == "an embedding table, not a matmul"
    assert set(reasons.values()) == {"left out by filter_fn"}
    assert len(reasons) == 5


def test_the_filter_is_not_asked_about_what_is_rejected_anyway() -> None:
    model = tiny_qwen2(num_hidden_layers=1)
    _, traced = trace(model, [token_ids(2, 5)])

    def asked(module: nn.Module, fqn: str) -> bool:
        assert fqn not in ("lm_head", "model.embed_tokens")
        return True

    assert len(find_linears([traced[0].trace], model, asked).sites) == 7


def test_the_root_is_named_by_an_empty_string() -> None:
    found = analyse(
        Formula(lambda m, x: F.linear(x, m.w) + m.a(x), w=weight(OUT, IN), a=linear()),
        TOKENS,
        lambda module, fqn: fqn == "",
    ).found
    assert [(site.name, site.owner_name, type(site.owner)) for site in found.sites] == [
        ("w", "", Formula)
    ]


def test_a_filter_that_matches_nothing() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(OUT, OUT))
    with pytest.raises(ConfigError, match=r"none of the 2 weights \(the first are owned by 0, 2\)"):
        analyse(model, TOKENS, lambda module, fqn: False)


# ---- models without a site


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), r"ReLU has no weight matmul .*: it has no parameter of two dimensions"),
        (nn.LayerNorm(IN), r"LayerNorm has no weight matmul .*: it has no parameter of two"),
        (
            nn.Sequential(nn.Conv1d(5, 5, 1), nn.Conv1d(5, 5, 1)),
            r"\(0\.weight: read by aten\.conv1d: no .*; 1\.weight: read by aten\.conv1d",
        ),
        (
            Formula(lambda m, x: x @ (m.w * 2), w=weight(IN, OUT)),
            r"\(w: read by aten\.matmul, after aten\.mul\.Tensor computed the weight",
        ),
        (Formula(lambda m, x: x * 2, a=linear()), rf"\(a\.weight: {UNREACHED}\)"),
    ],
)
def test_a_model_without_a_site(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        analyse(model, [activations(2, 5, IN)])


# ---- memory that is not a parameter's


class Shared(nn.Module):
    """A linear whose weight lies in the memory of another tensor, too."""

    flat: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
        self.how = how
        if how == "buffer":
            self.register_buffer("initial", self.linear.weight.data)
        elif how == "slice of a buffer":
            self.register_buffer("flat", torch.randn(2 * IN * OUT))
            self.linear.weight = nn.Parameter(self.flat[: IN * OUT].view(OUT, IN))
        else:
            self.plain = self.linear.weight.data.T

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.other(x)
        return y + x @ self.plain if self.how == "plain attribute" else y


@pytest.mark.parametrize("how", ["buffer", "slice of a buffer", "plain attribute"])
def test_a_weight_in_the_memory_of_a_fixed_tensor_is_left_alone(how: str) -> None:
    found = analyse(Shared(how), [activations(3, IN)]).found
    assert [site.name for site in found.sites] == ["other.weight"]
    (reason,) = (r.reason for r in found.rejections if r.name == "linear.weight")
    assert "shares its memory with the " in reason
    assert ("constant" if how == "plain attribute" else "buffer") in reason


def test_a_sparse_buffer_shares_no_memory() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    model.register_buffer("graph", torch.eye(4).to_sparse())
    found = analyse(model, [activations(3, IN)]).found
    assert [site.name for site in found.sites] == ["0.weight"]
