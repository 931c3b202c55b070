"""Decisions about a torchao config are made by its fields, whatever their defaults are."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Any

import pytest
import torch
from targets import ALL, ODD_SCALES, ONE_STEP
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
)
from torchao.quantization.quantize_.workflows import (
    Int4ChooseQParamsAlgorithm,
    IntxChooseQParamsAlgorithm,
)
from toys import mlp, vectors

from magr_fx import CheckpointError, magr_quantize
from magr_fx.passes.handover.target import (
    _GRANULARITY_FIELD,
    describe,
    described_in_full,
    fields_of,
    rows_are_independent,
    shorter_side,
)
from magr_fx.passes.handover.torchao_rounding import grid_of, quantized_copy

HQQ = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY


def another_release(config: type, **defaults: Any) -> Any:
    """The config as a torchao with other defaults would have it: the same name, by default so."""
    fields = [(name, Any, field(default=value)) for name, value in defaults.items()]
    made = make_dataclass(config.__name__, fields, bases=(config,))
    made.__module__, made.__qualname__ = config.__module__, config.__qualname__
    return made


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (IntxWeightOnlyConfig, "intx_choose_qparams_algorithm", HQQ),
        (IntxWeightOnlyConfig, "intx_choose_qparams_algorithm", "hqq_scale_only"),
        (Int4WeightOnlyConfig, "int4_choose_qparams_algorithm", Int4ChooseQParamsAlgorithm.HQQ),
        (Int8WeightOnlyConfig, "use_hqq", True),
        (Int8WeightOnlyConfig, "variant", "HQQ"),
        (Int8WeightOnlyConfig, "int8_choose_qparams_algorithm", "learned_together"),
    ],
)
def test_rows_that_depend_on_each_other_by_default(config: type, name: str, value: Any) -> None:
    target = another_release(config, **{name: value})()
    assert describe(target) == f"{config.__name__}()"  # people need no more
    assert not rows_are_independent(target)


@pytest.mark.parametrize(
    ("config", "name", "usual", "given"),
    [
        (IntxWeightOnlyConfig, "intx_choose_qparams_algorithm", HQQ, "affine"),
        (Int8WeightOnlyConfig, "use_hqq", True, False),
    ],
)
def test_what_is_not_the_default_counts(config: type, name: str, usual: Any, given: Any) -> None:
    target = another_release(config, **{name: usual})(**{name: given})
    assert "hqq" in describe(target) or "affine" in describe(target)
    assert rows_are_independent(target)


def test_which_grids_lean_to_one_side() -> None:
    """Only few bits and whole zero points: see what torchao makes of rows clipped like that."""
    wanted = {torch.int2: 0.5, torch.int3: 0.75, torch.int4: 0.875}  # type: ignore[attr-defined]
    for dtype in (getattr(torch, f"int{bits}") for bits in range(1, 9)):
        asymmetric = IntxWeightOnlyConfig(dtype, PerAxis(0), MappingType.ASYMMETRIC)
        shorter = shorter_side(asymmetric)
        assert shorter == wanted.get(dtype)
        inputs = Int8DynamicActivationIntxWeightConfig(
            dtype, PerAxis(0), weight_mapping_type=MappingType.ASYMMETRIC
        )
        assert shorter_side(inputs) == shorter
        assert shorter_side(IntxWeightOnlyConfig(dtype, PerAxis(0))) is None
        if shorter is None:
            continue
        levels = round(1 / (1 - shorter))  # below 0
        row = torch.linspace(-1, shorter, 1000).view(1, -1)
        grid = grid_of(quantized_copy(row, asymmetric))
        assert (grid.low, grid.high, int(grid.zero_point)) == (-levels, levels - 1, 0)
        assert float(grid.scale) == pytest.approx(1 / levels)
    assert shorter_side(Int8WeightOnlyConfig()) is None


def test_every_target_that_is_tested() -> None:
    dependent = [*ODD_SCALES[2:], *ONE_STEP]
    assert [target for target in ALL if not rows_are_independent(target)] == dependent


def test_algorithms_are_known() -> None:
    """torchao has no other algorithms for scales than those that are known here."""
    known = {algorithm.value for algorithm in IntxChooseQParamsAlgorithm}
    known |= {algorithm.value for algorithm in Int4ChooseQParamsAlgorithm}
    assert known == {"affine", "hqq_scale_only", "tinygemm", "hqq"}


def test_a_field_of_every_config_is_looked_at() -> None:
    """Who chooses scales is told by fields of these names, in every config that has a choice."""
    for target in ALL:
        assert type(target).__name__ in _GRANULARITY_FIELD
        for name, value in fields_of(target).items():
            if isinstance(value, Enum) and "algorithm" in type(value).__name__.lower():
                assert name.endswith("choose_qparams_algorithm")
        assert fields_of(target).keys() == vars(target).keys()


def test_the_full_description_tells_all_apart() -> None:
    assert len({described_in_full(target) for target in ALL}) == len(ALL)
    changed = another_release(IntxWeightOnlyConfig, intx_choose_qparams_algorithm=HQQ)()
    assert describe(changed) == describe(IntxWeightOnlyConfig())
    assert described_in_full(changed) != described_in_full(IntxWeightOnlyConfig())

    @dataclass
    class Int8WeightOnlyConfig(AOBaseConfig):  # type: ignore[misc]
        pass

    assert __name__ in described_in_full(Int8WeightOnlyConfig())


def test_a_run_does_not_go_on_with_other_defaults(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two torchao that call themselves the same, as nightly builds do, and quantize otherwise."""
    calib, target = vectors(), IntxWeightOnlyConfig(torch.int4, PerGroup(8))  # type: ignore[attr-defined]
    magr_quantize(mlp(), calib, target, checkpoint_dir=tmp_path)
    other = another_release(IntxWeightOnlyConfig, scale_dtype=torch.bfloat16)
    from magr_fx.passes.graphs.torchao_private import _QUANTIZE_CONFIG_HANDLER  # type: ignore[attr-defined]

    handler = _QUANTIZE_CONFIG_HANDLER[IntxWeightOnlyConfig]
    monkeypatch.setitem(_QUANTIZE_CONFIG_HANDLER, other, handler)
    changed = other(torch.int4, PerGroup(8))  # type: ignore[attr-defined]
    assert describe(changed) == describe(target)
    with pytest.raises(CheckpointError, match="scale_dtype"):
        magr_quantize(mlp(), calib, changed, checkpoint_dir=tmp_path)
