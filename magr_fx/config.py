"""MagRConfig: how MagR solves each site. QuantizeOptions: how solved weights are quantized."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any

import torch
from torchao.core.config import AOBaseConfig

from magr_fx.errors import ConfigError

SOLVERS = ("admm", "pgd")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

ALPHA_WORDS = ("auto", "published")
ROUNDINGS = ("nearest", "gptq")
ZERO_POINTS = ("free", "whole")
STEPS = ("prepare", "convert")
# From section 4.1 of the paper and the authors' code: relative to the gram's largest eigenvalue.
PUBLISHED_ALPHA_PER_CHANNEL = 1e-3
PUBLISHED_ALPHA_PER_GROUP = 1e-4
# The defaults without a target. They are relative to each row's root mean square (RMS) as well, and
# equal the published ones for rows with an RMS of 0.1. Language models have 0.02 to 0.2.
ALPHA_PER_CHANNEL = 1e-2
ALPHA_PER_GROUP = 1e-3
# The paper says 150; the authors' code runs 200, and the code is what produced its tables.
PUBLISHED_STEPS = 200

# ADMM's defaults. It runs to the optimum: most rows reach it after 15 to 20 steps
# (benchmarks/solver.md). A smaller tolerance makes no difference after quantization
# (benchmarks/optimum.md).
ADMM_STEPS = 100
ADMM_TOL = 1e-3
# The relative dual gap at which alpha="auto" accepts a solution of ADMM. A smaller gap makes no
# difference after rounding, and the rounded rows are compared anyway (benchmarks/README.md).
SEARCH_TOL = 0.3

LEAST_DAMPING, MOST_DAMPING = 0.1, 0.3


def _is_number(value: object) -> bool:
    """Whether this is a finite real number of Python or NumPy, and not a bool."""
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


def check_alpha(alpha: object) -> None:
    """Raise :class:`ConfigError` unless ``alpha`` is a positive number."""
    if not (_is_number(alpha) and alpha > 0):  # type: ignore[operator]
        raise ConfigError(
            f"alpha must be a finite number above 0, got {alpha!r}; "
            f"the paper uses {PUBLISHED_ALPHA_PER_CHANNEL} per channel "
            f"and {PUBLISHED_ALPHA_PER_GROUP} per group"
        )


def damping_for(tokens: int, inputs: int) -> float:
    """The damping s in G + s·mean(diag G)·I: ¼·sqrt(in / tokens), clamped to [0.1, 0.3].

    The eigenvalues of a gram of n tokens have a relative error of about 2·sqrt(in / n) (Bai and
    Yin, Ann. Probab. 21, 1993), so fewer tokens need more damping. With 512 tokens 0.3 has a lower
    perplexity and a lower output error on held-out tokens than 0.1; with 2,048 tokens the two are
    about equal. With many tokens damping no longer guards against sampling error. It then gives
    more weight to the directions with small eigenvalues, and held-out tokens cannot tell how much
    is best (benchmarks/README.md).

    Args:
        tokens: the number of calibration tokens in the gram.
        inputs: the number of inputs of the site, ``in``.
    """
    share = math.sqrt(inputs / max(1, tokens)) / 4
    return min(MOST_DAMPING, max(LEAST_DAMPING, share))


class SolverOptions:
    """The options of the iteration, checked; None is replaced by the solver's own default.

    Raises:
        ConfigError: an option is out of range; the message names the first one.
    """

    def __init__(
        self, solver: str, max_steps: int | None, tol: float | None, precision: str
    ) -> None:
        if solver not in SOLVERS:
            raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if max_steps is None:
            max_steps = ADMM_STEPS if solver == "admm" else PUBLISHED_STEPS
        if not _is_whole(max_steps) or max_steps < 1:
            raise ConfigError(f"max_steps must be an int of at least 1, got {max_steps!r}")
        if tol is None:
            tol = ADMM_TOL if solver == "admm" else 0.0
        if not (_is_number(tol) and tol >= 0):
            raise ConfigError(f"tol must be a finite number of at least 0, got {tol!r}")
        if precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        self.solver, self.max_steps, self.tol = solver, int(max_steps), float(tol)
        self.dtype = PRECISIONS[precision]


@dataclass(frozen=True)
class MagRConfig(AOBaseConfig):  # type: ignore[misc]
    """Options of MagR; immutable, so that one config can serve many models.

    torchao's own ``quantize_`` takes a config with a ``step``, see :func:`prepare_or_convert`.
    All functions of magr-fx take a config without one.

    Args:
        alpha: penalty weight, relative to λmax of the gram and to each row's root mean square
            (dimensionless): c·W and d·X then give c·Ŵ. ``"published"`` is the paper's, 1e-3 for
            whole rows and 1e-4 for groups, relative to λmax alone; it changes a weight with small
            entries a lot. ``"auto"`` chooses an alpha and a clip for every row by its output error
            after quantization, and so needs a ``target``. 0 does not shrink the weight, and is
            useful with ``rounding="gptq"`` only. None is ``"auto"`` where there is a target,
            otherwise 1e-2 for whole rows and 1e-3 for groups.
        group_size: inputs per quantization group; None takes whole rows, or the groups of the
            ``target`` where one is given. It must divide ``in``.
        solver: ``"admm"``, which runs to the optimum, or ``"pgd"``, the paper's projected
            (proximal) gradient descent, which is meant to stop before the optimum.
        max_steps: the maximum number of steps; None is 100 for admm, 200 for pgd.
        tol: relative dual gap (gap / objective) at which a row counts as converged; None is 1e-3
            for admm (0.3 with ``alpha="auto"``) and 0 for pgd; 0 always takes ``max_steps``.
        damping: s in G + s·mean(diag G)·I, the gram that is solved with. None is, for admm, between
            0.3 with few tokens and 0.1 with many, see :func:`damping_for`, and for pgd 0, the
            calibration gram itself. A larger value changes the weight less in the directions
            that the calibration hardly reaches. The report's output errors always use the
            calibration gram itself.
        precision: ``"float32"`` or ``"float64"``, of the solver, whatever the weight's dtype.
        zero_point: ``"free"``: zero points are not rounded to whole numbers, and are fitted, with
            the scales, to each row; :func:`magr_quantize` only. ``"whole"``: as torchao makes
            them, which formats and engines with integer zero points need. None is ``"free"`` where
            torchao's tensor holds such a zero point and a symmetric grid was not asked for:
            asymmetric Intx configs below 8 bits. It is ``"whole"`` with ``alpha="published"``.
        step: the step of torchao's flow: ``"prepare"`` starts to sum the grams (the options above
            are used by the other step only), ``"convert"`` solves with the grams and quantizes.
        base_config: the torchao config that ``"convert"`` quantizes with.

    Raises:
        ConfigError: an option is out of range; the message says what is allowed.
    """

    alpha: float | str | None = None
    group_size: int | None = None
    solver: str = "admm"
    max_steps: int | None = None
    tol: float | None = None
    damping: float | None = None
    precision: str = "float32"
    zero_point: str | None = None
    step: str | None = None
    # Not hashed: most of torchao's configs can be compared but not hashed.
    base_config: AOBaseConfig | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str):
            if self.alpha not in ALPHA_WORDS:
                raise ConfigError(
                    f"alpha must be a number, {' or '.join(map(repr, ALPHA_WORDS))}, "
                    f"got {self.alpha!r}"
                )
        elif not (_is_number(self.alpha) and self.alpha == 0):
            check_alpha(self.penalty)
        check_group_size(self.group_size)
        SolverOptions(self.solver, self.max_steps, self.tol, self.precision)
        if self.damping is not None and not (_is_number(self.damping) and self.damping >= 0):
            raise ConfigError(f"damping must be a finite number of at least 0, got {self.damping}")
        if self.zero_point not in (None, *ZERO_POINTS):
            raise ConfigError(
                f"zero_point must be one of {', '.join(ZERO_POINTS)}, or None, "
                f"got {self.zero_point!r}"
            )
        self._check_step()

    def _check_step(self) -> None:
        if isinstance(self.step, Enum):  # torchao's QuantizationStep hashes unlike its value
            object.__setattr__(self, "step", self.step.value)
        if self.step not in (None, *STEPS):
            raise ConfigError(
                f"step must be {' or '.join(map(repr, STEPS))}, for torchao's quantize_, or None, "
                f"got {self.step!r}"
            )
        if self.base_config is None:
            if self.step == "convert":
                raise ConfigError(
                    'step="convert" needs a base_config, the torchao config to quantize with, such '
                    "as IntxWeightOnlyConfig(weight_dtype=torch.int3)"
                )
        elif self.step != "convert":
            raise ConfigError(
                f'base_config belongs to step="convert", but step is {self.step!r}; '
                "magr_transform and magr_quantize take the torchao config as target"
            )
        elif isinstance(self.base_config, MagRConfig) or not isinstance(
            self.base_config, AOBaseConfig
        ):
            raise ConfigError(
                "base_config must be an instance of a torchao config that quantizes, such as "
                f"IntxWeightOnlyConfig(weight_dtype=torch.int3), got {self.base_config!r}"
            )

    @classmethod
    def published(cls, group_size: int | None = None) -> MagRConfig:
        """The recipe of the authors' code: α = 1e-3 per channel or 1e-4 per group, 200 steps."""
        return cls(alpha="published", group_size=group_size, solver="pgd")

    @property
    def penalty(self) -> float:
        """``alpha`` as a number; None and words give the value that fits ``group_size``."""
        if self.alpha is not None and not isinstance(self.alpha, str):
            return self.alpha
        if self.is_published:
            whole, grouped = PUBLISHED_ALPHA_PER_CHANNEL, PUBLISHED_ALPHA_PER_GROUP
        else:
            whole, grouped = ALPHA_PER_CHANNEL, ALPHA_PER_GROUP
        return whole if self.group_size is None else grouped

    @property
    def is_published(self) -> bool:
        """Whether alpha is the paper's, which is not relative to the row's root mean square."""
        return self.alpha == "published"

    def regularisation(self, tokens: int, inputs: int) -> float:
        """``damping``, or the solver's default for a gram ``[in, in]`` of so many tokens.

        The optimum fits the calibration more closely than an iteration that stops early. Damping
        keeps it from overfitting a few thousand tokens (benchmarks/optimum.md).
        """
        if self.damping is not None:
            return self.damping
        return damping_for(tokens, inputs) if self.solver == "admm" else 0.0

    def resolved(self) -> MagRConfig:
        """This config with every None replaced by its default value.

        ``group_size`` stays None, as the target decides it; so does admm's ``damping``, which
        differs between grams.
        """
        options = SolverOptions(self.solver, self.max_steps, self.tol, self.precision)
        searching = self.alpha == "auto"
        loose = searching and self.tol is None and self.solver == "admm"
        return replace(
            self,
            alpha=self.alpha if isinstance(self.alpha, str) else self.penalty,
            max_steps=options.max_steps,
            tol=SEARCH_TOL if loose else options.tol,
            damping=0.0 if self.damping is None and self.solver == "pgd" else self.damping,
        )

    def without_step(self) -> MagRConfig:
        """This config without ``step`` and ``base_config``, as magr_transform takes it."""
        return replace(self, step=None, base_config=None)

    def as_dict(self) -> dict[str, Any]:
        """Every option but ``step`` and ``base_config``, as values that JSON can hold."""
        options = asdict(self.without_step())
        del options["step"], options["base_config"]
        return options

    def for_groups_of(self, group_size: int | None) -> MagRConfig:
        """This config for a target that quantizes groups of ``group_size`` (None for whole rows).

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


@dataclass(frozen=True)
class QuantizeOptions:
    """How weights are rounded and calibrated where a target is given: arguments of magr_quantize.

    Raises:
        ConfigError: an option is out of range; the message names the first one.
    """

    rounding: str = "nearest"
    act_order: bool = True
    refine: int = 0
    propagate: bool = True
    holdout: float = 0.1

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(
                f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}"
            )
        for name in ("act_order", "propagate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not (_is_whole(self.refine) and self.refine >= 0):
            raise ConfigError(f"refine must be an int of at least 0, got {self.refine!r}")
        if self.rounding != "gptq" and self.refine:
            raise ConfigError('refine belongs to rounding="gptq"; leave it out')
        if not (_is_number(self.holdout) and 0 <= self.holdout < 1):
            raise ConfigError(
                f"holdout must be a share of the tokens, from 0 to below 1, got {self.holdout!r}"
            )
