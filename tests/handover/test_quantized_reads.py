"""What torchao's tensors cannot run is found before: however a model reads its weights, it runs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from graph_helpers import Formula
from tiny_models import activations, tiny_llama
from torch import Tensor, nn
from torch.nn import functional
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from torchao.utils import TorchAOBaseTensor
from toys import INT, WIDTH, changed, report_of, state

from magr_fx import CoverageError, ModelError, magr_quantize
from magr_fx.api import quantize_apart
from magr_fx.config import QuantizeOptions
from magr_fx.passes.handover import quantized_reads
from magr_fx.passes.handover.quantized_reads import QuantizedReads
from magr_fx.passes.handover.target import Target
from magr_fx.passes.handover.torchao_rounding import dequantized
from magr_fx.passes.rewriting.pipeline import resolve_config
from magr_fx.passes.rewriting.request import Request

INT4 = IntxWeightOnlyConfig(weight_dtype=INT[4])
TARGETS = [
    INT4,
    Int8WeightOnlyConfig(set_inductor_config=False),
    Int8DynamicActivationIntxWeightConfig(INT[4], PerGroup(16)),
    Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
]


def lost(x: Tensor, _: Tensor) -> Any:
    raise AssertionError("a function that is never called")


class Own(nn.Linear):
    """A linear with a forward of its own, as LoRA's or a scaled one."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, weight=self.weight, bias=self.bias) * 2


class Fused(nn.Module):
    """Attention's projections in the manner of BEiT: the weight of a linear that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.q_bias))  # type: ignore[arg-type]
        q, k, v = functional.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return functional.scaled_dot_product_attention(q, k, v)


def _of_its_type(m: Any, x: Tensor) -> Tensor:
    if type(m.a.weight.data) is not Tensor:
        raise TypeError("an ordinary weight, please")
    return m.a(x)  # type: ignore[no-any-return]


def _with_out(m: Any, x: Tensor) -> Tensor:
    return torch.mm(x[0], m.a.weight.t(), out=x.new_empty(x.shape[1], WIDTH))[None]


# Whether torchao's tensors run in them, where that does not depend on the target.
READS: dict[str, tuple[Callable[[Any, Tensor], Any], bool | None]] = {
    "as nn.Linear": (lambda m, x: m.a(x), True),
    "F.linear": (lambda m, x: functional.linear(x, m.a.weight, m.a.bias), True),
    "F.linear, by keyword": (
        lambda m, x: functional.linear(x, weight=m.a.weight, bias=m.a.bias),
        False,
    ),
    "aten.linear": (lambda m, x: torch.ops.aten.linear.default(x, m.a.weight, m.a.bias), False),
    "its dtype and device": (
        lambda m, x: m.a(x.to(m.a.weight.dtype).to(device=m.a.weight.device)),
        True,
    ),
    "its shape": (lambda m, x: m.a(x.view(-1, m.a.weight.shape[1])).view(x.shape), True),
    "its type": (_of_its_type, False),
    "row by row": (
        lambda m, x: torch.stack([functional.linear(r, m.a.weight) for r in x[0].unbind()])[None],
        None,
    ),
    "no row": (lambda m, x: torch.cat([m.a(x[:, :0]), m.a(x)], 1), None),
    "data": (lambda m, x: functional.linear(x, m.a.weight.data), None),
    "a cast to what it is": (lambda m, x: functional.linear(x, m.a.weight.to(x.dtype)), None),
    "contiguous": (lambda m, x: functional.linear(x, m.a.weight.contiguous()), None),
    "matmul": (lambda m, x: torch.matmul(x, m.a.weight.T), None),
    "addmm": (lambda m, x: torch.addmm(m.a.bias, x[0], m.a.weight.t())[None], None),
    "mm with out": (_with_out, None),
    "cat": (
        lambda m, x: functional.linear(x, torch.cat([m.a.weight, m.b.weight])).chunk(2, -1)[0],
        None,
    ),
    "a half": (lambda m, x: functional.linear(x, m.a.weight[:16]).repeat(1, 1, 2), None),
    "checkpoint": (
        lambda m, x: torch.utils.checkpoint.checkpoint(m.own, x, use_reentrant=False),
        False,
    ),
    "a linear of its own": (lambda m, x: m.own(x), False),
    "BEiT": (lambda m, x: m.fused(x), False),
    "compiled": (lambda m, x: torch.compile(m.own, backend="eager")(x), False),  # type: ignore[no-untyped-call]
}


def reader(read: Callable[[Any, Tensor], Any]) -> Formula:
    torch.manual_seed(0)
    return Formula(
        lambda m, x: m.head(torch.relu(read(m, x)) + m.b(x)),
        a=nn.Linear(WIDTH, WIDTH),
        b=nn.Linear(WIDTH, WIDTH),
        own=Own(WIDTH, WIDTH),
        fused=Fused(),
        head=nn.Linear(WIDTH, 16),
    ).eval()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("name", READS)
@pytest.mark.slow_if("F.linear, by keyword-Int8DynamicActivationInt8WeightConfig")
def test_the_quantized_model_runs_and_is_right(name: str, target: Any) -> None:
    read, expected = READS[name]
    model, x = reader(read), activations(1, 6, WIDTH)
    before = state(model)
    original = copy.deepcopy(model)
    magr_quantize(model, [x], target)
    report = report_of(model)
    taken = {s.name for s in report.rewritten}
    assert {"head.weight"} <= taken
    first = {"a.weight", "own.weight", "fused.qkv.weight"}
    assert expected is None or expected == bool(taken & first)
    with torch.no_grad():
        own = model(x)
        # What its weights are worth, in the original model.
        for key, parameter in original.named_parameters():
            stored: Any = model.get_parameter(key)
            quantized = isinstance(stored, TorchAOBaseTensor)
            parameter.copy_(stored.dequantize() if quantized else stored)
            if key in first and key not in taken and not quantized:
                assert torch.equal(parameter, before[key])
        right = original(x)
    assert float((own - right).norm()) < 0.1 * float(right.norm())


@pytest.mark.parametrize("name", [name for name, (_, runs) in READS.items() if runs is False])
def test_strict_refuses_it_before_anything_is_changed(name: str) -> None:
    model, x = reader(READS[name][0]), activations(1, 6, WIDTH)
    before = state(model)
    with pytest.raises(CoverageError, match="does not run with it quantized"):
        magr_quantize(model, [x], INT4, strict=True)
    assert changed(model, before) == []


def test_packed_tensors() -> None:
    target = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    model, x = reader(READS["F.linear, by keyword"][0]), activations(1, 6, WIDTH)
    try:
        magr_quantize(model, [x], target)
    except Exception as error:
        if "cannot quantize" not in str(error) and "does not run here" not in str(error):
            raise
        pytest.skip(str(error))
    assert "a.weight" in {site.name for site in report_of(model).skipped}
    assert model(x).isfinite().all()


def test_a_read_in_one_form_of_input_only() -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = self.b(x)
            if shift is None:
                return self.a(x)  # type: ignore[no-any-return]
            return functional.linear(x, weight=self.a.weight) + shift

    x = activations(7, WIDTH)
    model = Twofold()
    magr_quantize(model, [{"x": x}, {"x": x, "shift": x}], INT4)
    assert [site.name for site in report_of(model).rewritten] == ["b.weight"]
    assert model(x, x).isfinite().all()


def test_what_calibration_does_not_reach_is_left_alone_where_its_like_does_not_run() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Fused() for _ in range(2)])
            self.head = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, deep: bool = False) -> Tensor:
            for block in self.blocks[: 2 if deep else 1]:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return]

    model, x = Half(), activations(2, 6, WIDTH)
    magr_quantize(model, [x], INT4)
    assert [site.name for site in report_of(model).rewritten] == ["head.weight"]
    assert model(x, deep=True).isfinite().all()


class Counted(nn.Module):
    """Keeps what it is given, counts, writes to its input and to a parameter."""

    calls: Tensor
    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        self.calls += 1
        self.last = x
        with torch.no_grad():
            self.scale.mul_(0.5)
        cache.kept.append(x)
        x.mul_(1.5)
        return functional.linear(x, weight=self.a.weight) * self.scale + self.a(x)  # type: ignore[no-any-return]


class Cache:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []


def test_the_trial_leaves_nothing_behind() -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(WIDTH, WIDTH))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counted, self.head = Counted(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, cache: Any) -> Tensor:
            return self.head(self.counted(x, cache))  # type: ignore[no-any-return]

    two, cache, x = Two(), Cache(), activations(5, WIDTH)
    before, given = state(two), x.clone()
    magr_quantize(two, [(x, cache)], INT4, trace="make_fx")
    assert cache.kept == []
    assert torch.equal(x, given)
    assert "last" not in vars(two.counted)
    assert two.counted.calls == 0
    assert torch.equal(two.counted.scale, before["counted.scale"])
    assert torch.equal(two.counted.a.weight, before["counted.a.weight"])


def test_a_model_that_fails_by_itself_is_said_to() -> None:
    def fails(m: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            raise RuntimeError("not this way")
        return m.a(x)  # type: ignore[no-any-return]

    model = Formula(fails, a=nn.Linear(WIDTH, WIDTH))
    before = state(model)
    with pytest.raises(ModelError, match=r"itself does not run on calibration batch 0.*this way"):
        magr_quantize(model, [activations(3, WIDTH)], INT4)
    assert changed(model, before) == []


def test_only_a_few_quantized_copies_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(9)])
    alive: list[Any] = []
    most = 0
    real = quantized_reads.quantized_copy  # type: ignore[attr-defined]

    def watched(weight: Tensor, target: Any) -> Tensor:
        nonlocal most
        made = real(weight, target)
        alive.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(quantized_reads, "quantized_copy", watched)
    monkeypatch.setattr(quantized_reads, "KEPT", model[0].weight.nbytes)
    magr_quantize(model, [activations(5, WIDTH)], INT4)
    assert len(alive) == 9
    assert most <= 3


def test_a_result_that_is_not_what_the_weights_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchao tensor that runs, and is wrong: here it is another weight's."""
    model = Formula(lambda m, x: functional.linear(x, m.a.weight[:8]) + m.b(x), a=nn.Linear(8, 16))
    model.b = nn.Linear(8, 8)
    a, b = model.a.weight, model.b.weight
    for wrong in (False, True):
        reads = QuantizedReads({"a": [a], "b": [b]}, lambda _: INT4)
        if wrong:  # the tensor of a is not worth what it computes with
            monkeypatch.setattr(
                "magr_fx.passes.handover.quantized_reads.dequantized",
                lambda t: dequantized(t) * (1.5 if len(t) == 16 else 1),
            )
        with reads, torch.no_grad():
            model(activations(5, 8))
        reads.end()
        assert list(reads.refused) == (["a"] if wrong else [])
        assert "is off by 33%" in reads.refused.get("a", "is off by 33%")


@pytest.mark.slow
def test_an_offloaded_model(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    attention = model.model.layers[0].self_attn

    def by_keyword(x: Tensor) -> Tensor:
        return functional.linear(x, weight=attention.q_proj.weight)

    attention.q_proj.forward = by_keyword
    hooked = disk_offload(model, tmp_path / "offload")
    calib = [{"input_ids": torch.arange(12).view(2, 6)}]
    config = resolve_config(None, INT4, required=True)
    request = Request(config, Target(INT4, QuantizeOptions()), quantize=True)
    able = quantize_apart(hooked, calib, request, {})
    skipped = {s.name: s.reason for s in report_of(hooked).skipped}
    assert "linear fails (IndexError" in skipped["model.layers.0.self_attn.q_proj.weight"]
    assert "model.layers.0.self_attn.q_proj.weight" not in able
    assert "model.layers.1.self_attn.q_proj.weight" in able
