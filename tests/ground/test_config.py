"""MagRConfig: the published recipe, immutability, and every option that is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from magr_fx.config import MagRConfig, QuantizeOptions, SolverOptions
from magr_fx.errors import ConfigError, MagRError
from magr_fx.solver.solver import solve_magr


def test_defaults() -> None:
    assert MagRConfig().penalty == 1e-2
    assert dataclasses.asdict(MagRConfig()) == {
        "alpha": None,
        "group_size": None,
        "solver": "admm",
        "max_steps": None,
        "tol": None,
        "damping": None,
        "precision": "float32",
        "zero_point": None,
        "step": None,
        "base_config": None,
    }


def test_each_solver_has_its_own_defaults() -> None:
    admm = SolverOptions("admm", None, None, "float32")
    assert (admm.solver, admm.max_steps, admm.tol) == ("admm", 100, 1e-3)
    pgd = SolverOptions("pgd", None, None, "float32")
    assert (pgd.solver, pgd.max_steps, pgd.tol) == ("pgd", 200, 0.0)
    assert (admm.dtype, pgd.dtype) == (torch.float32, torch.float32)


def test_what_is_given_takes_the_place_of_the_defaults() -> None:
    for solver in ("admm", "pgd"):
        options = SolverOptions(solver, 7, 0, "float64")
        assert (options.max_steps, options.tol) == (7, 0.0)
        assert options.dtype == torch.float64
        assert (type(options.max_steps), type(options.tol)) == (int, float)


def test_published_is_the_authors_recipe() -> None:
    config = MagRConfig.published()
    assert config == MagRConfig(alpha="published", solver="pgd")
    assert config.penalty == 1e-3
    options = SolverOptions(config.solver, config.max_steps, config.tol, config.precision)
    assert (options.solver, options.max_steps, options.tol) == ("pgd", 200, 0.0)
    assert config.regularisation(500, 64) == 0


def test_published_with_groups_takes_the_per_group_alpha() -> None:
    config = MagRConfig.published(128)
    assert (config.penalty, config.group_size, config.solver) == (1e-4, 128, "pgd")
    assert config == MagRConfig(alpha="published", group_size=128, solver="pgd")


def test_damping_is_for_the_solver_that_goes_to_the_optimum() -> None:
    assert MagRConfig().regularisation(10**6, 64) == 0.1
    assert MagRConfig.published().regularisation(10**6, 64) == 0
    for solver in ("admm", "pgd"):
        assert MagRConfig(solver=solver, damping=0.2).regularisation(8, 64) == 0.2
        assert MagRConfig(solver=solver, damping=0).regularisation(8, 64) == 0


def test_fewer_tokens_are_damped_more() -> None:
    damping = [MagRConfig().regularisation(tokens, 64) for tokens in (0, 16, 64, 100, 400, 10**4)]
    assert damping == pytest.approx([0.3, 0.3, 0.25, 0.2, 0.1, 0.1])


def test_resolved_says_what_none_stands_for() -> None:
    assert MagRConfig().resolved() == MagRConfig(
        alpha=1e-2, max_steps=100, tol=1e-3, damping=None, precision="float32"
    )
    assert MagRConfig.published(64).resolved() == MagRConfig(
        alpha="published", group_size=64, solver="pgd", max_steps=200, tol=0.0, damping=0.0
    )
    given = MagRConfig(0.02, 8, "pgd", 7, 0.5, 0.25, "float64")
    assert given.resolved() == given


def test_a_given_alpha_is_kept_whatever_the_groups() -> None:
    assert MagRConfig(alpha=0.02).penalty == 0.02
    assert MagRConfig(alpha=0.02, group_size=32).penalty == 0.02
    assert MagRConfig(alpha=0.02).for_groups_of(32).penalty == 0.02


def test_groups_follow_the_target_and_alpha_follows_the_groups() -> None:
    config = MagRConfig(max_steps=7, damping=0.1)
    assert config.for_groups_of(None) == config
    grouped = config.for_groups_of(64)
    assert grouped == MagRConfig(group_size=64, max_steps=7, damping=0.1)
    assert grouped.penalty == 1e-3
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
            for value in (-1e-3, float("nan"), float("inf"), True)
        ),
        *(
            ("alpha", value, "alpha must be a number, 'auto' or 'published'")
            for value in ("1e-3", "Auto", "")
        ),
        *(
            ("group_size", value, "group_size must be a positive int, or None")
            for value in (0, -8, 8.0, "8", True)
        ),
        *(
            ("solver", value, "solver must be one of admm, pgd")
            for value in ("sgd", "PGD", "", None)
        ),
        *(
            ("max_steps", value, "max_steps must be an int of at least 1")
            for value in (0, -1, 200.0, "200", True)
        ),
        *(
            ("tol", value, "tol must be a finite number of at least 0")
            for value in (-1e-9, float("nan"), float("inf"), "0", True)
        ),
        *(
            ("damping", value, "damping must be a finite number of at least 0")
            for value in (-0.1, float("nan"), float("inf"), "0.1", True)
        ),
        *(
            ("precision", value, "precision must be one of float32, float64")
            for value in ("float16", "double", "", None, torch.float64)
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
    [("alpha", 0), ("group_size", 1), ("max_steps", 1), ("tol", 0), ("damping", 0)],
)
def test_the_smallest_good_values_are_accepted(option: str, value: int) -> None:
    assert getattr(MagRConfig(**{option: value}), option) == value  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers_and_bools_are_not() -> None:
    config = MagRConfig(alpha=np.float32(0.5), max_steps=np.int64(3))  # type: ignore[arg-type]
    weight, gram = torch.eye(2), torch.eye(2)
    for solver in ("admm", "pgd"):
        got = solve_magr(
            weight, gram, alpha=config.penalty, max_steps=config.max_steps, solver=solver
        )
        want = solve_magr(weight, gram, alpha=0.5, max_steps=3, solver=solver)
        assert torch.equal(got.weight, want.weight)
    for name in ("alpha", "max_steps", "tol", "damping", "group_size"):
        with pytest.raises(ConfigError, match=name):
            MagRConfig(**{name: True})  # type: ignore[arg-type]


def test_words_for_alpha() -> None:
    assert MagRConfig(alpha="auto").alpha == "auto"
    assert MagRConfig(alpha="auto").resolved().alpha == "auto"
    assert MagRConfig(alpha="published").resolved().alpha == "published"
    assert MagRConfig(alpha="published").penalty == 1e-3
    assert MagRConfig(alpha="published").is_published
    assert not MagRConfig(alpha=1e-3).is_published
    assert not MagRConfig().is_published
    assert MagRConfig(alpha="published", group_size=16).penalty == 1e-4
    assert MagRConfig(alpha=0).resolved().alpha == MagRConfig(alpha=0).penalty == 0


def test_how_the_target_is_handled_by_default() -> None:
    assert dataclasses.asdict(QuantizeOptions()) == {
        "rounding": "nearest",
        "act_order": True,
        "refine": 0,
        "propagate": True,
        "holdout": 0.1,
    }
    assert QuantizeOptions("gptq", act_order=False, refine=np.int64(3)).refine == 3  # type: ignore[arg-type]
    assert QuantizeOptions(holdout=0).holdout == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"rounding": r}, "rounding must be one of nearest, gptq") for r in ("awq", "", None)),
        *(
            ({"rounding": "gptq", "refine": value}, "refine must be an int of at least 0")
            for value in (-1, 1.5, True, "3", None)
        ),
        ({"refine": 1}, 'refine belongs to rounding="gptq"'),
        *(
            ({"holdout": value}, "holdout must be a share of the tokens, from 0 to below 1")
            for value in (-0.1, 1, 1.5, float("nan"), "0.1", True)
        ),
    ],
)
def test_bad_handling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeOptions(**options)
