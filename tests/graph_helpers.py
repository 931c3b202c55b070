"""Oracles for the graph passes: what the model itself computes, seen by hooks, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from tiny_models import ARCHITECTURES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import FilterFn, Found, find_linears
from magr_fx.passes.graphs.trace import Trace, TracedBatch, calibration_mode
from magr_fx.passes.inputs.calibration import Batch, read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

# (module, activation) → which of its rows count; None counts all.
Keep = Callable[[str, Tensor], "Tensor | None"]


class Formula(nn.Module):
    """A model that is written where it is tested: ``function(model, *inputs)`` and its parts."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)

    if TYPE_CHECKING:  # its parts are whatever a test gives it

        def __getattr__(self, name: str) -> Any: ...


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    """A parameter of standard normal values."""
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@dataclass(frozen=True)
class Analysis:
    """A model and what the passes made of it and its calibration."""

    model: nn.Module
    calib: list[Any]
    batches: list[Batch]
    traced: list[TracedBatch]
    found: Found

    @property
    def traces(self) -> list[Trace]:
        return list(dict.fromkeys(batch.trace for batch in self.traced))

    @property
    def reasons(self) -> dict[str, str]:
        return {rejection.name: rejection.reason for rejection in self.found.rejections}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {site.name: site.shape for site in self.found.sites}

    def run(self) -> CalibrationRun:
        return CalibrationRun(self.traced, self.found.sites)


def trace(
    model: nn.Module, calib: list[Any], tracer: str = "auto"
) -> tuple[list[Batch], list[TracedBatch]]:
    batches = read_calib(calib, model)
    with calibration_mode(model):
        return batches, trace_or_read(model, batches, Tracing(tracer))


def analyse(
    model: nn.Module, calib: list[Any], filter_fn: FilterFn | None = None, tracer: str = "auto"
) -> Analysis:
    """Everything up to the sites."""
    batches, traced = trace(model, calib, tracer)
    traces = dict.fromkeys(batch.trace for batch in traced)
    return Analysis(model, calib, batches, traced, find_linears(traces, model, filter_fn))


@functools.cache
def architecture(name: str) -> Analysis:
    """One of ``ARCHITECTURES``, traced once for all tests: they leave its weights alone."""
    make, calib, _, _ = ARCHITECTURES[name]
    return analyse(make(), calib())


def collect(analysis: Analysis) -> dict[str, SharedGram]:
    """The shared gram of every site, by the site's name; the grams are kept."""
    finished = {}
    with calibration_mode(analysis.model):
        for shared in chain.from_iterable(analysis.run().collect(progress=False)):
            gram = shared.gram
            for site in shared.sites:
                finished[site.name] = SharedGram(
                    shared.sites,
                    gram=gram,
                    tokens=int(shared.tokens),
                    padding_counted=shared.padding_counted,
                )
    return finished


def call(model: nn.Module, item: Any) -> list[Tensor]:
    """The tensors that the model itself returns for one calibration item."""
    with calibration_mode(model):
        if isinstance(item, Tensor):
            output = model(item)
        elif isinstance(item, (tuple, list)):
            output = model(*item)
        else:
            output = model(**item)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def hooked(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` with whatever reaches each of the model's nn.Linear."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0].detach())

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(hook_of(name)) for name, m in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_grams(
    model: nn.Module, calib: list[Any], keep: Keep = lambda name, activation: None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """weight → its float64 gram and its tokens, for each nn.Linear that the calibration reaches."""
    grams: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(module: str, activation: Tensor) -> None:
        rows = activation.double()
        kept = keep(module, activation)
        rows = rows.flatten(0, -2) if kept is None else rows[kept]
        name = f"{module}.weight"
        grams[name] = grams.get(name, 0) + rows.T @ rows
        tokens[name] = tokens.get(name, 0) + len(rows)

    with hooked(model, see):
        for item in calib:
            call(model, item)
    return grams, tokens


def gram_of(*activations: Tensor) -> Tensor:
    """XᵀX in float64 of activations ``[..., in]``."""
    rows = torch.cat([x.double().flatten(0, -2) for x in activations])
    return rows.T @ rows


def assert_gram(gram: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding: each entry within a share of what its products can add up to.

    Entry (i, j) is a sum of products x_i·x_j. In whatever order they are added, the error is a
    share of Σ|x_i||x_j| ≤ sqrt(G_ii·G_jj) (Cauchy and Schwarz). It is no share of the entry
    itself, which may be a small difference of large terms.
    """
    assert gram is not None
    assert gram.dtype == torch.float32
    assert gram.shape == expected.shape
    size = expected.diagonal().double().sqrt()
    error = (gram.double() - expected).abs()
    assert bool((error <= tolerance * size.outer(size)).all())


def assert_drift(drift: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the largest entry."""
    assert drift is not None
    assert drift.dtype == torch.float32
    assert drift.shape == expected.shape
    error = (drift.double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= tolerance
