"""torch.compile before and after MagR: no recompilation, the same graph, the new weights."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import text_calib, tiny_llama, tiny_mixtral
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from toys import INT, Shapes, changed, mlp, report_of, state, vectors

from magr_fx import ModelError, magr_quantize, magr_transform

INT3 = IntxWeightOnlyConfig(weight_dtype=INT[3])
# On a CPU inductor writes C++, for which not every machine has a compiler.
COMPILERS = [os.environ.get("CXX", "g++"), "clang++", "c++"]
BACKENDS = ["aot_eager", *(["inductor"] if any(map(shutil.which, COMPILERS)) else [])]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs(counter: CompileCounterWithBackend) -> list[list[tuple[str, str]]]:
    """Op and target of every node of every graph that reached the backend."""
    found: list[Any] = counter.graphs
    return [[(n.op, str(n.target)) for n in graph_module.graph.nodes] for graph_module in found]


@pytest.mark.parametrize("build", [mlp, Shapes])
@torch.no_grad()
def test_a_compiled_model_is_rewritten_without_a_recompilation(build: Any) -> None:
    model, (x, *_) = build(), vectors()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter)
    before = compiled(x)
    assert counter.frame_count == 1
    assert magr_transform(compiled, vectors()) is compiled
    assert compiled.magr_report is report_of(model)
    assert [site.name for site in report_of(model).sites] == [
        site.name for site in report_of(magr_transform(build(), vectors())).sites
    ]
    after = compiled(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(after, model(x))
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_compiling_in_place_is_the_same() -> None:
    model, (x, *_) = Shapes(), vectors()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    model(x)
    magr_transform(model, vectors())
    model(x)
    assert counter.frame_count == 1
    assert changed(magr_transform(Shapes(), vectors()), state(model)) == []


@torch.no_grad()
def test_a_part_that_is_compiled_is_the_same() -> None:
    plain = magr_transform(mlp(), vectors())
    model, (x, *_) = mlp(), vectors()
    counter = CompileCounterWithBackend("eager")
    wrapped: Any = torch.compile(model[2], backend=counter)
    model[2] = wrapped
    model(x)
    magr_transform(model, vectors())
    torch.testing.assert_close(model(x), plain(x))
    assert counter.frame_count == 1
    assert [site.name for site in report_of(model).sites] == ["0.weight", "2._orig_mod.weight"]


@torch.no_grad()
@pytest.mark.slow
def test_compiled_after_the_rewrite_the_graph_is_what_it_was() -> None:
    original = tiny_llama()
    model = magr_transform(copy.deepcopy(original), text_calib())
    ids = text_calib()[0]
    compiled = []
    for candidate in (original, model):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        run: Any = torch.compile(candidate, backend=counter)
        logits = run(ids, use_cache=False).logits
        torch.testing.assert_close(logits, candidate(ids).logits)
        compiled.append(graphs(counter))
    assert compiled[0] == compiled[1]
    assert sum(map(len, compiled[0])) > 50


@torch.no_grad()
def test_a_quantized_model_compiles_and_agrees_with_eager() -> None:
    model = magr_quantize(mlp(), vectors(), INT3)
    (x, *_) = vectors()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations too"])
@torch.no_grad()
@pytest.mark.slow
def test_a_model_with_gptqs_codes_compiles_and_agrees_with_eager(dynamic: bool) -> None:
    target = Int8DynamicActivationIntxWeightConfig(INT[4], PerGroup(16)) if dynamic else INT3
    model = magr_quantize(tiny_llama(), text_calib(), target, rounding="gptq", refine=1)
    ids = text_calib()[0]
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    )


@torch.no_grad()
def test_a_model_that_was_compiled_first_runs_on_its_quantized_weights() -> None:
    model, (x, *_) = mlp(), vectors()
    compiled: Any = torch.compile(model, backend="aot_eager")
    before = compiled(x)
    magr_quantize(compiled, vectors(), INT3)
    after = compiled(x)
    torch.testing.assert_close(after, model(x))
    torch.testing.assert_close(after, magr_quantize(mlp(), vectors(), INT3)(x))
    assert (after - before).abs().max() > 1e-2


@torch.no_grad()
def test_trying_a_raw_parameter_does_not_compile_the_model() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    model = Raw()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    magr_quantize(model, vectors(), INT3)
    assert counter.frame_count == 0
    model(vectors()[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_compiled_code_reads_the_new_weights(backend: str) -> None:
    model, (x, *_) = mlp(), vectors()
    compiled: Any = torch.compile(model, backend=backend)
    before = compiled(x)
    magr_transform(compiled, vectors())
    after = compiled(x)
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_same_graph_module_compiles_as_before() -> None:
    (x, *_) = vectors()
    graph_module: fx.GraphModule = torch.export.export(mlp(), (x,)).module()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(graph_module, backend=counter)
    compiled(x)
    magr_transform(graph_module, [x])
    torch.testing.assert_close(compiled(x), graph_module(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "module.compile"])
def test_freezing_is_refused_with_the_remedy(whole: bool) -> None:
    model = mlp()
    before = state(model)
    options: dict[str, Any] = {"freezing": True}
    if whole:
        compiled: Any = torch.compile(model, options=options)
    else:
        compiled, inner = model, model[0]
        inner.compile(options=options)
    with pytest.raises(ModelError, match=r"inductor's freezing.*Call MagR on the model first"):
        magr_transform(compiled, vectors())
    with pytest.raises(ModelError, match="inductor's freezing"):
        magr_quantize(compiled, vectors(), INT3)
    assert changed(model, before) == []


@torch.no_grad()
def test_freezing_afterwards_is_right() -> None:
    if "inductor" not in BACKENDS:
        pytest.skip("needs a C++ compiler")
    model, (x, *_) = mlp(), vectors()
    magr_transform(model, vectors())
    compiled: Any = torch.compile(model, options={"freezing": True})
    torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
@pytest.mark.slow
def test_each_layer_compiled_by_itself() -> None:
    model = tiny_llama()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    ids = text_calib()[0]
    before, frames = model(ids).logits, counter.frame_count
    assert frames > 0
    magr_transform(model, text_calib())
    after = model(ids).logits
    assert counter.frame_count == frames
    assert (after - before).abs().max() > 1e-4
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    torch.testing.assert_close(after, model(ids).logits)


@torch.no_grad()
@pytest.mark.slow
def test_quantized_experts_compile_as_one_graph_and_agree_with_eager() -> None:
    model = tiny_mixtral()
    magr_quantize(model, text_calib(), INT3)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in text_calib():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
