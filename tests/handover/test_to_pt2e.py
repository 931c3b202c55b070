"""magr_quantize with a PT2E quantizer: rewritten, exported, prepared, calibrated, converted."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_helpers import Formula
from tiny_models import activations, text_calib, tiny_bert, tiny_llama
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from toys import changed, mlp, report_of, state, vectors

from magr_fx import (
    CalibrationError,
    ConfigError,
    HandoverError,
    MagRConfig,
    ModelError,
    TraceError,
    magr_quantize,
    magr_transform,
)

DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel.default


class WeightOnly(Quantizer):  # type: ignore[misc]
    """int8 rows of every linear's weight, activations as they are."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        spec = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(),
        )
        for node in model.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        ):
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map={node.args[1]: spec}, _annotated=True
            )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


def x86() -> Quantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def dequantized(graph_module: fx.GraphModule) -> list[Tensor]:
    """The quantized weights' values, in running order."""
    values = []
    for node in graph_module.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        args = [
            getattr(graph_module, str(arg.target)) if isinstance(arg, fx.Node) else arg
            for arg in node.args
        ]
        values.append(DEQUANTIZE(*args))
    return values


@pytest.mark.parametrize("quantizer", [x86, WeightOnly], ids=["x86", "weight only"])
def test_the_graph_holds_the_rewritten_weights_quantized(quantizer: Any) -> None:
    model = mlp()
    by_hand = magr_transform(copy.deepcopy(model), vectors())
    converted: Any = magr_quantize(model, vectors(), quantizer())
    assert isinstance(converted, fx.GraphModule)
    weights = dequantized(converted)
    assert len(weights) == 2
    for values, index in zip(weights, (0, 2), strict=True):
        rewritten = by_hand.get_parameter(f"{index}.weight").detach()
        written = model.get_parameter(f"{index}.weight").detach()
        torch.testing.assert_close(written, rewritten, rtol=0, atol=0)
        step = rewritten.abs().amax(1, keepdim=True) / 127
        assert bool(((values - rewritten).abs() <= 0.51 * step).all())
        assert not torch.equal(values, rewritten)
    for x in vectors():
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=0.05)


def test_it_is_what_pt2e_makes_of_the_rewritten_model() -> None:
    model = mlp()
    converted = magr_quantize(model, vectors(), x86())
    exported = torch.export.export(
        model.eval(), (vectors()[0],), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    prepared = prepare_pt2e(exported.module(), x86())
    for x in vectors():
        prepared(x)
    expected = convert_pt2e(prepared)
    for x in vectors():
        torch.testing.assert_close(converted(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.slow
def test_a_language_model(make: Any) -> None:
    model = make()
    ids = text_calib()[0]
    with torch.no_grad():
        before = model(input_ids=ids)[0]
    calib = [{"input_ids": x} for x in text_calib()]
    converted = magr_quantize(model, calib, WeightOnly(), MagRConfig(damping=1e-3))
    report = report_of(converted)
    assert report is report_of(model)
    assert all(site.quantized for site in report.rewritten)
    assert report.target == "WeightOnly"
    assert converted.meta["magr"] is report
    with torch.no_grad():
        after, rewritten = converted(input_ids=ids)[0], model(input_ids=ids)[0]
    assert 0 < float((after - rewritten).norm() / rewritten.norm()) < 0.05
    assert 0 < float((rewritten - before).norm() / before.norm()) < 0.3


def test_an_exported_graph_is_the_graph() -> None:
    shapes = ({0: torch.export.Dim.AUTO},)
    graph = torch.export.export(mlp(), (vectors()[0],), dynamic_shapes=shapes).module()
    converted = magr_quantize(graph, vectors(), WeightOnly())
    assert len(dequantized(converted)) == 2
    assert [site.quantized for site in report_of(converted).rewritten] == [True, True]


def test_what_the_quantizer_leaves_alone_is_not_reported_as_quantized() -> None:
    class OnlyTheFirst(WeightOnly):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            super().annotate(model)
            last = model.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[
                -1
            ]
            del last.meta["quantization_annotation"]
            return model

    report = report_of(magr_quantize(mlp(), vectors(), OnlyTheFirst()))
    assert {site.name: site.quantized for site in report.rewritten} == {
        "0.weight": True,
        "2.weight": False,
    }


def test_a_quantizer_without_configuration_is_an_error() -> None:
    with pytest.raises(HandoverError, match="X86InductorQuantizer quantized nothing in the graph"):
        magr_quantize(mlp(), vectors(), X86InductorQuantizer())


@pytest.mark.parametrize("options", [{"rounding": "gptq"}, {"propagate": True}])
def test_what_a_quantizer_cannot_be_asked(options: dict[str, Any]) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(ConfigError, match="need a torchao config as target"):
        magr_quantize(model, vectors(), WeightOnly(), **options)
    with pytest.raises(ConfigError, match="give a target, the torchao config"):
        magr_quantize(model, vectors(), WeightOnly(), MagRConfig(alpha="auto"))
    assert changed(model, before) == []


def test_a_model_that_cannot_be_exported_stays_as_it_was() -> None:
    model = Formula(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(32, 4))
    before = state(model)
    with pytest.raises(TraceError, match=r"PT2E needs the graph of torch\.export, which refuses"):
        magr_quantize(model, vectors(), WeightOnly())
    assert changed(model, before) == []


def test_batches_of_another_form_are_refused() -> None:
    model = tiny_bert()
    before = state(model)
    ids = text_calib()[0]
    calib = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    with pytest.raises(CalibrationError, match="batch 1 has other arguments than batch 0"):
        magr_quantize(model, calib, WeightOnly())
    assert changed(model, before) == []


def quantizer() -> Any:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


class BySize(nn.Module):
    """Computes something else for other sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1  # type: ignore[assignment, operator]
        y = self.first(x).relu()
        y = y * 20 if x.shape[1] > 8 else y
        return self.second(y)[0] if x.shape[0] == 1 else self.second(y)


SIZES = [(1, 5), (2, 5), (3, 5), (7, 5), (2, 1), (2, 8), (2, 9), (1, 7), (1, 12), (4, 30)]


@pytest.mark.parametrize("shapes", [[(1, 5)], [(2, 5)], [(2, 5), (3, 7)], [(2, 12)]])
@pytest.mark.slow_if("shapes2")
def test_for_every_size_it_is_right_or_refuses(shapes: list[tuple[int, int]]) -> None:
    model = BySize().eval()
    calib = [activations(*shape, 16, seed=at) for at, shape in enumerate(shapes)]
    kept = [x.clone() for x in calib]
    graph_module: Any = magr_quantize(model, calib, quantizer())
    assert all(map(torch.equal, calib, kept))
    assert model.calls.item() == 0  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own way to copy a graph
        copied = copy.deepcopy(graph_module)
    right, refused = 0, set[tuple[int, int]]()
    for shape in {*SIZES, *shapes}:
        x = activations(*shape, 16, seed=9)
        wanted = model(x).detach()
        for called in (graph_module, copied):
            try:
                got = called(x).detach()
            except ModelError:
                refused.add(shape)
                continue
            assert got.shape == wanted.shape
            assert float((got - wanted).norm() / wanted.norm()) < 0.5
            right += 1
    assert right >= 2 * len(shapes)
    assert refused.isdisjoint(shapes)
    with pytest.raises((ModelError, AssertionError), match=r"made for inputs of|to have dtype"):
        graph_module(calib[0].double())


@pytest.mark.parametrize("step", ["prepare_pt2e", "convert_pt2e"])
def test_what_fails_in_torchao_does_so_before_anything_is_changed(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("of torchao")

    monkeypatch.setattr(f"magr_fx.passes.handover.to_pt2e.{step}", fail)
    model = BySize().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"PT2E cannot quantize BySize .*KeyError.*Nothing was"):
        magr_quantize(model, [activations(2, 5, 16)], quantizer())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CODE = {
    "any": lambda m, x: m.a(x),
    "a batch of one": lambda m, x: m.a(x) * (3 if x.shape[0] == 1 else 1),
    "a long batch of one": lambda m, x: m.a(x) if x.shape[0] > 1 or x.shape[1] < 8 else m.a(x) * 3,
    "a length": lambda m, x: m.a(x) * (3 if x.shape[1] > 4 else 1),
    "an even length": lambda m, x: m.a(x) * (3 if x.shape[1] % 2 else 1),
    "squeezed": lambda m, x: m.a(x).squeeze(0),
    "broadcast": lambda m, x: m.a(x) + m.a(x[:1]),
    "flat": lambda m, x: m.a(x).reshape(-1, 8),
}


@pytest.mark.parametrize("shapes", [[(2, 6)], [(1, 6)], [(1, 6), (4, 6)]], ids=str)
@pytest.mark.parametrize("name", CODE)
@pytest.mark.slow_if("broadcast-[(1, 6), (4, 6)]", "flat-[(2, 6)]", "flat-[(1, 6), (4, 6)]")
def test_every_size_is_right_or_refused(name: str, shapes: list[tuple[int, int]]) -> None:
    model = Formula(CODE[name], a=nn.Linear(32, 8)).eval()
    try:
        converted = magr_quantize(model, [torch.randn(*s, 32) for s in shapes], WeightOnly())
    except CalibrationError:
        assert len(shapes) > 1
        return
    right = []
    for size in [(b, n) for b in (0, 1, 2, 4) for n in (0, 1, 3, 4, 6, 9)]:
        x = torch.randn(*size, 32)
        try:
            result = converted(x)
        except ModelError:
            continue
        torch.testing.assert_close(result, model(x), rtol=0, atol=0.05)
        right.append(size)
    assert set(shapes) <= set(right)
    if name == "any" and shapes != [(1, 6)]:
        assert {(1, 6), (4, 9), (2, 1)} <= set(right)


def test_exported_once_more_it_keeps_what_it_is_right_for() -> None:
    model = Formula(CODE["a length"], a=nn.Linear(32, 8)).eval()
    converted = magr_quantize(model, [torch.randn(2, 6, 32)], WeightOnly())
    auto = torch.export.Dim.AUTO
    shapes = {"inputs_0": {0: auto, 1: auto}}
    again = torch.export.export(converted, (torch.randn(2, 6, 32),), dynamic_shapes=shapes).module()
    x = torch.randn(3, 9, 32)
    torch.testing.assert_close(again(x), converted(x))
    with pytest.raises(AssertionError, match="Guard failed"):
        again(torch.randn(2, 3, 32))
    with pytest.raises(ModelError, match="is not right for"):
        torch.export.export(converted, (torch.randn(2, 3, 32),))


@pytest.mark.parametrize("quantizer", [WeightOnly, x86])
@pytest.mark.parametrize("name", ["vectors", "text"])
@pytest.mark.slow_if("text-WeightOnly", "text-x86")
def test_exported_once_more_it_can_be_saved(name: str, quantizer: Any, tmp_path: Path) -> None:
    """What is loaded computes the same, for other sizes too, and refuses what it refused."""
    model, calib = (mlp(), vectors()) if name == "vectors" else (tiny_llama(), text_calib())
    model.requires_grad_(False)
    converted = magr_quantize(model, calib, quantizer(), MagRConfig(alpha=1e-2))
    first, *_ = calib
    shapes = ({0: torch.export.Dim.AUTO},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
        program = torch.export.export(converted, (first,), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "converted.pt2")
        loaded = torch.export.load(tmp_path / "converted.pt2").module()
    for rows in (len(first), 3, 2):
        x = first[:1].expand(rows, *first.shape[1:]).clone()
        for again, was in zip(tree_leaves(loaded(x)), tree_leaves(converted(x)), strict=True):
            torch.testing.assert_close(again, was, rtol=0, atol=0)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        loaded(first[..., 1:])


def test_a_converted_graph_can_be_copied() -> None:
    converted = magr_quantize(mlp(), vectors(), x86())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
        again = copy.deepcopy(converted)
    x = vectors()[0]
    torch.testing.assert_close(again(x), converted(x), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"not right for \[torch\.float64"):
        again(x.double())


def test_the_check_comes_first_and_names_dtypes() -> None:
    converted = magr_quantize(mlp(), vectors(), x86())
    with pytest.raises(ModelError, match=r"not right for \[torch\.float64"):
        converted(vectors()[0].double())


class Weighted(nn.Module):
    """Two inputs of one dtype and shape, the names of which are in another order than they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(8, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        result: Tensor = self.a(self.table(tokens) * counts[..., None])
        return result


def test_arguments_given_by_name_have_the_places_that_they_had() -> None:
    model = Weighted().eval()
    tokens, counts = torch.arange(6).view(2, 3), torch.tensor([[3, 1, 0], [0, 2, 1]])
    item = {"counts": counts, "tokens": tokens}
    converted = magr_quantize(model, [item], x86())
    expected = converted(**item)
    torch.testing.assert_close(expected, model(**item), rtol=0, atol=0.1)
    assert torch.equal(converted(tokens, counts), expected)
