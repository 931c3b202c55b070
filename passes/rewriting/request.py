"""What the caller asked for, in one immutable object that is passed through all steps."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from magr_fx.config import MagRConfig
from magr_fx.passes.finding.find_linears import FilterFn, check_filter
from magr_fx.passes.handover.mixed_target import MixedTarget
from magr_fx.passes.handover.target import Target
from magr_fx.passes.tracing.trace_batches import AUTO, Tracing

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Folders:
    """Where a run may write.

    Attributes:
        checkpoint: states to resume from after a crash; None saves none.
        spill: activations between blocks; None keeps them in memory.
    """

    checkpoint: PathLike | None = None
    spill: PathLike | None = None


@dataclass(frozen=True)
class Request:
    """What the caller asked for.

    Attributes:
        config: how to solve, at the group size of the target.
        target: the torchao config that will quantize the weights, or several by the names of the
            weights, where it takes part in rewriting them; None rewrites them without regard to it.
        tracing: how to trace.
        filter_fn: which weights to take; None takes all but those that an embedding shares.
        strict: whether every weight that meets an input has to be rewritten.
        folders: where to write.
        progress: whether to show bars; None shows them on a terminal only.
        quantize: whether the target quantizes the model afterwards.

    Raises:
        ConfigError: ``filter_fn`` cannot be called with a module and a name.
    """

    config: MagRConfig
    target: Target | MixedTarget | None = None
    tracing: Tracing = AUTO
    filter_fn: FilterFn | None = None
    strict: bool = False
    folders: Folders = Folders()
    progress: bool | None = None
    quantize: bool = False

    def __post_init__(self) -> None:
        check_filter(self.filter_fn)

    @property
    def quantizer(self) -> Target | MixedTarget | None:
        """The target, where it quantizes the model afterwards."""
        return self.target if self.quantize else None

    def config_of(self, name: str) -> MagRConfig:
        """How to solve for a weight, by its name."""
        goal = self.target.goal_of(name) if isinstance(self.target, MixedTarget) else None
        return self.config if goal is None else goal.config

    @property
    def makes_tensors(self) -> bool:
        """Whether torchao's tensors are made directly, so that no weight is rewritten."""
        return self.target is not None and self.target.makes_tensors

    @property
    def propagates(self) -> bool:
        """Whether each layer is fitted to the outputs of the quantized layers before it."""
        return self.target is not None and self.target.options.propagate

    @property
    def holdout(self) -> float:
        """The share of the tokens that is held out to judge the result."""
        return 0.0 if self.target is None else self.target.options.holdout

    def without_values(self) -> Request:
        """The same request for a model whose weights are offloaded while it is traced.

        Raises:
            ConfigError: the tracer that was asked for runs the model.
        """
        return replace(self, tracing=self.tracing.without_values())
