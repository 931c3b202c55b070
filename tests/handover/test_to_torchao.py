"""magr_quantize: the target's groups, the hand-over to torchao, and what torchao cannot take."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import Formula, weight
from tiny_models import activations, text_calib, tiny_llama, tiny_qwen2
from torch import Tensor, nn
from torch.nn import functional
from torchao.prototype.quantization.int4 import (
    Int8DynamicActivationInt4WeightConfig,
    PrototypeInt4WeightOnlyConfig,
)
from torchao.prototype.quantization.quant_api import (
    Int8DynamicActivationUIntxWeightConfig,
    UIntxWeightOnlyConfig,
)
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor
from toys import INT, WIDTH, changed, mlp, report_of, state, vectors

from magr_fx import ConfigError, HandoverError, MagRConfig, magr_quantize, magr_transform
from magr_fx.passes.handover import target, to_torchao
from magr_fx.passes.handover.target import describe, target_group_size

INT3 = IntxWeightOnlyConfig(weight_dtype=INT[3])


def quantized_state(model: nn.Module) -> dict[str, Any]:
    """Everything that a model with torchao tensors is made of: plain tensors and settings."""
    parts: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not isinstance(tensor, TorchAOBaseTensor):
            parts[name] = tensor.detach()
            continue
        inner, settings = tensor.__tensor_flatten__()
        parts[name] = (type(tensor), str(settings))
        parts |= {f"{name}.{key}": getattr(tensor, key) for key in inner}
    return parts


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    first, second = quantized_state(one), quantized_state(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert value.dtype == second[name].dtype, name
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def quantized(model: nn.Module) -> list[str]:
    """The names of the parameters that are torchao tensors."""
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, TorchAOBaseTensor)
    ]


def skipped(model: nn.Module) -> dict[str, str]:
    return {site.name: site.reason for site in report_of(model).skipped}


# The target's group size.


@pytest.mark.parametrize(
    ("target", "group_size"),
    [
        (IntxWeightOnlyConfig(), None),
        (IntxWeightOnlyConfig(granularity=PerAxis(0)), None),
        (IntxWeightOnlyConfig(granularity=PerGroup(16)), 16),
        (Int8WeightOnlyConfig(), None),
        (Int8WeightOnlyConfig(granularity=PerRow()), None),
        (Int8WeightOnlyConfig(granularity=PerRow(1)), None),
        (Int8WeightOnlyConfig(granularity=PerTensor()), None),
        (Int8WeightOnlyConfig(granularity=PerGroup(8)), 8),
        (Int4WeightOnlyConfig(), 128),
        (Int4WeightOnlyConfig(group_size=32), 32),
        (PrototypeInt4WeightOnlyConfig(), 128),
        (PrototypeInt4WeightOnlyConfig(group_size=64), 64),
        (UIntxWeightOnlyConfig(), 128),
        (UIntxWeightOnlyConfig(group_size=None, bit_width=8), None),
        (Int8DynamicActivationIntxWeightConfig(), 32),
        (Int8DynamicActivationIntxWeightConfig(weight_granularity=PerAxis(0)), None),
        (Int8DynamicActivationIntxWeightConfig(weight_granularity=PerGroup(64)), 64),
        (Int8DynamicActivationInt8WeightConfig(), None),
        (Int8DynamicActivationInt8WeightConfig(granularity=None), None),
        (Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()), None),
        (Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), PerRow()]), None),
        (Int8DynamicActivationInt8WeightConfig(granularity=[PerTensor(), PerTensor()]), None),
        (Int8DynamicActivationInt4WeightConfig(), 32),
        (Int8DynamicActivationInt4WeightConfig(group_size=64), 64),
        (Int8DynamicActivationUIntxWeightConfig(), 128),
        (Int8DynamicActivationUIntxWeightConfig(group_size=32), 32),
    ],
    ids=repr,
)
def test_group_size_of_every_target(target: Any, group_size: int | None) -> None:
    assert target_group_size(target) == group_size


def test_every_target_of_the_table_is_tested() -> None:
    (mark,) = (m for m in test_group_size_of_every_target.pytestmark if m.name == "parametrize")
    tested = {type(target).__name__ for target, _ in mark.args[1]}
    assert tested == set(target._GRANULARITY_FIELD)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (IntxWeightOnlyConfig(), "IntxWeightOnlyConfig()"),
        (INT3, "IntxWeightOnlyConfig(weight_dtype=torch.int3)"),
        (
            IntxWeightOnlyConfig(granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC),
            "IntxWeightOnlyConfig(granularity=PerGroup(group_size=32), "
            "mapping_type=MappingType.ASYMMETRIC)",
        ),
        (Int4WeightOnlyConfig(group_size=64), "Int4WeightOnlyConfig(group_size=64)"),
    ],
)
def test_a_target_is_described_by_what_differs_from_its_defaults(target: Any, text: str) -> None:
    assert describe(target) == text


# Both steps in one.


def intx(bits: int, mapping: MappingType, group_size: int | None = None) -> IntxWeightOnlyConfig:
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    return IntxWeightOnlyConfig(INT[bits], granularity=granularity, mapping_type=mapping)


@pytest.mark.parametrize(
    "target",
    [
        *(intx(bits, MappingType.SYMMETRIC) for bits in (2, 3, 4, 8)),
        *(intx(bits, MappingType.ASYMMETRIC) for bits in (2, 3, 4, 8)),
        intx(3, MappingType.SYMMETRIC, 16),
        intx(4, MappingType.ASYMMETRIC, 8),
        Int8WeightOnlyConfig(set_inductor_config=False),
        Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False),
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        Int8DynamicActivationIntxWeightConfig(INT[4], PerGroup(16)),
        Int8DynamicActivationIntxWeightConfig(INT[3], PerAxis(0)),
    ],
    ids=describe,
)
@pytest.mark.slow_if
def test_bit_equal_to_both_steps_one_by_one(target: Any) -> None:
    calib = vectors()
    two_steps = magr_transform(mlp(), calib, target=target)
    rewritten = state(two_steps)
    quantize_(two_steps, target)
    model = mlp()
    biases = {name: p for name, p in model.named_parameters() if "bias" in name}
    assert magr_quantize(model, calib, target, MagRConfig(zero_point="whole")) is model
    assert_same_bits(model, two_steps)

    assert quantized(model) == ["0.weight", "2.weight"]
    assert all(model.get_parameter(name) is bias for name, bias in biases.items())
    report = report_of(model)
    assert all(site.quantized for site in report.rewritten)
    assert report.target == describe(target)
    assert f"2 quantized by torchao: {describe(target)}" in report.totals()
    eight_bits = getattr(target, "weight_dtype", INT[8]) == INT[8]  # a row may be best as it was
    assert eight_bits or set(changed(mlp(), rewritten)) == {"0.weight", "2.weight"}
    with torch.no_grad():
        assert torch.equal(model(calib[0]), two_steps(calib[0]))


def error_of(target: Any) -> str:
    """The name of the error with which torchao refuses the target here; empty where it works."""
    try:
        quantize_(nn.Linear(64, 64), target)
    except Exception as error:  # whatever a missing kernel raises
        return type(error).__name__
    return ""


def test_packed_int4_on_the_cpu_or_a_clear_refusal() -> None:
    target = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    calib = [activations(40, 64)]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    two_steps, before = copy.deepcopy(model), state(model)
    if error := error_of(target):
        with pytest.raises(ConfigError, match=error):
            magr_quantize(model, calib, target)
        assert changed(model, before) == []
        return
    magr_quantize(model, calib, target)
    quantize_(magr_transform(two_steps, calib, target=target), target)
    assert quantized(model) == ["0.weight", "2.weight"]
    assert report_of(model).config == MagRConfig(alpha="auto", group_size=32, zero_point="whole")
    assert_same_bits(model, two_steps)
    assert torch.equal(model(calib[0]), two_steps(calib[0]))


def test_llama_every_linear_is_quantized_and_the_model_runs() -> None:
    model = magr_quantize(tiny_llama(), text_calib(), INT3)
    report = report_of(model)
    assert set(quantized(model)) == {site.name for site in report.rewritten}
    assert len(quantized(model)) == 15
    assert skipped(model) == {"model.embed_tokens.weight": "an embedding table, not a matmul"}
    assert model(text_calib()[0]).logits.isfinite().all()


def test_a_compiled_model_is_handed_over_as_what_it_wraps() -> None:
    model = mlp()
    compiled: Any = torch.compile(model, backend="eager")
    assert magr_quantize(compiled, vectors(), INT3) is compiled
    assert quantized(model) == ["0.weight", "2.weight"]
    assert report_of(model) is compiled.magr_report
    assert_same_bits(model, magr_quantize(mlp(), vectors(), INT3))


# What torchao cannot take is reported and not rewritten.


def test_a_tied_head_stays_as_it_is_and_tied() -> None:
    model = tiny_qwen2()
    head, values = model.lm_head.weight, model.lm_head.weight.detach().clone()
    magr_quantize(model, text_calib(), INT3)
    assert model.lm_head.weight is model.model.embed_tokens.weight is head
    assert torch.equal(head, values)
    assert len(quantized(model)) == 14
    assert skipped(model)["model.embed_tokens.weight"].startswith("tied: an embedding shares")
    assert model(text_calib()[0]).logits.isfinite().all()


class Raw(nn.Module):
    """A parameter that F.linear reads, one that a plain matmul reads, and an nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read_by_linear = nn.Parameter(torch.randn(64, WIDTH) / 6)
        self.read_by_matmul = nn.Parameter(torch.randn(WIDTH, 64) / 8)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.read_by_linear) @ self.read_by_matmul.T
        output: Tensor = self.head(x)
        return output


def test_a_raw_parameter_is_quantized_by_name_and_one_in_a_plain_matmul_is_not() -> None:
    model = Raw()
    before = state(model)
    magr_quantize(model, vectors(), INT3)
    assert quantized(model) == ["read_by_linear", "head.weight"]
    assert torch.equal(model.read_by_matmul, before["read_by_matmul"])
    (reason,) = skipped(model).values()
    assert "F.linear only, and aten.matmul.default reads it" in reason

    alone = magr_transform(
        Raw(), vectors(), target=INT3, filter_fn=lambda module, name: name != "head"
    )
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = alone.read_by_linear
    quantize_(linear, INT3)
    assert torch.equal(model.read_by_linear.dequantize(), linear.weight.dequantize())
    assert model(vectors()[0]).isfinite().all()


def test_a_target_that_takes_no_names_leaves_raw_parameters_alone() -> None:
    target = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    model = Raw()
    before = state(model)
    if error := error_of(target):
        with pytest.raises(ConfigError, match=error):
            magr_quantize(model, vectors(), target)
        assert changed(model, before) == []
        return
    magr_quantize(model, vectors(), target)
    assert quantized(model) == ["head.weight"]
    assert torch.equal(model.read_by_linear, before["read_by_linear"])
    assert "it is not the weight of an nn.Linear" in skipped(model)["read_by_linear"]
    assert model(vectors()[0]).isfinite().all()


class Attention(nn.Module):
    def __init__(self, *, own_keys: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Linear(WIDTH, 8)
        self.own_keys = own_keys

    def forward(self, x: Tensor) -> Tensor:  # x: [batch, tokens, 32]
        keys = x.flip(1) if self.own_keys else x
        output: Tensor = self.head(self.attention(x, keys, keys, need_weights=False)[0])
        return output


@pytest.mark.parametrize(
    ("own_keys", "sites"),
    [
        (False, ["attention.in_proj_weight"]),
        (True, ["attention.in_proj_weight[0:32]", "attention.in_proj_weight[32:96]"]),
    ],
    ids=["self-attention", "cross-attention"],
)
def test_multihead_attention_cannot_run_quantized_and_is_left_alone(
    own_keys: bool, sites: list[str]
) -> None:
    model, x = Attention(own_keys=own_keys).eval(), activations(3, 5, WIDTH)
    before = state(model)
    magr_quantize(model, [x], INT3)
    assert quantized(model) == ["head.weight"]
    assert sorted(skipped(model)) == [*sites, "attention.out_proj.weight"]
    assert "multi_head_attention_forward fails" in skipped(model)["attention.out_proj.weight"]
    for name in ("attention.in_proj_weight", "attention.out_proj.weight"):
        assert torch.equal(model.get_parameter(name), before[name])
    for mode in (True, False):
        assert model.train(mode)(x).isfinite().all()
    with torch.no_grad():  # where torch would take its fast path
        assert model(x).isfinite().all()


@pytest.mark.slow
def test_transformer_encoder_quantizes_its_feed_forward_and_runs() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), activations(2, 5, WIDTH)
    magr_quantize(model.eval(), [x], INT3)
    assert quantized(model) == [
        f"layers.{i}.linear{j}.weight" for i in range(2) for j in range(1, 3)
    ]
    assert len(skipped(model)) == 4
    with torch.no_grad():
        assert model(x).isfinite().all()


class Aten(nn.Module):
    """Calls the op itself, where torchao's tensors do not run, on its caller's tensor."""

    runs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.raw = nn.Parameter(torch.randn(8, WIDTH))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x.mul_(2)
        output: Tensor = torch.ops.aten.linear.default(self.linear(x), self.raw)
        return output


def test_trying_the_quantized_model_leaves_no_trace() -> None:
    model, x = Aten(), activations(9, WIDTH)
    given, raw = x.clone(), model.raw.detach().clone()
    magr_quantize(model, [x], INT3)
    assert quantized(model) == ["linear.weight"]
    assert "linear.default fails (NotImplementedError" in skipped(model)["raw"]
    assert torch.equal(model.raw, raw)
    assert torch.equal(x, given)
    assert model.runs == 0
    assert model(x).isfinite().all()


def test_a_model_with_nothing_for_torchao_says_why() -> None:
    model = Formula(lambda m, x: x @ m.w, w=weight(WIDTH, 24))
    before = state(model)
    with pytest.raises(ConfigError) as caught:
        magr_quantize(model, vectors(), INT3)
    message = str(caught.value)
    assert "none of the 1 weights" in message
    assert "w, was not rewritten: torchao quantizes whole parameters stored" in message
    assert "transposed" in message
    assert "magr_transform still rewrites them" in message
    assert changed(model, before) == []


# Weights that the model holds more than once, or does not use.


class Twice(nn.Module):
    """Three holders of one weight: a linear that stands in two places, and a parameter's name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first if kind == "module" else nn.Linear(WIDTH, WIDTH)
        if kind == "parameter":
            self.second.weight = self.first.weight
        if kind == "memory":
            self.second.weight = nn.Parameter(self.first.weight.data)
        self.nested = nn.Sequential(self.first)
        self.raw = self.first.weight if kind == "raw" else None
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.nested(torch.relu(self.first(x)))
        x = self.second(x)
        return x if self.raw is None else functional.linear(x, self.raw)


@pytest.mark.parametrize(
    ("kind", "holders", "sites"),
    [
        ("module", {"first", "second", "nested.0"}, 1),
        ("parameter", {"first", "second", "nested.0"}, 1),
        ("memory", {"first", "second", "nested.0"}, 1),
        ("raw", {"first", "second", "nested.0", "raw"}, 2),
    ],
)
def test_a_weight_that_is_held_several_times_is_quantized_everywhere(
    kind: str, holders: set[str], sites: int
) -> None:
    model = Twice(kind)
    magr_quantize(model, vectors(), INT3)
    report = report_of(model)
    assert len(report.rewritten) == sites
    assert all(site.quantized for site in report.sites)
    names = {f"{name}.weight" if name != "raw" else name for name in holders}
    assert set(quantized(model)) == names
    values = {model.get_parameter(name).dequantize() for name in names if "second" not in name}
    first = model.first.weight.dequantize()
    assert all(torch.equal(value, first) for value in values)
    assert model(vectors()[0]).isfinite().all()


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.narrow = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 16),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.used(x)
        return output


def test_a_linear_that_calibration_never_reaches_is_quantized_by_torchao_alone() -> None:
    model, plain = PartlyUsed(), PartlyUsed()
    quantize_(plain, INT3)
    magr_quantize(model, vectors(), INT3)
    assert quantized(model) == ["used.weight", "unused.weight", "narrow.weight"]
    for name in ("unused", "narrow"):
        site = next(s for s in report_of(model).skipped if s.name == f"{name}.weight")
        assert (site.reason, site.quantized) == ("no calibration input reaches it", True)
        same = [m.get_parameter(site.name).dequantize() for m in (model, plain)]
        assert torch.equal(*same)


def test_an_unreached_linear_that_the_filter_or_the_groups_leave_out_stays() -> None:
    model = PartlyUsed()
    before = state(model)
    target = intx(4, MappingType.SYMMETRIC, 16)  # does not divide the 12 inputs of `narrow`
    magr_quantize(model, vectors(), target, filter_fn=lambda module, name: name != "unused")
    assert quantized(model) == ["used.weight"]
    assert [site.quantized for site in report_of(model).skipped] == [False, False]
    for name in ("unused.weight", "narrow.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_what_filter_fn_leaves_out_stays_bitwise() -> None:
    model = mlp()
    weight, before = model.get_parameter("2.weight"), state(model)
    magr_quantize(model, vectors(), INT3, filter_fn=lambda module, name: name == "0")
    assert quantized(model) == ["0.weight"]
    assert model.get_parameter("2.weight") is weight
    assert torch.equal(weight, before["2.weight"])
    assert skipped(model) == {"2.weight": "left out by filter_fn"}


# When torchao does not do its part.


@pytest.mark.parametrize("bad", [Int4WeightOnlyConfig(group_size=16), INT3], ids=describe)
def test_a_target_that_does_not_work_here_is_refused_before_anything_changes(
    bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    before = state(model)
    if bad is INT3:  # works everywhere, unless its handler is broken
        monkeypatch.setattr(to_torchao, "quantized_copy", broken)
    with pytest.raises(ConfigError) as caught:
        magr_quantize(model, vectors(), bad)
    message = str(caught.value)
    assert message.startswith("torchao cannot quantize 0.weight (48, 32) (torch.float32, cpu) with")
    assert describe(bad) in message
    assert caught.value.__cause__ is not None
    assert changed(model, before) == []


def broken(weight: Tensor, target: Any) -> Tensor:
    raise RuntimeError("no kernel")


def test_a_weight_that_torchao_would_skip_in_silence_is_an_error_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    before = state(model)
    monkeypatch.setattr(to_torchao, "quantized_copy", lambda weight, target: weight)
    with pytest.raises(ConfigError, match=r"silently leave 0\.weight .*48, 32.*divides 32"):
        magr_quantize(model, vectors(), INT3)
    assert changed(model, before) == []


@pytest.mark.parametrize("model", [mlp, Raw], ids=["linears", "by name"])
def test_a_hand_over_that_did_not_take_is_an_error_that_lists_what_is_left(
    model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = model()
    monkeypatch.setattr(to_torchao, "quantize_", lambda *args, **options: None)
    with pytest.raises(HandoverError) as caught:
        magr_quantize(instance, vectors(), INT3)
    left = ["0.weight", "2.weight"] if model is mlp else ["read_by_linear", "head.weight"]
    assert f"left 2 weights unquantized: {', '.join(left)}" in str(caught.value)
    report = report_of(instance)
    assert [site.name for site in report.rewritten] == left
    assert not any(site.quantized for site in report.sites)


def test_the_log_tells_the_whole_run(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    with caplog.at_level(logging.INFO, "magr_fx"):
        magr_quantize(model, vectors(), IntxWeightOnlyConfig(weight_dtype=INT[4]))
    *_, record = (r for r in caplog.records if r.name == "magr_fx" and r.levelno == logging.INFO)
    assert record.getMessage() == report_of(model).totals()
    assert "2 quantized by torchao: IntxWeightOnlyConfig(weight_dtype=torch.int4)" in caplog.text
