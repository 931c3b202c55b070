"""MagRConfig: how MagR solves each site; Handling: what happens around the solve."""

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
STEPS = ("prepare", "convert")
# Section 4.1 of the paper and its code: penalty relative to the gram's largest eigenvalue.
PUBLISHED_ALPHA_PER_CHANNEL = 1e-3
PUBLISHED_ALPHA_PER_GROUP = 1e-4
# What there is without a target, relative to each row's root mean square as well: the published one
# for rows of 0.1, which lies between those of language models (0.02 to 0.2).
ALPHA_PER_CHANNEL = 1e-2
ALPHA_PER_GROUP = 1e-3
# The paper says 150; the authors' code runs 200, and the code is what produced its tables.
PUBLISHED_STEPS = 200

# What the solvers do unless told otherwise. ADMM goes to the optimum: most rows are there after 15
# to 20 steps (benchmarks/solver.md), and what a smaller tolerance changes is lost in quantization
# (benchmarks/optimum.md).
ADMM_STEPS = 100
ADMM_TOL = 1e-3
# The relative dual gap at which alpha="auto" takes a solution of ADMM: what is closer is lost in
# rounding, and the rounded rows are judged anyway (benchmarks/README.md).
SEARCH_TOL = 0.1


LEAST_DAMPING, MOST_DAMPING = 0.1, 0.3


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


def check_alpha(alpha: object) -> None:
    """Raise :class:`ConfigError` unless ``alpha`` is a positive number."""
    if not (_is_number(alpha) and alpha > 0):  # type: ignore[operator]
        raise ConfigError(
            f"alpha must be a finite number above 0, got {alpha!r}; "
            f"the paper uses {PUBLISHED_ALPHA_PER_CHANNEL} per channel "
            f"and {PUBLISHED_ALPHA_PER_GROUP} per group"
        )


def damping_for(tokens: int, inputs: int) -> float:
    """The share s of mean(diag G) to regularise with: ¼·sqrt(in / tokens) within [0.1, 0.3].

    Of n tokens the gram's spectrum is off by about 2·sqrt(in / n) of itself (Bai and Yin, Ann.
    Probab. 21, 1993), so that few tokens want more damping: with 512 of them 0.3 has both a lower
    output error on held-out tokens than 0.1 and a lower perplexity, with 2,048 they are alike. With
    many tokens it is no guard against chance any more but a weight for the small directions
    against the few large ones, which held-out tokens do not choose (benchmarks/README.md).

    Args:
        tokens: in the gram.
        inputs: of the site.
    """
    share = math.sqrt(inputs / max(1, tokens)) / 4
    return min(MOST_DAMPING, max(LEAST_DAMPING, share))


class SolverOptions:
    """How to iterate, checked, with the solver's own defaults in the place of None.

    Raises:
        ConfigError: names the first option that is out of range.
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

    With a ``step`` it is what torchao's own ``quantize_`` takes, see
    :func:`prepare_or_convert`; everything else takes it without.

    Args:
        alpha: penalty weight, relative to λmax of the gram and to each row's root mean square
            (dimensionless): c·W and d·X then give c·Ŵ. ``"published"`` is the paper's, 1e-3 for
            whole rows and 1e-4 for groups, relative to λmax alone, which takes much of a weight
            with small entries; ``"auto"`` lets every row choose its own, and
            a clip with it, by what torchao makes of it, and so needs a ``target``; 0 shrinks
            nothing, and is of use with ``rounding="gptq"`` only. None is ``"auto"`` where there
            is a target, otherwise 1e-2 for whole rows and 1e-3 for groups.
        group_size: inputs per quantization group; None takes whole rows, or the groups of the
            ``target`` where one is given. It must divide ``in``.
        solver: ``"admm"``, which goes to the optimum, or ``"pgd"``, the paper's projected
            (proximal) gradient descent, which is meant to stop before it.
        max_steps: the most steps the solver takes; None is 100 for admm, 200 for pgd.
        tol: relative dual gap (gap / objective) at which a row counts as converged; None is 1e-3
            for admm (0.1 while ``alpha="auto"`` compares) and 0 for pgd; 0 always takes
            ``max_steps``.
        damping: s in G + s·mean(diag G)·I, the gram that is solved with; None is, for admm, 0.3
            where tokens are few and 0.1 where they are many, see :func:`damping_for`,
            and 0, the calibration gram itself, for pgd. More keeps the weight where it was in
            the directions that the calibration hardly reaches. The report's output errors
            always use the calibration gram itself.
        precision: ``"float32"`` or ``"float64"``, of the solver, whatever the weight's dtype.
        step: of torchao's flow: ``"prepare"``, which starts to sum the grams (the options above
            wait for the other step), or ``"convert"``, which solves with them and quantizes.
        base_config: the torchao config that ``"convert"`` quantizes with.

    Raises:
        ConfigError: an option is out of its range; the message says what is allowed.
    """

    alpha: float | str | None = None
    group_size: int | None = None
    solver: str = "admm"
    max_steps: int | None = None
    tol: float | None = None
    damping: float | None = None
    precision: str = "float32"
    step: str | None = None
    # Not hashed: most of torchao's configs can be compared only.
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
        self._check_step()

    def _check_step(self) -> None:
        if isinstance(self.step, Enum):  # torchao's QuantizationStep, whose hash is not the word's
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
                f'base_config belongs to step="convert", got it with step={self.step!r}; '
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
        """``alpha``, or what it stands for with this ``group_size`` where that is no number."""
        if self.alpha is not None and not isinstance(self.alpha, str):
            return self.alpha
        if self.is_published:
            whole, grouped = PUBLISHED_ALPHA_PER_CHANNEL, PUBLISHED_ALPHA_PER_GROUP
        else:
            whole, grouped = ALPHA_PER_CHANNEL, ALPHA_PER_GROUP
        return whole if self.group_size is None else grouped

    @property
    def is_published(self) -> bool:
        """Whether alpha is the paper's, which knows nothing of the size of a row."""
        return self.alpha == "published"

    def regularisation(self, tokens: int, inputs: int) -> float:
        """``damping``, or the solver's own value for a gram of so many tokens, ``[in, in]``.

        The optimum fits the calibration closer than an iteration that stops early; damping keeps
        it from fitting what is particular to a few thousand tokens (benchmarks/optimum.md).
        """
        if self.damping is not None:
            return self.damping
        return damping_for(tokens, inputs) if self.solver == "admm" else 0.0

    def resolved(self) -> MagRConfig:
        """This config with what it stands for in the place of every None that has one value.

        ``group_size`` is the target's, admm's ``damping`` each gram's own.
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
        """This config as magr_transform takes it: how to solve, and no more."""
        return replace(self, step=None, base_config=None)

    def as_dict(self) -> dict[str, Any]:
        """How to solve, as JSON knows it: every option but ``step`` and ``base_config``."""
        options = asdict(self.without_step())
        del options["step"], options["base_config"]
        return options

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


@dataclass(frozen=True)
class QuantizeOptions:
    """What happens around the solve where a target is known; the arguments of magr_quantize.

    Raises:
        ConfigError: names the first option that is out of range.
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
