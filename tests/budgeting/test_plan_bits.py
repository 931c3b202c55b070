"""Budgets: what is chosen, what it takes, and that it is quantized so."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ZOO
from targets import ASYMMETRIC, PACKED, SYMMETRIC, intx
from tiny_models import t5_calib, text_calib, tiny_bert, tiny_llama, tiny_t5
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from toys import changed, mlp, report_of, state, vectors

from magr_fx import (
    BitPlan,
    Budget,
    ConfigError,
    MagRConfig,
    ModelError,
    compare,
    magr_quantize,
    plan_bits,
)
from magr_fx.passes.budgeting.units import units_of
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.handover.quantizable_weight import QuantizableWeight
from magr_fx.reporting.report_files import read_report, write_report

INT2, INT3, INT4, INT8 = CHOICES = tuple(intx(bits, ASYMMETRIC, 16) for bits in (2, 3, 4, 8))
WHOLE = MagRConfig(zero_point="whole")


def no_head(_: nn.Module, name: str) -> bool:
    return name != "lm_head"


def bits_of(target: FqnToConfig) -> dict[str, int]:
    """The bits of each module."""
    found: dict[str, Any] = target.fqn_to_config
    return {key: int(str(one.weight_dtype)[-1]) for key, one in found.items()}


def plan_of(model: nn.Module) -> BitPlan:
    found: Any = model.magr_bits
    assert isinstance(found, BitPlan)
    return found


def planned(bits: float, model: nn.Module | None = None, **options: Any) -> dict[str, int]:
    model = model or tiny_llama()
    budget = Budget(bits=bits, choices=CHOICES, **options)
    return bits_of(plan_bits(model, text_calib(), budget, filter_fn=no_head, progress=False))


def test_the_average_is_kept_and_used() -> None:
    model: Any = tiny_llama()
    before = state(model)
    # With free zero points a group of 16 has 64 bits more than its codes; int8's are whole.
    for bits in (6.5, 7.0, 8.0):
        found = planned(bits, model)
        plan = plan_of(model)
        assert bits - 0.3 < plan.bits <= bits
        weights = {n: p.numel() for n, p in model.named_parameters() if f"{n[:-7]}" in found}
        total = sum(
            weights[f"{key}.weight"] * (b + 4 if b < 8 else 10.5) for key, b in found.items()
        )
        assert plan.bits == pytest.approx(total / sum(weights.values()))
        assert plan.bound == pytest.approx(plan.cost, rel=1e-6)
        assert len(found) == 14
    assert changed(model, before) == []
    costs = [sum(row.costs[row.config] for row in plan.rows if row.name == row.unit)]
    assert plan.cost == pytest.approx(costs[0])


@pytest.mark.slow
def test_more_bits_never_cost_more() -> None:
    costs = []
    for bits in (6.2, 6.6, 7.0, 7.8, 9.0, 12.0):
        model = tiny_llama()
        planned(bits, model)
        costs.append(plan_of(model).cost)
    assert costs == sorted(costs, reverse=True)
    assert plan_of(model).bits == pytest.approx(10.5)  # 8 bits, and 32 + 8 for a group


def test_weights_that_share_an_input_have_one_choice() -> None:
    for bits in (6.3, 6.7, 7.2):
        found = planned(bits)
        for at in range(2):
            own = {key.rpartition(".")[2]: b for key, b in found.items() if f"layers.{at}." in key}
            assert own["q_proj"] == own["k_proj"] == own["v_proj"]
            assert own["gate_proj"] == own["up_proj"]
    model = tiny_llama()
    planned(6.7, model, apart=True)
    assert len({row.unit for row in plan_of(model).rows}) == 14


def test_pins() -> None:
    model: Any = tiny_llama()
    pin = {"*.0.mlp.down_proj": INT8, "*.k_proj": INT3, "*o_proj.weight": None}
    found = planned(7.0, model, pin=pin)
    assert found["model.layers.0.mlp.down_proj"] == 8
    assert [found[f"model.layers.{at}.self_attn.k_proj"] for at in range(2)] == [3, 3]
    assert not [key for key in found if "o_proj" in key]
    assert plan_of(model).bits <= 7.0
    assert planned(7.0, pin={"lm_head": None}) == planned(7.0)
    for pin, message in (
        ({"*.nothing": INT4}, "fits no module or parameter"),
        ({"lm_head": INT4}, "fits only what is not quantized"),
        ({"*": None}, "leaves no weight"),
        ({"*": PACKED}, "a Budget chooses among"),
    ):
        with pytest.raises(ConfigError, match=message):
            planned(7.0, pin=pin)


def test_a_size_counts_the_whole_model(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    rest = sum(p.nbytes for n, p in model.named_parameters() if "proj" not in n)
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    size = rest + weights * 6.7 / 8
    budget = Budget(size=int(size), choices=CHOICES)
    plan_bits(model, text_calib(), budget, filter_fn=no_head, progress=False)
    plan = plan_of(model)
    assert plan.nbytes + plan.float_nbytes <= size
    assert plan.nbytes + plan.float_nbytes > 0.95 * size
    assert plan.counted == "all parameters"
    average = 8 * (plan.nbytes + plan.float_nbytes) / sum(p.numel() for p in model.parameters())
    assert plan.bits == pytest.approx(average, rel=1e-3)
    whole = Budget(bits=average, choices=CHOICES, whole_model=True)
    target = plan_bits(model, text_calib(), whole, filter_fn=no_head, progress=False)
    assert plan_of(model).bits <= average
    assert bits_of(target)


@pytest.mark.slow
def test_whole_zero_points_take_their_bits() -> None:
    model: Any = tiny_llama()
    budget = Budget(bits=5, choices=(INT2, INT4))
    plan_bits(model, text_calib(), budget, WHOLE, filter_fn=no_head, progress=False)
    for row in plan_of(model).rows:
        bits = int(row.config[3])
        assert row.bits == pytest.approx(bits + (32 + bits) / 16)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_magr_quantize_does_what_was_planned(rounding: str, tmp_path: Path) -> None:
    budget = Budget(bits=6.6, choices=CHOICES)
    model: Any = tiny_llama()
    target = plan_bits(model, text_calib(), budget, filter_fn=no_head, progress=False)
    options: dict[str, Any] = {"filter_fn": no_head, "progress": False, "rounding": rounding}
    by_plan = magr_quantize(model, text_calib(), target, **options)
    at_once: Any = magr_quantize(tiny_llama(), iter(text_calib()), budget, **options)
    for one, other in zip(by_plan.parameters(), at_once.parameters(), strict=True):
        assert is_quantized(one) == is_quantized(other)
        if is_quantized(one):
            assert torch.equal(one.qdata, other.qdata)
    report = report_of(at_once)
    assert report.bits is not None
    assert {r.name for r in report.bits.rows} == {r.name for r in report.sites if r.quantized}
    assert "the budget of bits" in str(report)
    assert report.bits.totals() in report.totals()
    write_report(report, tmp_path)
    assert read_report(tmp_path).bits == report.bits
    json.loads((tmp_path / "magr_report.json").read_text())
    report.bits.plot(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 10_000


def test_torchao_takes_the_plan() -> None:
    model: Any = tiny_llama()
    target = plan_bits(model, text_calib(), Budget(bits=6.6, choices=CHOICES), filter_fn=no_head)
    quantize_(model, target, filter_fn=None)
    found: dict[str, Any] = {
        n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    made = {n: int(str(w.target_dtype)[-1]) for n, w in found.items() if is_quantized(w)}
    assert made == bits_of(target)


@pytest.mark.slow
def test_costs_foretell_the_divergence() -> None:
    """In nats for each token, to second order: so for small errors."""
    model: Any = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # outputs that depend on the inputs
    original = copy.deepcopy(model)
    plan_bits(model, text_calib(), Budget(bits=8, choices=(INT4,)), filter_fn=no_head)
    foretold = plan_of(model).cost
    quantize_(model, INT4, filter_fn=lambda m, n: isinstance(m, nn.Linear) and no_head(m, n))
    found = compare(original, model, text_calib(), progress=False).text
    assert found is not None
    assert 0.2 < foretold / found.divergence.value < 5


@pytest.mark.slow
def test_experts_have_one_choice_and_count_as_a_whole() -> None:
    model, calib = ZOO["Mixtral"].make().eval(), ZOO["Mixtral"].calib()
    budget = Budget(bits=7.2, choices=CHOICES)
    target = plan_bits(model, calib, budget, progress=False)
    stacks = {key: b for key, b in bits_of(target).items() if "experts" in key}
    assert stacks
    plan = plan_of(model)
    assert plan.bits <= 7.2
    quantized: Any = magr_quantize(model, calib, target, progress=False)
    made = {str(w.target_dtype)[-1] for w in quantized.parameters() if is_quantized(w)}
    assert made == {str(b) for b in bits_of(target).values()}
    units = {row.unit for row in plan.rows if "experts" in row.name}
    assert len(units) <= 2 * len(quantized.model.layers)


@pytest.mark.slow
def test_other_layers_and_other_outputs() -> None:
    gpt2 = ZOO["GPT-2"].make().eval()
    target = plan_bits(gpt2, text_calib(), Budget(bits=6.8, choices=CHOICES), progress=False)
    assert any("c_attn" in key for key in bits_of(target))
    bert = tiny_bert()
    ids = [{"input_ids": batch} for batch in text_calib()]
    target = plan_bits(bert, ids, Budget(bits=6.8, choices=CHOICES), progress=False)
    assert len(set(bits_of(target).values())) > 1
    model = mlp()
    budget = Budget(bits=5, choices=(intx(2, SYMMETRIC, None), Int8WeightOnlyConfig(version=2)))
    plan_bits(model, vectors(40, 24), budget, progress=False)
    assert {row.config for row in plan_of(model).rows} <= {"int2, rows", "int8, rows"}


def test_groups_that_do_not_divide_are_no_choice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 32))
    wide = intx(2, ASYMMETRIC, 16)
    target = plan_bits(
        model, vectors(40, 24), Budget(bits=11, choices=(wide, intx(3, ASYMMETRIC, 8)))
    )
    assert bits_of(target)["2"] == 3
    with pytest.raises(ConfigError, match="24 inputs, which groups of 16 do not divide"):
        plan_bits(model, vectors(40, 24), Budget(bits=7, choices=(wide,)))


def test_an_unreached_linear_gets_the_smallest_choice() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.spare = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, spare: bool = False) -> torch.Tensor:
            out: torch.Tensor = (self.spare if spare else self.used)(x)
            return out

    target = plan_bits(Spare(), vectors(40, 24), Budget(bits=8, choices=CHOICES), progress=False)
    assert bits_of(target) == {"used": 8, "spare": 2} or bits_of(target)["spare"] == 2


def test_budgets_out_of_range() -> None:
    wrong: Any = [
        ({}, "needs either bits"),
        ({"bits": 3, "size": "1MB"}, "needs either bits"),
        ({"bits": 0}, "above 0"),
        ({"bits": float("nan")}, "above 0"),
        ({"bits": True}, "above 0"),
        ({"size": "60"}, "with one of B, KB"),
        ({"size": "0MB"}, "with one of B, KB"),
        ({"size": -5}, "with one of B, KB"),
        ({"bits": 3, "choices": ()}, "at least one"),
        ({"bits": 3, "choices": ("int4",)}, "must be torchao configs"),
        ({"bits": 3, "pin": {"x": "int4"}}, "must be torchao configs"),
        ({"bits": 3, "pin": {3: INT4}}, "must map patterns"),
        ({"bits": 3, "apart": 1}, "apart must be"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            Budget(**options)
    assert Budget(size="1.5MiB").size_in_bytes == 3 * 2**19
    assert Budget(size=" 60 MB ").size_in_bytes == 60_000_000
    model = tiny_llama()
    before = state(model)
    cases: list[tuple[Budget, str]] = [
        (Budget(bits=5, choices=CHOICES), r"smallest choices .* 6\.000 bits, .* 10\.500 bits"),
        (Budget(size="1KB", choices=CHOICES), r"budget of 1KB .* [\d,]{6,} bytes"),
        (Budget(bits=6, choices=(PACKED,)), "a Budget chooses among"),
    ]
    for budget, message in cases:
        with pytest.raises(ConfigError, match=message):
            magr_quantize(model, text_calib(), budget, progress=False, filter_fn=no_head)
    with pytest.raises(ConfigError, match="of several configs each has its own"):
        plan_bits(model, text_calib(), cases[0][0], MagRConfig(group_size=16))
    not_a_budget: Any = 2.5
    with pytest.raises(ConfigError, match="must be a Budget"):
        plan_bits(model, text_calib(), not_a_budget)
    assert changed(model, before) == []


def test_more_than_the_largest_choices_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="magr_fx"):
        found = planned(16.0)
    assert "larger than what the largest choices take, 10.500 bits" in caplog.text
    assert set(found.values()) == {8}


def test_offloaded_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "magr_fx.passes.entries.plan_bits.is_offloaded_or_sharded", lambda _model: True
    )
    with pytest.raises(ModelError, match="needs it in memory as a whole"):
        plan_bits(tiny_llama(), text_calib(), Budget(bits=8))


def test_a_weight_that_cannot_be_measured_is_named() -> None:
    torch.manual_seed(0)
    first = nn.Linear(32, 32)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 32))
    with torch.no_grad():
        first.weight.mul_(1e18)
    with pytest.raises(ModelError, match=r"no bits can be planned for 2\.weight: .*filter_fn"):
        plan_bits(model, vectors(40, 24), Budget(bits=7, choices=CHOICES), progress=False)
    pinned = Budget(bits=8, choices=CHOICES, pin={"2": INT4})
    assert bits_of(plan_bits(model, vectors(40, 24), pinned, progress=False))["2"] == 4


def test_choices_of_the_same_bits_have_names_of_their_own() -> None:
    model = tiny_llama()
    choices = [intx(b, m, 16) for b in (2, 4) for m in (ASYMMETRIC, SYMMETRIC)]
    plan_bits(model, text_calib(), Budget(bits=6.5, choices=choices), filter_fn=no_head)
    for row in plan_of(model).rows:
        assert len(row.costs) == 4
        assert row.costs[row.config] == row.cost
    record = plan_of(model).as_dict()
    record["rows"][0]["cost"] = -1.0
    assert plan_of(model).rows[0].cost >= 0


@pytest.mark.slow
def test_a_decoders_layers_are_units_of_their_own() -> None:
    t5 = tiny_t5()
    plan_bits(t5, t5_calib(), Budget(bits=6.7, choices=CHOICES), progress=False)
    units: dict[str, set[str]] = {}
    for row in plan_of(t5).rows:
        if "EncDecAttention.k" in row.name or "EncDecAttention.v" in row.name:
            units.setdefault(row.unit, set()).add(row.name)
    assert len(units) == 2
    assert all(len(names) == 2 for names in units.values())


def test_experts_that_are_modules() -> None:
    def names(prefix: str) -> list[QuantizableWeight]:
        shapes = [
            f"{prefix}experts.{at}.{part}.weight" for at in range(3) for part in ("up", "down")
        ]
        return [QuantizableWeight(name, torch.zeros(32, 32), []) for name in shapes]

    for prefix in ("", "layers.0.mlp."):
        units = units_of(names(prefix), [], Budget(bits=7, choices=CHOICES))
        assert [len(unit.weights) for unit in units] == [3, 3]
        units = units_of(names(prefix), [], Budget(bits=7, choices=CHOICES, apart=True))
        assert len(units) == 6


def test_a_plan_is_not_that_of_another_run() -> None:
    model: Any = tiny_llama()
    planned(6.6, model)
    budget = Budget(bits=8, choices=CHOICES)
    magr_quantize(model, text_calib(), budget, filter_fn=no_head, progress=False)
    assert not hasattr(model, "magr_bits")
    assert {budget} == {budget}
