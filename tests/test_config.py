"""MagRConfig: the published recipe, immutability, and every option that is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from magr_fx.config import MagRConfig
from magr_fx.errors import ConfigError, MagRError
from magr_fx.solver import solve_magr


def test_defaults_are_the_published_per_channel_recipe() -> None:
    assert MagRConfig() == MagRConfig.published()
    assert MagRConfig().penalty == 1e-3
    assert dataclasses.asdict(MagRConfig()) == {
        "alpha": None,
        "group_size": None,
        "solver": "pgd",
        "max_steps": 200,
        "tol": 0.0,
        "damping": 0.0,
    }


def test_published_with_groups_takes_the_per_group_alpha() -> None:
    config = MagRConfig.published(128)
    assert (config.penalty, config.group_size, config.max_steps) == (1e-4, 128, 200)
    assert config == MagRConfig(group_size=128)


def test_a_given_alpha_is_kept_whatever_the_groups() -> None:
    assert MagRConfig(alpha=0.02).penalty == 0.02
    assert MagRConfig(alpha=0.02, group_size=32).penalty == 0.02
    assert MagRConfig(alpha=0.02).for_groups_of(32).penalty == 0.02


def test_groups_follow_the_target_and_alpha_follows_the_groups() -> None:
    config = MagRConfig(max_steps=7, damping=0.1)
    assert config.for_groups_of(None) == config
    grouped = config.for_groups_of(64)
    assert grouped == MagRConfig(group_size=64, max_steps=7, damping=0.1)
    assert grouped.penalty == 1e-4
    assert grouped.for_groups_of(64) == grouped


@pytest.mark.parametrize(("group_size", "target"), [(128, "groups of 128"), (None, "whole rows")])
def test_groups_that_contradict_the_target_are_refused(group_size: int | None, target: str) -> None:
    with pytest.raises(ConfigError, match=f"group_size is 64 but the target quantizes {target}"):
        MagRConfig(group_size=64).for_groups_of(group_size)


def test_published_checks_its_group_size() -> None:
    with pytest.raises(ConfigError, match="group_size must be a positive int"):
        MagRConfig.published(0)


def test_is_immutable_and_hashable() -> None:
    config = MagRConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 1.0  # type: ignore[misc]
    assert {config: "found"}[MagRConfig()] == "found"


def test_replace_checks_again() -> None:
    assert dataclasses.replace(MagRConfig(), damping=0.2).damping == 0.2
    with pytest.raises(ConfigError, match="damping"):
        dataclasses.replace(MagRConfig(), damping=-0.2)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(
            ("alpha", value, "alpha must be a finite number above 0")
            for value in (0, 0.0, -1e-3, float("nan"), float("inf"), "1e-3")
        ),
        *(
            ("group_size", value, "group_size must be a positive int, or None")
            for value in (0, -8, 8.0, "8", True)
        ),
        *(("solver", value, "solver must be one of pgd") for value in ("admm", "PGD", "", None)),
        *(
            ("max_steps", value, "max_steps must be an int of at least 1")
            for value in (0, -1, 200.0, "200", True, None)
        ),
        *(
            ("tol", value, "tol must be a finite number of at least 0")
            for value in (-1e-9, float("nan"), float("inf"), "0", None)
        ),
        *(
            ("damping", value, "damping must be a finite number of at least 0")
            for value in (-0.1, float("nan"), float("inf"), "0.1", None)
        ),
    ],
)
def test_bad_options_are_refused_by_name_and_value(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MagRConfig(**{option: value})
    assert str(value) in str(caught.value)
    assert isinstance(caught.value, MagRError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha", 1), ("group_size", 1), ("max_steps", 1), ("tol", 0), ("damping", 0)],
)
def test_the_smallest_good_values_are_accepted(option: str, value: int) -> None:
    assert getattr(MagRConfig(**{option: value}), option) == value  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers_and_bools_are_not() -> None:
    config = MagRConfig(alpha=np.float32(0.5), max_steps=np.int64(3))  # type: ignore[arg-type]
    weight, gram = torch.eye(2), torch.eye(2)
    got = solve_magr(weight, gram, alpha=config.penalty, max_steps=config.max_steps)
    assert torch.equal(got.weight, solve_magr(weight, gram, alpha=0.5, max_steps=3).weight)
    for name in ("alpha", "max_steps", "tol", "damping", "group_size"):
        with pytest.raises(ConfigError, match=name):
            MagRConfig(**{name: True})  # type: ignore[arg-type]
