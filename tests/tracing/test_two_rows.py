"""Of a large batch two rows are compared, and all of it where two could hide a difference."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from graph_helpers import Formula, trace
from tiny_models import activations
from torch import Tensor, nn
from toys import changed, state

from magr_fx import TraceError
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.trace_batches import Tracing, trace_batches

PICTURE = (3, 80, 80)  # 19,200 values


def pictures(count: int = 6, *shape: int) -> Tensor:
    return activations(count, *(shape or PICTURE), seed=count)


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 8, stride=8)


class Watched(Formula):
    """Notes in ``ROWS`` of how many rows its runs were, of those that are no traces."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__(function, conv=convolution(), a=nn.Linear(4, 4), **parts)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not torch.compiler.is_exporting():
            ROWS.put(len(next(iter((*inputs, *named.values())))))
        return self.function(self, *inputs, **named)


ROWS: SimpleQueue[int] = SimpleQueue()  # no list, which would be put back


def noted() -> list[int]:
    """What was noted since this was asked last."""
    return [ROWS.get() for _ in range(ROWS.qsize())]


def rows_compared(model: nn.Module, *calib: Any) -> list[int]:
    """Of how many rows the model's runs were; TraceError where the graph is another function."""
    noted()
    with calibration_mode(model):
        trace_batches(model, read_calib(list(calib), model), Tracing("export"))
    return noted()


def features(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(m.conv(x).flatten(2).mT)
    return y


def exporting(x: Any, other: Any) -> Any:
    """The first for the model, the other one for its graph."""
    return other if torch.compiler.is_exporting() else x


# ---- two rows are enough

ALIKE: dict[str, Callable[..., Any]] = {
    "features": features,
    "pooled": lambda m, x: features(m, x).mean(1),
    "several": lambda m, x: {"last": (y := features(m, x)), "all": (y, y.mean(1))},
    "rows in the middle": lambda m, x: torch.stack([features(m, x), features(m, x) + 1]),
    "windows": lambda m, x: features(m, x).reshape(-1, 10, 4),
    "rows with a table": lambda m, x: (features(m, x), m.a.weight + 1),
    "a choice by its shape": lambda m, x: features(m, x) * (2 if x.shape[2] > 40 else 3),
}


@pytest.mark.parametrize("name", ALIKE)
def test_of_pictures_two_are_compared(name: str) -> None:
    model = Watched(ALIKE[name])
    assert rows_compared(model, pictures()) == [2]
    assert rows_compared(model, pictures(5), pictures(7)) == [2]


@pytest.mark.parametrize("name", ALIKE)
def test_a_graph_that_is_another_function_is_refused(name: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        return ALIKE[name](m, exporting(x, x * 1.01))

    with pytest.raises(TraceError, match=r"computes something else.*batch 0: its outputs differ"):
        rows_compared(Watched(function), pictures())
    assert noted() == [2, 6]


# ---- what only all rows tell: the last picture is a bright one

BRIGHT = pictures()
BRIGHT[5] += 20

READS: dict[str, Callable[[Tensor], bool]] = {
    "any": lambda x: bool((x > 15).any()),
    "item": lambda x: x.max().item() > 15,
    "tolist": lambda x: max(x.amax((1, 2, 3)).tolist()) > 15,
    "numpy": lambda x: x.detach().numpy().max() > 15,
    "comparison": lambda x: not x.max() <= 15,
    "float": lambda x: float(x.max()) > 15,
    "number of places": lambda x: len((x > 15).nonzero()) > 0,
    "a choice by a mask": lambda x: x[x > 15].numel() > 0,
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("same", [True, False])
def test_where_the_code_looks_at_values_all_are_compared(name: str, same: bool) -> None:
    """Only while it is not exported, or else export refuses it."""

    def function(m: Any, x: Tensor) -> Any:
        if torch.compiler.is_exporting() or not READS[name](x):
            return features(m, x)
        return features(m, x) * (1 if same else 2)

    model = Watched(function)
    if same:
        assert rows_compared(model, BRIGHT) == [2, 6]
        return
    with pytest.raises(TraceError, match="computes something else"):
        rows_compared(model, BRIGHT)
    assert noted() == [2, 6]


MIXED: dict[str, Callable[[Tensor], Any]] = {
    "centred": lambda x: x - x.mean(0),
    "rolled": lambda x: x.roll(1, 0),
    "reversed": lambda x: x.flip(0),
    "a sum": lambda x: x.sum(),
    "pairs": lambda x: x.flatten(1) @ x.flatten(1).T,
    "batch_norm": lambda x: nn.functional.batch_norm(x.mT, None, None, training=True),
    "rows last": lambda x: x.permute(1, 2, 0).reshape(-1, len(x)).softmax(1),
    "taking turns": lambda x: x.repeat(2, 1, 1),
}


@pytest.mark.parametrize("name", MIXED)
def test_where_rows_are_mixed_all_are_compared(name: str) -> None:
    model = Watched(lambda m, x: MIXED[name](features(m, x)))
    compared = rows_compared(model, pictures())
    assert compared[-1] == 6


@pytest.mark.parametrize(
    "other", [lambda x: x.roll(3, 0), lambda x: x[:1].expand_as(x), lambda x: x.flip(0)]
)
def test_other_rows_than_the_models_are_a_difference(other: Any) -> None:
    """Of two rows alone, rolled by 1 and by 3 are the same."""
    model = Watched(lambda m, x: exporting(*(f(features(m, x)) for f in (one_on, other))))
    with pytest.raises(TraceError, match="computes something else"):
        rows_compared(model, pictures())


def one_on(x: Tensor) -> Tensor:
    return x.roll(1, 0)


# ---- inputs of which two rows do not stand for all


def of_mask(m: Any, pixel_mask: Tensor) -> Tensor:
    return features(m, pixel_mask)


WHOLE: dict[str, tuple[Callable[..., Any], Any]] = {
    "few values": (features, pictures(6, 3, 16, 16)),
    "two": (features, pictures(2)),
    "whole numbers": (features, pictures().mul(50).round()),
    "integers": (lambda m, x: features(m, x.float()), pictures().mul(50).long()),
    "a mask": (lambda m, x, y: features(m, x) * y.mean((1, 2))[:, None, None],
               (pictures(), (pictures(6, 3, 80) > 0).float())),
    "an additive mask": (lambda m, x, y: features(m, x) + y.amin(1)[:, None],
                         (pictures(), torch.full((6, 3, 4), -1e9).triu())),
    "by its name": (of_mask, {"pixel_mask": pictures()}),
    "a mask inside": (lambda m, x: m.inner(pixel_mask=x), pictures()),
    "classes": (lambda m, x, y: features(m, x) + m.table(y)[:, None],
                (pictures(), torch.arange(6))),
    "two tables": (lambda m, x, y: (features(m, x), m.a(y)), (pictures(), activations(5, 4))),
    "one for all": (lambda m, x, y: features(m, x) + y, (pictures(), activations(1, 4))),
    "random": (lambda m, x: nn.functional.dropout(features(m, x), 0.5), pictures()),
    "an even number": (lambda m, x: features(m, x).reshape(len(x) // 3, 3, -1), pictures()),
    "five or more": (lambda m, x: features(m, x) if len(x) > 4 else m.a(features(m, x)),
                     pictures()),
}  # fmt: skip


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a = convolution(), nn.Linear(4, 4)

    def forward(self, pixel_mask: Tensor) -> Tensor:
        return features(self, pixel_mask)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.slow_if("random")
def test_all_rows_are_compared(name: str) -> None:
    function, item = WHOLE[name]
    model = Watched(function, inner=Inner(), table=nn.Embedding(6, 4))
    assert rows_compared(model, item) == [2 if name == "two" else 6]


def test_a_model_that_takes_no_two_rows_is_compared_on_all() -> None:
    def function(m: Any, x: Tensor) -> Any:
        if not torch.compiler.is_exporting() and len(x) < 5:
            raise ValueError("too few")
        return features(m, x)

    assert rows_compared(Watched(function), pictures()) == [2, 6]


def test_nothing_stays_of_the_two_rows() -> None:
    def function(m: Any, x: Tensor) -> Any:
        m.count.add_(1)
        m.last, m.seen = x, [*m.seen, 1]
        x.mul_(2)
        return features(m, x) + m.count

    model = Watched(function, count=nn.Buffer(torch.zeros(1)), last=None, seen=[])
    hooked, calls = list[int](), SimpleQueue[int]()
    model.a.register_forward_hook(lambda module, args, output: hooked.append(1))
    model.a.register_forward_hook(lambda module, args, output: calls.put(1))
    x, before, generator = pictures(), state(model), torch.get_rng_state()
    kept = x.clone()
    assert rows_compared(model, x) == [2]
    assert calls.qsize() == 2  # while it is exported, and while it is compared
    assert hooked == []
    assert changed(model, before) == []
    assert (model.last, model.seen) == (None, [])
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_graph_is_right_for_all_rows() -> None:
    model = Watched(features)
    calib = [pictures(6), pictures(3), pictures(1)]
    _, traced = trace(model, calib)
    for batch, x in zip(traced, calib, strict=True):
        torch.testing.assert_close(batch.trace.graph_module(*batch.values)[0], model(x))
