"""What a rotation did with one stream of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rotation:
    """A stream of the model, and whether it is rotated.

    Attributes:
        name: the first weight that reads it.
        block: the numbers that one rotation mixes: the hidden size, or that of a head.
        weights: how many parameters are rotated along one axis.
        reason: why it is not rotated; empty if it is.
    """

    name: str
    block: int
    weights: int
    reason: str = ""
