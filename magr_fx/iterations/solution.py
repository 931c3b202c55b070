"""Solution: the result of a solve, and how the solve of each row ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Status(IntEnum):
    """How the solve of one row ended; ``sentence`` says it in words, with the remedy."""

    CONVERGED = 0
    STEP_LIMIT = 1
    TRIVIAL = 2
    FAILED = 3

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The row's relative dual gap reached tol.",
    Status.STEP_LIMIT: (
        "The row took max_steps steps and its best iterate was returned; its dual gap says how "
        "far from the optimum it may be. To converge further, raise max_steps; if that does not "
        "help, float32 is not accurate enough and precision='float64' is needed."
    ),
    Status.TRIVIAL: (
        "The row was returned unchanged or as zeros; if that was not expected, check that "
        "calibration data reaches it and that alpha is neither tiny nor huge."
    ),
    Status.FAILED: (
        "The row's solution was not finite and the original row was returned; "
        "lower alpha, or keep the weight in a wider dtype."
    ),
}


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of :func:`solve_magr`. Objectives and gaps are in the units of the given gram.

    For a batch of problems every shape has one more dimension in front.
    """

    weight: Tensor  # [out, in], dtype and device of the given weight
    status: Tensor  # [out], int8: values of Status
    steps: Tensor  # [out], int32: steps taken
    objective_before: Tensor  # [out], float32: alpha λmax Σ‖w_group‖∞, the original row's
    objective: Tensor  # [out], float32: the returned row's, never above objective_before
    dual_gap: Tensor  # [out], float32: at least 0, and an upper bound of objective - optimum

    @property
    def summary(self) -> str:
        """The number of rows by status, e.g. ``converged: 570 rows, step limit: 6 rows``."""
        return summary(self.status)


def summary(status: Tensor) -> str:
    """The number of rows by status; ``status`` is a tensor of values of :class:`Status`."""
    counts = Counter(status.flatten().tolist())
    return ", ".join(
        f"{kind.name.lower().replace('_', ' ')}: {n} row{'s' if n != 1 else ''}"
        for kind in Status
        if (n := counts[kind])
    )


class Iterate(NamedTuple):
    """The result of an iteration, before its rows are evaluated in the weight's dtype."""

    weight: Tensor  # [..., out, in], in the dtype of the computation
    steps: Tensor  # [..., out], int32
    converged: Tensor  # [..., out], bool
    bound: Tensor  # [..., out], float64: a lower bound of each optimum, in units where λmax = 1
