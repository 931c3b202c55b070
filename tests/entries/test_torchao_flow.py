"""MagRConfig inside torchao's quantize_: what the two steps make of a model, and refuse."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_helpers import assert_gram
from targets import ASYMMETRIC, SYMMETRIC, intx
from tiny_models import text_calib, tiny_llama
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrizations
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep
from torchao.utils import TorchAOBaseTensor
from toys import changed, grams, mlp, report_of, state, vectors

from magr_fx import (
    CalibrationError,
    ConfigError,
    MagRConfig,
    MagRPass,
    ModelError,
    magr_quantize,
    magr_transform,
)
from magr_fx.passes.entries.torchao_flow import GramHook

INT3 = intx(3, SYMMETRIC, None)
PREPARE = MagRConfig(step="prepare")


def converting(base: Any = INT3, **options: Any) -> MagRConfig:
    return MagRConfig(**options, step="convert", base_config=base)


def prepared(model: nn.Module, calib: list[Any] | None = None) -> Any:
    """The model after the first step and the calibration."""
    quantize_(model, PREPARE)
    with torch.no_grad():
        for batch in vectors() if calib is None else calib:
            model(batch)
    return model


def gram_hook(linear: nn.Module) -> GramHook:
    (hook,) = linear._forward_pre_hooks.values()
    assert isinstance(hook, GramHook)
    return hook


def values(model: nn.Module) -> dict[str, Tensor]:
    """What every quantized weight is worth."""
    return {
        name: p.dequantize()
        for name, p in model.named_parameters()
        if isinstance(p, TorchAOBaseTensor)
    }


def assert_same(model: nn.Module, wanted: nn.Module, count: int = 2) -> None:
    ours, theirs = values(model), values(wanted)
    assert ours.keys() == theirs.keys()
    assert len(ours) == count
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# What it makes of a model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (INT3, {}),
        (intx(2, ASYMMETRIC, 16), {}),
        (Int8WeightOnlyConfig(set_inductor_config=False), {}),
        (INT3, {"alpha": "published"}),
        (intx(4, SYMMETRIC, 16), {"alpha": 2e-3, "solver": "pgd"}),
    ],
    ids=["int3", "int2 groups", "int8", "published", "pgd groups"],
)
def test_it_makes_what_magr_transform_makes(
    base: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    calib = vectors(dtype=dtype)
    wanted = magr_transform(
        mlp(dtype=dtype), calib, MagRConfig(**options), target=base, propagate=False, holdout=0
    )
    quantize_(wanted, base)
    model = prepared(mlp(dtype=dtype), calib)
    quantize_(model, converting(base, **options))
    assert_same(model, wanted)
    assert torch.equal(model(calib[0]), wanted(calib[0]))
    if isinstance(base, Int8WeightOnlyConfig):
        return  # for which the untouched weight is the best of some
    alone = mlp(dtype=dtype)
    quantize_(alone, base)
    assert all(not torch.equal(v, values(alone)[name]) for name, v in values(model).items())


@pytest.mark.slow
def test_llama_as_by_its_graph() -> None:
    """Weights that share an input are solved apart: the same problem, summed in another order."""
    original, calib = tiny_llama(), text_calib()
    model = prepared(copy.deepcopy(original), calib)
    quantize_(model, converting())
    wanted = copy.deepcopy(original)
    magr_transform(wanted, calib, target=INT3, propagate=False, holdout=0)
    quantize_(wanted, INT3)
    ours, theirs = values(model), values(wanted)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 15
    for name, gram in grams(original, calib).items():
        weight = original.get_parameter(f"{name}.weight").detach()

        def error(value: Tensor, weight: Tensor = weight, gram: Tensor = gram) -> float:
            change = (value - weight).double()
            return float((change @ gram * change).sum())

        name = f"{name}.weight"
        assert error(ours[name]) == pytest.approx(error(theirs[name]), rel=0.05)


def test_the_gram_is_of_every_token_and_nothing_else_changes() -> None:
    model, calib = mlp(), vectors()
    before, keys, outputs = state(model), list(model.state_dict()), [model(x) for x in calib]
    reference = grams(model, calib)
    quantize_(model, PREPARE)
    with torch.no_grad():
        assert torch.equal(model(calib[0]), outputs[0])
    with torch.inference_mode():
        assert torch.equal(model(calib[1]), outputs[1])
    assert changed(model, before) == []
    assert list(model.state_dict()) == keys
    for name, gram in reference.items():
        hook = gram_hook(model.get_submodule(name))
        assert hook.gram is not None
        assert hook.tokens == 64
        assert (hook.gram.dtype, hook.gram.requires_grad) == (torch.float32, False)
        assert_gram(hook.gram, gram)


def test_in_inference_mode_first_and_with_gradients_later() -> None:
    model, calib = mlp(), vectors()
    quantize_(model, PREPARE)
    with torch.inference_mode():
        model(calib[0])
    model(calib[1]).sum().backward()
    quantize_(model, converting())
    wanted = prepared(mlp())
    quantize_(wanted, converting())
    assert_same(model, wanted)


def test_inputs_of_any_rank_by_position_or_name() -> None:
    linear, x = nn.Linear(8, 4), torch.randn(6, 8)
    quantize_(linear, PREPARE)
    linear(x[:4].view(2, 2, 8))
    linear(input=x[4])
    linear(x[5:])
    linear(x[:0])
    hook = gram_hook(linear)
    assert hook.gram is not None
    assert hook.tokens == 6
    assert_gram(hook.gram, x.T @ x)


def test_autocast_of_the_calibration_does_not_touch_the_sums() -> None:
    linear, (x, _) = nn.Linear(32, 8), vectors()
    quantize_(linear, PREPARE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        linear(x)
    hook = gram_hook(linear)
    assert hook.gram is not None
    assert_gram(hook.gram, x.T @ x)


def test_hooks_and_grams_are_gone_afterwards() -> None:
    model = prepared(mlp())
    keys = list(mlp().state_dict())
    quantize_(model, converting())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert not any(isinstance(value, GramHook) for value in vars(module).values())
    assert list(model.state_dict()) == keys


def test_preparing_again_starts_anew() -> None:
    model = prepared(prepared(mlp(), vectors(8, 8)))
    assert gram_hook(model[0]).tokens == 64
    quantize_(model, converting())
    wanted = prepared(mlp())
    quantize_(wanted, converting())
    assert_same(model, wanted)


def test_filter_fn_chooses_the_linears() -> None:
    model = mlp()
    first = lambda module, name: name == "0"  # noqa: E731
    quantize_(model, PREPARE, first)
    assert not model[2]._forward_pre_hooks
    before = model[2].weight
    model(vectors()[0])
    quantize_(model, converting(), first)
    assert list(values(model)) == ["0.weight"]
    assert model[2].weight is before


def test_linears_can_have_different_targets() -> None:
    model = prepared(mlp())
    quantize_(model, converting(INT3), lambda module, name: name == "0")
    quantize_(model, converting(intx(4, ASYMMETRIC, 16)))  # what is left
    assert [model[at].weight.target_dtype for at in (0, 2)] == [torch.int3, torch.int4]  # type: ignore[attr-defined]


def test_the_steps_can_be_given_by_module_name() -> None:
    model = mlp()
    quantize_(model, FqnToConfig({"0": PREPARE, "2": PREPARE}), filter_fn=None)
    for batch in vectors():
        model(batch)
    quantize_(model, FqnToConfig({"0": converting(), "2": converting()}), filter_fn=None)
    wanted = prepared(mlp())
    quantize_(wanted, converting())
    assert_same(model, wanted)


def test_a_linear_without_tokens_is_torchaos_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"used": mlp(), "unused": nn.Linear(32, 8)})
    quantize_(model, PREPARE)
    model["used"](vectors()[0])
    model["unused"](vectors()[0][:0])
    alone = copy.deepcopy(model["unused"])
    quantize_(alone, INT3)
    with caplog.at_level(logging.INFO, "magr_fx"):
        quantize_(model, converting())
    assert torch.equal(values(model)["unused.weight"], values(alone)["weight"])
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "no calibration token reached nn.Linear (8, 32): IntxWeightOnlyConfig alone" in warning
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert [line.partition(",")[0] for line in lines] == ["nn.Linear (48", "nn.Linear (16"]
    assert all("40 tokens, output error" in line and "torchao alone" in line for line in lines)


def test_a_failed_solve_leaves_the_linear_to_torchao(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared(mlp())
    gram = gram_hook(model[0]).gram
    assert gram is not None
    gram.mul_(1e38 / gram.abs().max())  # finite, and its products are not
    with caplog.at_level(logging.INFO, "magr_fx"):
        quantize_(model, converting())
    assert "nn.Linear (48, 32) failed: CalibrationError: gram has" in caplog.text
    assert "nn.Linear (48, 32): quantized by torchao alone" in caplog.text
    alone = mlp()
    quantize_(alone, INT3)
    same = {name: torch.equal(v, values(alone)[name]) for name, v in values(model).items()}
    assert same == {"0.weight": True, "2.weight": False}


def test_a_shared_weight_keeps_its_values_elsewhere() -> None:
    """As torchao does, which unties what it quantizes."""
    table = nn.Embedding(12, 32)
    head = nn.Linear(32, 12, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head})
    before = table.weight.detach().clone()
    quantize_(model, PREPARE)
    head(vectors()[0])
    quantize_(model, converting())
    assert torch.equal(table.weight, before)
    assert list(values(model)) == ["head.weight"]


def test_a_linear_that_the_model_holds_twice() -> None:
    linear = nn.Linear(32, 32)
    model = nn.Sequential(nn.Sequential(linear), nn.Sequential(linear))
    quantize_(model, PREPARE)
    assert len(linear._forward_pre_hooks) == 1
    model(vectors()[0])
    assert gram_hook(linear).tokens == 80
    quantize_(model, converting())
    assert isinstance(linear.weight, TorchAOBaseTensor)


# What can be done with it in between, and afterwards.


def test_a_copy_sums_and_converts_for_itself() -> None:
    model = prepared(mlp(), vectors()[:1])
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    for one in (twin, loaded):
        with torch.no_grad():
            one(vectors()[1])
    assert [gram_hook(m[0]).tokens for m in (model, twin, loaded)] == [40, 64, 64]
    quantize_(twin, converting())
    quantize_(loaded, converting())
    assert not twin[0]._forward_pre_hooks
    assert model[0]._forward_pre_hooks
    wanted = prepared(mlp())
    quantize_(wanted, converting())
    assert_same(twin, wanted)
    assert_same(loaded, wanted)


def test_the_result_is_saved_and_loaded_as_any_of_torchaos() -> None:
    model = prepared(mlp())
    quantize_(model, converting())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        loaded = mlp()
    loaded.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_same(loaded, model)
    assert torch.equal(loaded(vectors()[0]), model(vectors()[0]))


def test_a_compiled_model_is_calibrated_between_its_graphs() -> None:
    model, calib = mlp(), vectors()
    quantize_(model, PREPARE)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for batch in calib:
            compiled(batch)
    quantize_(compiled, converting())
    wanted = prepared(mlp())
    quantize_(wanted, converting())
    assert_same(model, wanted)
    assert torch.equal(compiled(calib[0]), wanted(calib[0]))
    torch.compiler.reset()


def test_preparing_after_compilation_is_too_late_and_said(caplog: pytest.LogCaptureFixture) -> None:
    compiled: Any = torch.compile(mlp(), backend="eager")
    with torch.no_grad():
        for batch in vectors():
            compiled(batch)
    prepared(compiled)
    quantize_(compiled, converting())
    assert caplog.text.count("run the prepare step before torch.compile") == 2
    torch.compiler.reset()


def test_tracing_adds_nothing_and_sees_no_hook() -> None:
    model, calib = prepared(mlp()), vectors()
    exported = torch.export.export(model, (calib[0],), dynamic_shapes=({0: Dim.AUTO},))
    assert torch.equal(exported.module()(calib[1]), model(calib[1]))
    magr_transform(model, calib)
    assert gram_hook(model[0]).tokens == 64 + 24


# What it refuses.


def test_convert_needs_prepare_and_can_go_on() -> None:
    model = mlp()
    message = r"nn.Linear \(16, 48\) is not prepared: run .*step=\"prepare\".*same filter_fn"
    quantize_(model, PREPARE, lambda module, name: name == "0")
    model(vectors()[0])
    with pytest.raises(ConfigError, match=message):
        quantize_(model, converting())
    first = model[0].weight
    assert list(values(model)) == ["0.weight"]
    quantize_(model, PREPARE, lambda module, name: name == "2")
    model(vectors()[0])
    quantize_(model, converting())
    assert model[0].weight is first
    assert len(values(model)) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MagRConfig(), r"needs a step: step=\"prepare\".*or call magr_quantize"),
        (converting(alpha=0), "alpha=0 shrinks nothing"),
        (converting(group_size=8), "group_size is 8 but the target quantizes whole rows"),
        (converting(FqnToConfig({})), "must be a torchao config that quantizes weights"),
        (
            converting(intx(4, SYMMETRIC, 24)),
            r"torchao cannot quantize nn.Linear \(48, 32\).*filter_fn",
        ),
    ],
)
def test_bad_configs_change_nothing(config: MagRConfig, message: str) -> None:
    model = prepared(mlp())
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        quantize_(model, config)
    assert changed(model, before) == []
    assert gram_hook(model[0]).tokens == 64


def test_other_modules_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(ConfigError, match=r"takes nn\.Linear modules, got Embedding"):
        quantize_(model, PREPARE, lambda module, name: isinstance(module, nn.Embedding))


def test_weights_that_cannot_be_worked_with_are_refused() -> None:
    quantized = mlp()
    quantize_(quantized, INT3)
    with pytest.raises(ModelError, match="already quantized by torchao"):
        quantize_(quantized, PREPARE)
    with pytest.raises(ModelError, match="meta device"):
        quantize_(nn.Linear(4, 4, device="meta"), PREPARE)
    normed = parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"weight of nn.Linear \(4, 4\) is computed from others?"):
        quantize_(normed, PREPARE)


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = prepared(mlp(), [torch.full((1, 32), torch.nan)])
    with pytest.raises(CalibrationError, match=r"inputs of nn.Linear \(48, 32\) hold NaN or Inf"):
        quantize_(model, converting())
    assert values(model) == {}
    prepared(model)
    quantize_(model, converting())
    assert len(values(model)) == 2


def test_a_config_with_a_step_belongs_to_quantize() -> None:
    calib = vectors()
    for config in (PREPARE, converting()):
        message = rf'step="{config.step}" belongs to torchao\'s quantize_'
        with pytest.raises(ConfigError, match=message):
            magr_transform(mlp(), calib, config)
        with pytest.raises(ConfigError, match=message):
            magr_quantize(mlp(), calib, INT3, config)
        with pytest.raises(ConfigError, match=message):
            MagRPass(calib, config)


# The config itself.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"step": step}, "step must be 'prepare' or 'convert'") for step in ("Prepare", "", 1)),
        ({"step": "convert"}, 'step="convert" needs a base_config'),
        ({"base_config": INT3}, 'base_config belongs to step="convert".*as target'),
        ({"step": "prepare", "base_config": INT3}, 'base_config belongs to step="convert"'),
        *(
            ({"step": "convert", "base_config": base}, "base_config must be an instance")
            for base in (MagRConfig(), IntxWeightOnlyConfig, "int3")
        ),
    ],
)
def test_bad_steps_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MagRConfig(**options)


def test_the_config_is_a_value_with_a_step_as_well() -> None:
    config = converting(alpha=1e-3)
    assert isinstance(config, AOBaseConfig)
    same = [converting(intx(3, SYMMETRIC, None), alpha=1e-3), copy.deepcopy(config)]
    same += [pickle.loads(pickle.dumps(config)), dataclasses.replace(config)]
    for other in same:
        assert other == config
        assert hash(other) == hash(config)
    assert converting(intx(4, SYMMETRIC, None), alpha=1e-3) != config
    assert config.without_step() == MagRConfig(alpha=1e-3)
    assert config.as_dict() == MagRConfig(alpha=1e-3).as_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.step = None
    enum: Any = QuantizationStep.PREPARE
    assert MagRConfig(step=enum) == PREPARE
    assert hash(MagRConfig(step=enum)) == hash(PREPARE)


def test_the_report_has_the_options_of_the_solver_only(tmp_path: Path) -> None:
    report = report_of(magr_transform(mlp(), vectors()))
    report.to_json(tmp_path / "report.json")
    options = json.loads((tmp_path / "report.json").read_text())["config"]
    fields = [field.name for field in dataclasses.fields(MagRConfig)]
    assert list(options) == fields[:-2]
    assert fields[-2:] == ["step", "base_config"]
