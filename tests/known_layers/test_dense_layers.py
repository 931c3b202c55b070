"""calibrate_all_experts for the layers that transformers' table does not serve.

The oracle runs transformers' own layer, in float64, once for each expert, with every token routed
there, and follows the weights through it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from expert_models import MODELS, expert_modules, logits
from targets import ASYMMETRIC, intx
from tiny_models import token_ids
from torch import Tensor, nn
from toys import report_of
from weight_oracle import Oracle, Row, oracle, site_matrix

from magr_fx import MagRConfig, magr_quantize, magr_transform
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.known_layers.all_experts import all_experts
from magr_fx.passes.known_layers.as_linears import as_linears
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

EXPERTS = 4
IDS = [token_ids(5, 10, seed=1), token_ids(2, 7, seed=2)]
TOKENS = 64
LAYERS = {
    "llama4": ("Llama4TextMoe",),
    "dbrx": ("DbrxExperts",),
}
STACKS = {"llama4": 2, "dbrx": 3}
layers = pytest.mark.parametrize("name", LAYERS)


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    kept = {name: vars(module).get(name) for name in values}
    vars(module).update(values)
    yield
    for name, value in kept.items():
        if value is None:
            del vars(module)[name]
        else:
            vars(module)[name] = value


def sent_to(expert: int, layer: Any, args: Any, kwargs: Any) -> None:
    """Run the layer with every token routed to one expert alone."""
    kind = type(layer).__name__
    if kind == "DbrxExperts":
        count = args[0].shape[0] * args[0].shape[1]
        layer(args[0], torch.full((count, 1), expert), torch.ones(count, 1).double())
        return

    def llama4(x: Tensor) -> Any:
        alone = torch.arange(EXPERTS) == expert
        found: Tensor = nn.functional.linear(x, router.weight)
        return found.sigmoid() * alone, found

    router = layer.router
    with replaced(router, forward=llama4):
        layer(*args, **kwargs)


def dense_truth(name: str, model: nn.Module) -> dict[Row, Tensor]:
    """The gram of each row of the experts' stacks, were every token at every expert; float64."""
    stacks = {n for n, p in model.named_parameters() if any(p is q for q in stacks_of(model))}
    model = copy.deepcopy(model).double()
    model.requires_grad_(False)
    seen: list[tuple[nn.Module, Any, Any]] = []
    for module in model.modules():
        if type(module).__name__ in LAYERS[name]:
            module.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append((m, args, kwargs)), with_kwargs=True
            )
    result: dict[Row, Tensor] = {}
    with calibration_mode(model):
        for ids in IDS:
            logits(model, ids)
        assert len(seen) == len(IDS) * len(LAYERS[name])
        follow = Oracle(model)
        for layer, args, kwargs in list(seen):
            for expert in range(EXPERTS):
                with follow:
                    sent_to(expert, layer, args, kwargs)
    for matrix, gram in follow.grams.items():
        if matrix.parameter in stacks:
            result.update(dict.fromkeys(matrix.rows, gram))
    return result


def stacks_of(model: nn.Module) -> list[nn.Parameter]:
    if expert_modules(model):
        return [p for module in expert_modules(model) for p in module.parameters(recurse=False)]
    return [p for n, p in model.named_parameters() if ".experts.mlp." in n]


def measured(model: nn.Module, tracing: Tracing) -> tuple[dict[Row, Tensor], dict[str, Any], str]:
    """What the passes find: each row's gram, each site's token count, and what traced it."""
    batches = read_calib(IDS, model)
    rows: dict[Row, Tensor] = {}
    tokens: dict[str, Any] = {}
    with calibration_mode(model):
        traced = trace_or_read(model, batches, tracing)
        found = find_linears(dict.fromkeys(batch.trace for batch in traced), model)
        for shared in chain.from_iterable(
            CalibrationRun(traced, found.sites).collect(progress=False)
        ):
            for site in shared.sites:
                matrix, gram = site_matrix(model, site, shared.collected)
                rows.update(dict.fromkeys(matrix.rows, gram))
                tokens[site.name] = int(shared.tokens)
    return rows, tokens, traced[0].trace.tracer


def assert_same(measured: dict[Row, Tensor], expected: dict[Row, Tensor]) -> None:
    pairs = {(id(measured[row]), id(expected[row])): row for row in expected}
    for row in pairs.values():
        error = (measured[row] - expected[row]).abs().max() / expected[row].abs().max()
        assert float(error) < 1e-5, row.parameter


@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@layers
@pytest.mark.slow_if("llama4-export", "dbrx-export")
def test_statistics_are_those_of_all_tokens(name: str, tracer: str) -> None:
    model = MODELS[name]()
    expected = dense_truth(name, model)
    assert len({row.parameter for row in expected}) == STACKS[name]
    rows, tokens, traced_by = measured(model, Tracing(tracer, all_experts=True))
    assert traced_by == tracer
    assert expected.keys() <= rows.keys()
    assert_same(rows, expected)
    experts = [count for site, count in tokens.items() if site.endswith("]")]
    assert experts == [TOKENS] * (EXPERTS * STACKS[name])
    # All other weights are given what they were given before.
    truth = oracle(model, read_calib(IDS, model))
    others = {row: gram for matrix, gram in truth.items() for row in matrix.rows}
    known = {row: gram for row, gram in others.items() if row in rows and row not in expected}
    assert known
    assert_same(rows, known)
    # Which the routed tokens alone would not have given.
    for row in expected.keys() & others.keys():
        assert (others[row] - expected[row]).abs().max() > 1e-3


@layers
def test_the_outputs_stay(name: str) -> None:
    model = MODELS[name]()
    before = [dict(vars(module)) for module in model.modules()]
    wanted = logits(model, IDS[0])
    with all_experts(model):
        assert [dict(vars(module)) for module in model.modules()] != before
        got = logits(model, IDS[0])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert [dict(vars(module)) for module in model.modules()] == before


@layers
def test_after_an_error_the_layers_are_as_before(name: str) -> None:
    model = MODELS[name]()
    before = [dict(vars(module)) for module in model.modules()]

    def interrupted() -> None:
        with all_experts(model):
            assert [dict(vars(module)) for module in model.modules()] != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_forward_that_was_wrapped_is_put_back() -> None:
    model = MODELS["dbrx"]()
    layer: Any = next(m for m in model.modules() if type(m).__name__ == "DbrxExperts")
    layer.forward = wrapped = functools.partial(layer.forward)
    with all_experts(model):
        assert layer.forward is not wrapped
    assert layer.forward is wrapped


@layers
@pytest.mark.slow_unless("dbrx")
def test_padding(name: str) -> None:
    mask = torch.ones_like(IDS[0])
    mask[0, 6:] = 0
    mask[3, 2:] = 0
    model = MODELS[name]()
    calib = [{"input_ids": IDS[0], "attention_mask": mask}]
    magr_transform(model, calib, MagRConfig(alpha=1e-3), calibrate_all_experts=True)
    experts = [site for site in report_of(model).sites if site.name.endswith("]")]
    # The rows that Llama 4 repeats for each expert are not told apart, and the report says so.
    counted = name == "llama4"
    tokens = mask.numel() if counted else int(mask.sum())
    assert [site.tokens for site in experts] == [tokens] * (EXPERTS * STACKS[name])
    assert all(("padding is counted" in site.reason) == counted for site in experts)


@layers
@pytest.mark.slow_unless("llama4")
def test_one_token_calibrates_every_expert_and_all_are_quantized(name: str) -> None:
    model = MODELS[name]()
    magr_quantize(
        model,
        [token_ids(1, 1, seed=5)],
        intx(4, ASYMMETRIC, None),
        MagRConfig(alpha=1e-3),
        propagate=False,
        holdout=0.0,
        calibrate_all_experts=True,
        strict=True,
    )
    report = report_of(model)
    assert [site.name for site in report.skipped] == [
        next(n for n, m in MODELS[name]().named_modules() if isinstance(m, nn.Embedding))
        + ".weight"
    ]
    experts = [site for site in report.rewritten if site.name.endswith("]")]
    assert [(s.tokens, s.quantized) for s in experts] == [(1, True)] * (EXPERTS * STACKS[name])


@layers
@pytest.mark.slow
def test_behind_quantized_layers(name: str) -> None:
    model = MODELS[name]()
    magr_quantize(model, IDS, intx(4, ASYMMETRIC, None), calibrate_all_experts=True, holdout=0.0)
    experts = [site for site in report_of(model).rewritten if site.name.endswith("]")]
    assert [site.tokens for site in experts] == [TOKENS] * (EXPERTS * STACKS[name])
    assert all(site.quantized for site in experts)


@pytest.mark.slow
def test_llama_4_as_linears() -> None:
    model = as_linears(MODELS["llama4"]())
    _, tokens, _ = measured(model, Tracing(all_experts=True))
    experts = [count for site, count in tokens.items() if ".experts." in site]
    assert experts == [TOKENS] * (EXPERTS * STACKS["llama4"])
