"""FqnToConfig as target: each weight gets the config that torchao itself would give it."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from model_zoo import ZOO
from targets import ASYMMETRIC, PACKED, SYMMETRIC, intx
from tiny_models import text_calib, tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from toys import changed, mlp, report_of, state, vectors

from magr_fx import ConfigError, MagRConfig, magr_quantize, magr_transform
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.handover.mixed_target import key_of
from magr_fx.passes.handover.target import describe
from magr_fx.passes.handover.torchao_rounding import dequantized
from magr_fx.passes.rewriting import pipeline

INT2, INT3, INT4 = (intx(bits, ASYMMETRIC, 16) for bits in (2, 3, 4))
EVEN = intx(4, SYMMETRIC, None)


def mixed(configs: dict[str, Any]) -> FqnToConfig:
    return FqnToConfig(OrderedDict(configs))


def bits_of(model: nn.Module) -> dict[str, str]:
    """The dtype of the codes of each quantized linear."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and is_quantized(weight):
            found[name] = str(weight.target_dtype)
    return found


OF_MODULES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj.weight", "re:.*_proj",
    "re:.*self_attn.v_proj", "lm_head", r"re:model\.layers\.\d+\.mlp\.[a-z]+_proj",
]  # fmt: skip
# Of two patterns that take the same parameter, torchao applies both, which fails.
OF_PARAMETERS = [
    "re:.*layers.0.*", r"re:model\.layers\.\d+\.mlp\..*", "re:.*up_proj.weight", "re:.*",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_names_and_patterns_is_torchaos(seed: int) -> None:
    chance = random.Random(seed)
    keys = chance.sample(OF_MODULES, chance.randint(1, 6)) + chance.sample(OF_PARAMETERS, 1)
    chance.shuffle(keys)
    target = mixed({key: chance.choice([None, INT2, INT3, INT4]) for key in keys})
    wanted = tiny_llama()
    # torchao tries to quantize norms too where a pattern takes them.
    for name, module in wanted.named_modules():
        if (not isinstance(module, nn.Linear) and "norm" in name) or name.endswith("embed_tokens"):
            target.fqn_to_config[name] = None
            for key, _ in module.named_parameters():
                target.fqn_to_config[f"{name}.{key}"] = None
    with_modules = [n for n, m in wanted.named_modules() if not isinstance(m, nn.Linear)]
    target.fqn_to_config.update(dict.fromkeys(with_modules))
    quantize_(wanted, target, filter_fn=None)
    found = {}
    for name, module in tiny_llama().named_modules():
        if isinstance(module, nn.Linear):
            key = key_of(f"{name}.weight", target)
            config: Any = None if key is None else target.fqn_to_config[key]
            if config is not None:
                found[name] = str(config.weight_dtype)
    assert found == bits_of(wanted)


TARGET = mixed({"re:.*down_proj": INT4, "re:.*(q|k|v)_proj": INT2, "re:.*mlp.*_proj": INT3})


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_each_weight_is_quantized_as_with_its_config_alone(rounding: str) -> None:
    options: dict[str, Any] = {"rounding": rounding, "propagate": False, "progress": False}
    model: Any = magr_quantize(tiny_llama(), text_calib(), TARGET, **options)
    for config, name in ((INT4, "down_proj"), (INT2, "v_proj"), (INT3, "up_proj")):

        def chosen(_: nn.Module, fqn: str, name: str = name) -> bool:
            return fqn.endswith(name)

        alone: Any = magr_quantize(tiny_llama(), text_calib(), config, filter_fn=chosen, **options)
        for layer in range(2):
            path = next(n for n, _ in model.named_modules() if n.endswith(f"{layer}.mlp.{name}")
                        or n.endswith(f"{layer}.self_attn.{name}"))  # fmt: skip
            one, other = (m.get_submodule(path).weight for m in (model, alone))
            assert one.target_dtype == other.target_dtype == config.weight_dtype
            # Several weights are solved as one stack here, and their products are summed otherwise.
            same = (one.qdata == other.qdata).float().mean()
            assert same > 0.98
            torch.testing.assert_close(one.scale, other.scale, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_what_is_not_named_is_left_alone_and_reported(rounding: str) -> None:
    model: Any = tiny_llama()
    before = state(model)
    magr_quantize(model, text_calib(), TARGET, rounding=rounding, progress=False)
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.o_proj.weight, before_of(before, layer, model))
    rows = {row.name: row for row in report_of(model).sites}
    left = [name for name, row in rows.items() if "has no config for it" in row.reason]
    assert sorted(name.split(".")[-2] for name in left) == ["lm_head", "o_proj", "o_proj"]
    assert len(bits_of(model)) == 12
    assert [row.name for row in report_of(model).sites if row.outcome == "rewritten"] == [
        f"{name}.weight" for name in bits_of(model)
    ]


def before_of(before: Any, layer: nn.Module, model: nn.Module) -> torch.Tensor:
    name = next(name for name, module in model.named_modules() if module is layer)
    found: torch.Tensor = before[f"{name}.self_attn.o_proj.weight"]
    return found


def test_whole_and_free_zero_points_side_by_side() -> None:
    target = mixed({"0": intx(2, ASYMMETRIC, None), "2": EVEN})
    model: Any = magr_quantize(mlp(), vectors(40, 24), target, progress=False)
    assert model[0].weight.zero_point.is_floating_point()
    assert not model[2].weight.zero_point.any()
    alone: Any = mlp()
    quantize_(alone, target, filter_fn=None)
    x = torch.cat(vectors(40, 24))
    with torch.no_grad():
        wanted = mlp()(x)
        assert (model(x) - wanted).norm() < 0.8 * (alone(x) - wanted).norm()
    judged = [row.quantization for row in report_of(model).sites]
    assert all(one is not None and one.error < one.error_alone for one in judged)


def only(at: int) -> Any:
    return lambda _, name: name == str(at)


def test_where_torchao_rounds_all_the_weights_are_rewritten() -> None:
    target = mixed({"0": EVEN, "2": Int8WeightOnlyConfig(version=2)})
    model: Any = magr_quantize(mlp(), vectors(40, 24), target, propagate=False, progress=False)
    for at, config in ((0, EVEN), (2, Int8WeightOnlyConfig(version=2))):
        alone: Any = magr_quantize(
            mlp(), vectors(40, 24), config, propagate=False, progress=False,
            filter_fn=only(at),
        )  # fmt: skip
        values = [dequantized(m[at].weight.data) for m in (model, alone)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["GPT-2", "Mixtral"])
def test_weights_that_become_linears_are_named_as_they_were(family: str) -> None:
    model = ZOO[family].make().eval()
    target = mixed({"re:.*(c_attn|experts.gate_up_proj)": INT4, "re:.*(c_proj|down_proj)": INT3,
                    "re:.*(c_fc|q_proj)": INT2})  # fmt: skip
    magr_quantize(model, ZOO[family].calib(), target, progress=False)
    rows = [row for row in report_of(model).sites if row.outcome == "rewritten"]
    named = ("c_attn", "c_proj", "c_fc", "gate_up_proj", "down_proj", "q_proj")
    assert rows
    assert all(any(name in row.name for name in named) for row in rows)
    assert {"torch.int2", "torch.int3", "torch.int4"} <= set(bits_of(model).values())


@pytest.mark.parametrize(("keys", "wanted"), [
    ({"model.embed_tokens": INT4}, "torch.int4"),
    ({"lm_head": INT4}, "torch.int4"),
    ({"lm_head": INT4, "model.embed_tokens": INT4}, "torch.int4"),
    ({"lm_head": INT4, "model.embed_tokens": INT3}, ""),
    ({"lm_head": INT4, "model.embed_tokens": None}, ""),
])  # fmt: skip
def test_a_tied_weight_has_the_config_of_its_names(keys: dict[str, Any], wanted: str) -> None:
    class Tied(nn.Module):
        """Two linears of one weight."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Module()
            self.model.embed_tokens = nn.Linear(32, 32, bias=False)
            self.enter, self.lm_head = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
            self.lm_head.weight = self.model.embed_tokens.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner: Any = self.model
            hidden = torch.relu(inner.embed_tokens(torch.relu(self.enter(x))))
            logits: torch.Tensor = self.lm_head(hidden)
            return logits

    target = mixed({**keys, "enter": intx(3, ASYMMETRIC, None)})
    model: Any = magr_quantize(Tied(), vectors(40, 32), target, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bits_of(model).get("lm_head", "") == wanted
    rows = {row.name: row.reason for row in report_of(model).sites}
    assert ("different ones" in rows["model.embed_tokens.weight"]) == (wanted == "")


def test_names_with_brackets_are_whole_names() -> None:
    target = mixed({"heads.query[0]": INT2, "re:.*experts": INT3, "list[1].weight": INT4})
    assert key_of("heads.query[0].weight", target) == "heads.query[0]"
    assert key_of("list[1].weight", target) == "list[1].weight"
    assert key_of("a.experts.gate_up[3]", target) == "re:.*experts"
    assert key_of("heads.query.weight[0]", target) is None


def test_keys_that_name_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    target = mixed({"0": EVEN, "O": EVEN, "re:.*[2]$": EVEN, "re:.*gate": None})
    with caplog.at_level("WARNING", logger="magr_fx"):
        magr_quantize(mlp(), vectors(40, 24), target, progress=False)
    assert "nothing of the model is named by O, re:.*gate" in caplog.text


def test_what_one_config_cannot_run_says_nothing_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Picky(nn.Linear):
        """Runs with whole rows only."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight: Any = self.weight
            if is_quantized(weight) and tuple(weight.block_size) == (1, 16):
                raise TypeError("no groups")
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Picky(32, 32), nn.ReLU(), Picky(32, 32), nn.ReLU(), Picky(32, 32))
    target = mixed({"0": EVEN, "2": INT4, "4": EVEN})
    magr_quantize(model, vectors(40, 32), target, progress=False)
    rows = {row.name: row.outcome for row in report_of(model).sites}
    assert rows == {"0.weight": "rewritten", "2.weight": "skipped", "4.weight": "rewritten"}


def test_a_run_goes_on_to_the_same_bits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = mixed({"re:.*mlp.*": INT3, "re:.*self_attn.*": INT4})
    wanted = magr_quantize(tiny_llama(), text_calib(), target, progress=False)
    solved = pipeline._rewrite
    calls: list[Any] = []

    def counted(*given: Any) -> None:
        calls.append(given)
        solved(*given)

    def stopped(*given: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        counted(*given)

    monkeypatch.setattr("magr_fx.passes.rewriting.checkpoint.BETWEEN_STATES", 0)
    monkeypatch.setattr(pipeline, "_rewrite", stopped)
    with pytest.raises(KeyboardInterrupt):
        magr_quantize(tiny_llama(), text_calib(), target, progress=False, checkpoint_dir=tmp_path)
    monkeypatch.setattr(pipeline, "_rewrite", counted)
    saved = magr_quantize(
        tiny_llama(), text_calib(), target, progress=False, checkpoint_dir=tmp_path
    )
    monkeypatch.setattr(pipeline, "_rewrite", solved)
    assert len(calls) < 3 + 8  # 4 inputs in each of 2 blocks: some were done
    for one, other in zip(wanted.parameters(), saved.parameters(), strict=True):
        values = [dequantized(p.data) if is_quantized(p) else p for p in (one, other)]
        assert torch.equal(*values)


def test_bad_input_is_refused_before_anything_is_changed() -> None:
    model = tiny_llama()
    before = copy.deepcopy(state(model))
    bad: dict[str, tuple[Any, dict[str, Any]]] = {
        "names no config": (mixed({"re:.*": None}), {}),
        "target must be a torchao config": (mixed({"re:.*": TARGET}), {}),
        "leave it out": (TARGET, {"config": MagRConfig(group_size=16)}),
        "do not divide": (mixed({"re:.*down_proj": intx(4, ASYMMETRIC, 32)}), {}),
        "FqnToConfig of several grids": (mixed({"re:.*q_proj": PACKED, "re:.*mlp.*": INT3}), {}),
        "would quantize none": (mixed({"re:.*nothing": INT3}), {}),
    }
    for message, (target, options) in bad.items():
        with pytest.raises(ConfigError, match=message):
            magr_quantize(model, text_calib(), target, progress=False, **options)
    with pytest.raises(ConfigError, match="magr_transform is run once for each"):
        magr_transform(model, text_calib(), target=TARGET)
    assert changed(model, before) == []


def test_a_long_target_is_named_in_brief() -> None:
    said = describe(mixed({f"layer.{i}": INT4 for i in range(9)}))
    assert said.startswith("FqnToConfig(layer.0: IntxWeightOnlyConfig(")
    assert said.endswith("5 more)")
