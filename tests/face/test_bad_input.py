"""What is refused: with which error, naming what, with which remedy, and with nothing changed."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from tiny_models import VOCABULARY, tiny_llama, token_ids
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from toys import INT, WIDTH, Overflows, changed, mlp, report_of, state, vectors

from magr_fx import (
    CalibrationError,
    ConfigError,
    MagRConfig,
    MagRError,
    MagRPass,
    ModelError,
    TraceError,
    magr_quantize,
    magr_transform,
)

INT4 = IntxWeightOnlyConfig(weight_dtype=INT[4])
Verb = Callable[..., nn.Module]


def transform(model: Any, calib: Any, **options: Any) -> Any:
    return magr_transform(model, calib, **options)


def quantize(model: Any, calib: Any, **options: Any) -> Any:
    return magr_quantize(model, calib, **{"target": INT4, **options})


both = pytest.mark.parametrize("verb", [transform, quantize])


def refused(
    verb: Verb, model: nn.Module, calib: Any, kind: type[MagRError], *parts: str, **options: Any
) -> None:
    """The call raises ``kind`` with every part in its message, and leaves no trace."""
    before, objects = state(model), [id(p) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    with pytest.raises(kind) as caught:
        verb(model, calib, **options)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert changed(model, before) == []
    assert [id(p) for p in model.parameters()] == objects
    assert [module.training for module in model.modules()] == modes
    assert "magr_report" not in vars(model)


# calib


@both
@pytest.mark.parametrize("calib", [[], (), iter([])], ids=["list", "tuple", "spent"])
def test_empty_calibration(verb: Verb, calib: Any) -> None:
    refused(verb, mlp(), calib, CalibrationError, "calib is empty", "make it a list")


@both
@pytest.mark.parametrize(
    ("calib", "name"),
    [(torch.ones(4, WIDTH), "Tensor"), ({"x": 1}, "dict"), ("text", "str"), (3, "int")],
)
def test_calibration_that_is_no_iterable_of_inputs(verb: Verb, calib: Any, name: str) -> None:
    refused(verb, mlp(), calib, CalibrationError, f"got {name}", "[calib]")


@both
def test_batch_of_a_wrong_type(verb: Verb) -> None:
    calib = [torch.ones(4, WIDTH), 3.0]
    refused(verb, mlp(), calib, CalibrationError, "batch 1 is a float", "keyword arguments")


@both
def test_batch_that_does_not_fit_forward(verb: Verb) -> None:
    calib = [*vectors(), {"x": torch.ones(4, WIDTH)}]
    refused(verb, mlp(), calib, CalibrationError, "batch 2", "Sequential.forward", "'input'")


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_calibration_input_that_is_not_finite(verb: Verb, value: float) -> None:
    calib = vectors(40, 24)
    calib[1][3, 5] = value
    refused(verb, mlp(), calib, CalibrationError, "batch 1", "1 NaN or Inf", "(24, 32)")


@both
@pytest.mark.parametrize("layer", ["first", "middle", "last"])
@pytest.mark.parametrize("batch", [0, 1])
def test_activations_that_are_not_finite_name_the_layer_and_the_batch(
    verb: Verb, layer: str, batch: int
) -> None:
    calib = vectors(40, 24)
    calib[batch][7] *= 1e6
    parts = [f"input of {layer}.weight holds NaN or Inf", f"batch {batch};", "overflow"]
    refused(verb, Overflows(layer), calib, CalibrationError, *parts)


# model


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(verb: Verb, value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 4] = value
    refused(verb, model, vectors(), ModelError, "2.weight holds NaN or Inf", "reload")


@both
def test_weights_on_the_meta_device(verb: Verb) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, 4))
    with pytest.raises(ModelError, match=r"0\.weight is on the meta device.*load the weights"):
        verb(model, vectors())


@both
def test_weights_that_have_no_shape_yet(verb: Verb) -> None:
    with pytest.raises(ModelError, match=r"0\.weight is not initialized; run the model on one"):
        verb(nn.Sequential(nn.LazyLinear(4)), vectors())


@both
def test_weights_that_torchao_has_quantized_already(verb: Verb) -> None:
    model = mlp()
    quantize_(model, INT4, lambda module, name: name == "2")
    quantized = model[2].weight
    with pytest.raises(ModelError, match=r"2\.weight is already quantized.*full-precision"):
        verb(model, vectors())
    assert model[2].weight is quantized


@both
@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (nn.Sequential(nn.ReLU()), ["no parameter of two dimensions"]),
        (nn.Sequential(nn.LayerNorm(WIDTH)), ["no parameter of two dimensions"]),
        (nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 2, 3)), ["1.weight: read by"]),
    ],
    ids=["no parameters", "a norm", "a convolution"],
)
def test_model_without_a_weight_matmul(verb: Verb, model: nn.Module, parts: list[str]) -> None:
    what = "Sequential has no weight matmul that can be rewritten"
    refused(verb, model, vectors(), ModelError, what, *parts)


@both
@pytest.mark.parametrize("model", [None, "model", nn.Linear, lambda x: x])
def test_model_that_is_no_module(verb: Verb, model: Any) -> None:
    with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, got"):
        verb(model, vectors())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result if result.sum() > 0 else -result


@both
def test_control_flow_that_depends_on_values(verb: Verb) -> None:
    parts = ["torch.export cannot trace Branches", "batch 0", "depends on tensor values"]
    refused(verb, Branches().train(), vectors(), TraceError, *parts, trace="export")


# config, target, filter_fn


@pytest.mark.parametrize("alpha", [-1e-3, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha must be a finite number above 0"):
        MagRConfig(alpha=alpha)


@both
@pytest.mark.parametrize("config", [INT4, {"alpha": 1e-3}, 1e-3, MagRConfig])
def test_config_of_a_wrong_type(verb: Verb, config: Any) -> None:
    parts = [f"got {type(config).__name__}", "a torchao config goes into target"]
    refused(verb, mlp(), vectors(), ConfigError, *parts, config=config)


@both
@pytest.mark.parametrize("inside", ["config", "target"])
def test_group_size_that_does_not_divide(verb: Verb, inside: str) -> None:
    target = IntxWeightOnlyConfig(weight_dtype=INT[4], granularity=PerGroup(32))
    options: dict[str, Any] = {"target": target}
    if inside == "config":
        options["config"] = MagRConfig(group_size=32)
    # 0.weight has 32 inputs, 2.weight has 48.
    parts = ["2.weight (16, 48) has 48 inputs", "groups of 32", "filter_fn"]
    refused(verb, mlp(), vectors(), ConfigError, *parts, **options)


def test_group_size_that_does_not_divide_without_a_target() -> None:
    config = MagRConfig(group_size=12)
    refused(transform, mlp(), vectors(), ConfigError, "0.weight (48, 32)", config=config)


@both
@pytest.mark.parametrize(
    ("target", "got"),
    [
        (Float8WeightOnlyConfig(), "got Float8WeightOnlyConfig."),
        (Int8StaticActivationInt8WeightConfig(), "got Int8StaticActivationInt8WeightConfig."),
        ("int4", "got 'int4'"),
        (INT[4], "got torch.int4"),
        (IntxWeightOnlyConfig, "IntxWeightOnlyConfig'>"),  # the class, not a config
        (MagRConfig(alpha=1.0), "got MagRConfig."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_target_that_is_no_int_weight_config(verb: Verb, target: Any, got: str) -> None:
    parts = ["IntxWeightOnlyConfig", "magr_quantize also takes an FqnToConfig", got]
    refused(verb, mlp(), vectors(), ConfigError, *parts, target=target)


def test_several_configs_without_quantizing() -> None:
    target = FqnToConfig(OrderedDict({"0": INT4}))
    parts = ["got FqnToConfig.", "magr_transform is run once for each, with a filter_fn"]
    refused(transform, mlp(), vectors(), ConfigError, *parts, target=target)


def test_quantize_without_a_target() -> None:
    refused(quantize, mlp(), vectors(), ConfigError, "target must be", "got None", target=None)


@both
def test_target_that_quantizes_columns(verb: Verb) -> None:
    target = Int8WeightOnlyConfig(granularity=PerRow(0))
    parts = ["rows or by groups of inputs", "granularity=PerRow(dim=0)"]
    refused(verb, mlp(), vectors(), ConfigError, *parts, target=target)


@both
def test_filter_that_matches_nothing(verb: Verb) -> None:
    parts = ["filter_fn matches none of the 2 weights", "owned by 0, 2", "called with the module"]
    refused(
        verb, mlp(), vectors(), ConfigError, *parts, filter_fn=lambda module, name: "head" in name
    )


# What looks alike and is no error.


def test_calibration_that_never_reaches_a_layer_is_reported_and_no_error() -> None:
    model = mlp()
    model.register_module("unused", nn.Linear(8, 8))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    before = state(model)
    magr_transform(model, vectors())
    assert changed(model, before) == ["0.weight", "2.weight"]
    assert [(s.name, s.reason) for s in report_of(model).skipped] == [
        ("unused.weight", "no calibration input reaches it")
    ]


# ---- models of other kinds, and what only shows when the graph runs on real values


def test_a_model_made_in_inference_mode_is_refused_outside_it() -> None:
    with torch.inference_mode():
        model = mlp().requires_grad_(False)
    refused(transform, model, vectors(), ModelError, "0.weight", "inference_mode")
    with torch.inference_mode():
        magr_transform(model, vectors())
    assert len(report_of(model).rewritten) == 2


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(mlp())
    refused(transform, model, vectors(), ModelError, "TorchScript", "eager")


def test_modules_that_torch_quantized_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's own quantization is on its way out
        dynamic: Any = torch.ao.quantization.quantize_dynamic
        model = dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ModelError, match=r"^0 is already quantized .*full-precision"):
        magr_transform(model, vectors())


def test_a_wrapped_weight_is_refused() -> None:
    model, two_tensor = mlp(), cast(Any, TwoTensor)
    weight = model.get_parameter("0.weight").detach()
    model.get_submodule("0").weight = nn.Parameter(two_tensor(weight, weight))
    with pytest.raises(ModelError, match=r"0\.weight is a TwoTensor"):
        magr_transform(model, vectors())


@pytest.mark.parametrize("filter_fn", ["0", lambda module: True])
@both
def test_a_filter_of_another_form_is_refused(verb: Verb, filter_fn: Any) -> None:
    refused(verb, mlp(), vectors(), ConfigError, "filter_fn", "(module, fqn)", filter_fn=filter_fn)


def test_a_pass_takes_a_graph_only() -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(ModelError, match=r"GraphModule, got Sequential.*magr_transform"):
        MagRPass(vectors())(model)  # type: ignore[arg-type]
    assert changed(model, before) == []


def test_an_op_that_fails_on_real_values_names_layer_and_batch() -> None:
    model = tiny_llama()
    calib = [token_ids(2, 6), torch.full((2, 6), VOCABULARY + 3)]
    parts = ("calibration batch 1", "model.embed_tokens", "aten.embedding", "runs on this batch")
    refused(transform, model, calib, CalibrationError, *parts)


@pytest.mark.parametrize("form", [Tensor.to_sparse, lambda t: t.to("meta")])
def test_calibration_tensors_without_ordinary_values_are_refused(form: Any) -> None:
    calib = [vectors(8)[0], form(vectors(8)[0])]
    refused(transform, mlp(), calib, CalibrationError, "batch 1", "(8, 32)", "ordinary tensors")


def test_a_dataset_is_sent_to_a_dataloader() -> None:
    class Rows(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            return vectors(4)[0]

    refused(transform, mlp(), Rows(), CalibrationError, "Rows", "DataLoader")


@both
def test_batches_without_a_token(verb: Verb) -> None:
    calib = [torch.empty(0, WIDTH), torch.empty(0, WIDTH)]
    refused(verb, mlp(), calib, CalibrationError, "no token of the 2 calibration batches counts")


@both
@pytest.mark.parametrize("zero", [torch.zeros(2, 5).long(), torch.full((2, 5), -torch.inf)])
@pytest.mark.slow_unless("zero0-transform")
def test_masks_that_leave_no_token(verb: Verb, zero: Tensor) -> None:
    calib = [{"input_ids": token_ids(2, 5, seed), "attention_mask": zero} for seed in range(2)]
    model = tiny_llama(num_hidden_layers=1)
    refused(verb, model, calib, CalibrationError, "no token of the 2 calibration batches counts")


def test_masks_that_leave_no_token_to_the_pass_and_to_pt2e() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            result: Tensor = self.a(x) * attention_mask[..., None]
            return result

    model, calib = Masked(), [(torch.randn(3, 5, WIDTH), torch.zeros(3, 5))]
    calib = [(x, mask.long()) for x, mask in calib]
    before = state(model)
    with pytest.raises(CalibrationError, match="no token of the 1 calibration batches counts"):
        MagRPass(calib)(torch.export.export(model, calib[0]).module())
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with pytest.raises(CalibrationError, match="no token of the 1 calibration batches counts"):
        magr_quantize(model, calib, quantizer)
    assert changed(model, before) == []


class Features(nn.Module):
    """Takes all its inputs as one dict, as sentence encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.a(self.table(features["input_ids"]))
        return result


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Features()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Linear(2 * 36, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x).flatten(1))
        return result


IDS = token_ids(2, 5)
IMAGES = torch.ones(2, 3, 8, 8)


@both
@pytest.mark.parametrize(
    ("make", "calib", "kind", "remedy"),
    [
        (Features, [{"input_ids": IDS}], CalibrationError, "(features,)"),
        (Anything, [{"input_ids": IDS}], TraceError, "(features,)"),
        (Convolution, [[IMAGES, torch.zeros(2).long()]], CalibrationError, "images alone"),
        (Convolution, list(IMAGES), TraceError, "row[None]"),
        (lambda: tiny_llama(num_hidden_layers=1), list(IDS), TraceError, "row[None]"),
        (
            lambda: tiny_llama(num_hidden_layers=1),
            [{"input_ids": IDS[0], "attention_mask": torch.ones(5)}],
            TraceError,
            "row[None]",
        ),
        (Convolution, [(IMAGES.numpy(), IDS)], CalibrationError, "too many positional"),
    ],
)
@pytest.mark.slow_if(
    "<lambda>-calib4-TraceError-row[None]-transform",
    "<lambda>-calib4-TraceError-row[None]-quantize",
)
def test_forms_that_the_model_does_not_take(
    verb: Verb, make: Any, calib: Any, kind: type[MagRError], remedy: str
) -> None:
    refused(verb, make().eval(), calib, kind, "batch 0", remedy)


# ---- what happens around the solve


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rounding": "awq"}, ["rounding must be one of nearest, gptq", "'awq'"]),
        ({"refine": 30}, ["refine belongs to rounding"]),
        ({"rounding": "gptq", "refine": -1}, ["refine must be an int of at least 0, got -1"]),
        ({"holdout": 1.0}, ["holdout must be a share", "got 1.0"]),
        ({"config": MagRConfig(alpha=0)}, ["alpha=0 shrinks nothing", 'rounding="gptq"']),
    ],
)
def test_options_of_quantize_that_do_not_go_together(
    options: dict[str, Any], parts: list[str]
) -> None:
    refused(quantize, mlp(), vectors(), ConfigError, *parts, **options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"config": MagRConfig(alpha="auto")}, ["give a target", "or a number for alpha"]),
        ({"propagate": True}, ["propagate=True needs a target"]),
        ({"config": MagRConfig(alpha=0)}, ["alpha=0 shrinks nothing"]),
        ({"config": MagRConfig(alpha=0), "target": INT4}, ["alpha=0 shrinks nothing"]),
        ({"holdout": -0.5}, ["holdout must be a share", "got -0.5"]),
        ({"holdout": -0.5, "target": INT4}, ["holdout must be a share", "got -0.5"]),
    ],
    ids=str,
)
def test_options_of_transform_that_do_not_go_together(
    options: dict[str, Any], parts: list[str]
) -> None:
    refused(transform, mlp(), vectors(), ConfigError, *parts, **options)
    with pytest.raises(ConfigError, match=parts[0]):  # and of the pass, when it is made
        MagRPass(vectors(), **options)


@pytest.mark.parametrize(
    "target",
    [
        PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
        Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
    ],
    ids=lambda target: type(target).__name__,
)
def test_gptq_with_a_target_that_has_no_grid_by_row_or_group(target: Any) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 32))
    try:
        quantize_(nn.Sequential(nn.Linear(WIDTH, 32)), target)
    except Exception as error:  # whatever a missing kernel raises
        pytest.skip(f"torchao: {error}")
    parts = ['rounding="gptq" needs these', type(target).__name__, "IntxWeightOnlyConfig"]
    parts += ["Int8WeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig", "per group"]
    refused(quantize, model, vectors(), ConfigError, *parts, target=target, rounding="gptq")
    assert len(report_of(quantize(model, vectors(), target=target)).rewritten) == 1


def test_a_target_that_does_not_run_here_can_only_set_the_groups() -> None:
    target = Int4WeightOnlyConfig(group_size=32)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 32, bias=False))
    only: dict[str, Any] = {"filter_fn": lambda module, name: name == "0"}
    try:
        quantize_(nn.Sequential(nn.Linear(WIDTH, 16)), target)
    except Exception:  # whatever a missing kernel raises
        parts = ["torchao cannot quantize 0.weight (16, 32)", "group_size=32"]
        refused(transform, model, vectors(), ConfigError, *parts, target=target, **only)
    else:
        pytest.skip("its kernel is here")
    wanted = copy.deepcopy(model)
    magr_transform(model, vectors(), MagRConfig(alpha=1e-3), target=target, **only)
    magr_transform(wanted, vectors(), MagRConfig(alpha=1e-3, group_size=32), **only)
    assert changed(model, state(wanted)) == []
    assert report_of(model).rewritten[0].quantization is None
