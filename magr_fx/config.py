"""MagRConfig: how MagR solves each site."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real

from magr_fx.errors import ConfigError

SOLVERS = ("pgd",)

# Section 4.1 of the paper and its code: penalty relative to the gram's largest eigenvalue.
PUBLISHED_ALPHA_PER_CHANNEL = 1e-3
PUBLISHED_ALPHA_PER_GROUP = 1e-4
# The paper says 150; the authors' code runs 200, and the code is what produced its tables.
PUBLISHED_STEPS = 200


def _is_number(value: object) -> bool:
    """Whether this is a finite number: Python's or NumPy's, but no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_group_size(group_size: int | None) -> None:
    """Raise :class:`ConfigError` unless ``group_size`` is None or a positive int."""
    if group_size is None:
        return
    if not _is_whole(group_size) or group_size <= 0:
        raise ConfigError(
            f"group_size must be a positive int, or None for whole rows, got {group_size!r}"
        )


def check_solver_options(
    alpha: float, group_size: int | None, solver: str, max_steps: int, tol: float
) -> None:
    """Raise :class:`ConfigError` naming the first option of the solver that is out of range."""
    if not (_is_number(alpha) and alpha > 0):
        raise ConfigError(
            f"alpha must be a finite number above 0, got {alpha!r}; "
            f"the paper uses {PUBLISHED_ALPHA_PER_CHANNEL} per channel "
            f"and {PUBLISHED_ALPHA_PER_GROUP} per group"
        )
    check_group_size(group_size)
    if solver not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not _is_whole(max_steps) or max_steps < 1:
        raise ConfigError(f"max_steps must be an int of at least 1, got {max_steps!r}")
    if not (_is_number(tol) and tol >= 0):
        raise ConfigError(f"tol must be a finite number of at least 0, got {tol!r}")


@dataclass(frozen=True)
class MagRConfig:
    """Options of MagR; immutable, so that one config can serve many models.

    Args:
        alpha: penalty weight, relative to λmax of the gram (dimensionless); None is the
            published value, 1e-3 for whole rows and 1e-4 for groups.
        group_size: inputs per quantization group; None takes whole rows, or the groups of the
            ``target`` where one is given. It must divide ``in``.
        solver: ``"pgd"``, the paper's projected (proximal) gradient descent.
        max_steps: the most steps the solver takes.
        tol: relative dual gap (gap / objective) at which a row counts as converged;
            0 always takes ``max_steps``.
        damping: s in G + s·mean(diag G)·I, the gram that is solved with; 0 solves with the
            calibration gram itself, as published. More keeps the weight where it was in the
            directions that the calibration hardly reaches. The report's output errors always
            use the calibration gram itself.

    Raises:
        ConfigError: an option is out of its range; the message says what is allowed.
    """

    alpha: float | None = None
    group_size: int | None = None
    solver: str = "pgd"
    max_steps: int = PUBLISHED_STEPS
    tol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_solver_options(self.penalty, self.group_size, self.solver, self.max_steps, self.tol)
        if not (_is_number(self.damping) and self.damping >= 0):
            raise ConfigError(f"damping must be a finite number of at least 0, got {self.damping}")

    @classmethod
    def published(cls, group_size: int | None = None) -> MagRConfig:
        """The recipe of the authors' code: α = 1e-3 per channel or 1e-4 per group, 200 steps."""
        return cls(group_size=group_size)

    @property
    def penalty(self) -> float:
        """``alpha``, or the published value for ``group_size`` where that is None."""
        if self.alpha is not None:
            return self.alpha
        return PUBLISHED_ALPHA_PER_CHANNEL if self.group_size is None else PUBLISHED_ALPHA_PER_GROUP

    def for_groups_of(self, group_size: int | None) -> MagRConfig:
        """This config for a target that quantizes groups of ``group_size`` (None: whole rows).

        Raises:
            ConfigError: this config already has another group size.
        """
        if self.group_size not in (None, group_size):
            raise ConfigError(
                f"config.group_size is {self.group_size} but the target quantizes "
                f"{'whole rows' if group_size is None else f'groups of {group_size}'}; "
                "leave group_size out, so that it follows the target"
            )
        return replace(self, group_size=group_size)
