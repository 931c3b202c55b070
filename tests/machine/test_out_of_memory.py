"""Memory that is used up is said as that, wherever it happens, and what was done by then."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from targets import SYMMETRIC, intx
from torch import Tensor, fx, nn
from torch.export import Dim, export
from toys import WIDTH, changed, state, vectors

from magr_fx import (
    MagRConfig,
    MagRError,
    MagRPass,
    OutOfMemoryError,
    magr_quantize,
    magr_transform,
)
from magr_fx.machine.memory import is_out_of_memory

QUICK = MagRConfig(alpha=1e-2)
TARGET = intx(4, SYMMETRIC, None)


def of_the_host() -> None:
    raise MemoryError


def of_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def of_torch_on_a_cpu() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def of_a_memory_map() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


FAILURES: list[Callable[[], None]] = [of_the_host, of_a_device, of_torch_on_a_cpu, of_a_memory_map]
failures = pytest.mark.parametrize("fail", FAILURES)


class Countdown:
    """Fails in one of its calls; the first is 1."""

    def __init__(self) -> None:
        self.left, self.fail = 0, of_the_host

    def call(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.fail()


COUNTDOWN = Countdown()


@torch.library.custom_op("magr_test::hungry", mutates_args=())
def hungry(x: Tensor) -> Tensor:
    """The same values; as it runs, the memory may be used up."""
    COUNTDOWN.call()
    return x.clone()


@hungry.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Hungry(nn.Module):
    """Three blocks; each needs memory before its linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(hungry(x)).relu()
        return x


@pytest.fixture(autouse=True)
def enough_at_first() -> Iterator[None]:
    COUNTDOWN.left = 0
    yield
    COUNTDOWN.left = 0


def transform(model: nn.Module, **options: Any) -> Any:
    return magr_transform(model, vectors(), QUICK, **options)


def quantize(model: nn.Module, **options: Any) -> Any:
    return magr_quantize(model, vectors(), TARGET, **options)


def gptq(model: nn.Module, **options: Any) -> Any:
    return magr_quantize(model, vectors(), TARGET, rounding="gptq", **options)


@failures
def test_errors_that_say_it_are_known(fail: Callable[[], None]) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as raised:
        fail()
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "other",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
    ],
)
def test_others_are_no_such(other: Exception) -> None:
    assert not is_out_of_memory(other)


def error_of(work: Callable[..., Any], model: nn.Module, trace: str) -> MagRError | None:
    try:
        work(model, trace=trace)
    except MagRError as error:
        return error
    return None


@pytest.mark.parametrize("trace", ["export", "make_fx"])
@pytest.mark.parametrize("work", [transform, quantize, gptq])
@pytest.mark.slow_unless("transform-make_fx")
def test_wherever_it_runs_out_it_is_said(work: Callable[..., Any], trace: str) -> None:
    """In turn at each of the calls that a whole run makes, until one has no failure."""
    COUNTDOWN.fail, told, rewritten = of_torch_on_a_cpu, 0, 0
    for at in range(1, 100):
        COUNTDOWN.left = at
        model = Hungry()
        before = state(model)
        error = error_of(work, model, trace)
        if error is not None:
            assert isinstance(error, OutOfMemoryError), repr(error)
            message = str(error)
            assert "smaller or shorter batches" in message
            names = {n for n in changed(model, before) if n.endswith("weight")}
            report = getattr(model, "magr_report", None)
            listed = {site.name for site in report.rewritten} if report else set()
            assert ("Nothing was changed" in message) == (not names)
            assert (f"{len(names)} weights are rewritten already" in message) == bool(names)
            assert names <= listed
            told += 1
            rewritten += bool(names)
        if COUNTDOWN.left > 0:  # the run has fewer calls
            break
    assert told >= 4
    assert COUNTDOWN.left > 0
    if work is not gptq:
        assert rewritten > 0


@failures
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_who_catches_it_as_torch_raises_it_still_does(
    kind: type[Exception], fail: Callable[[], None]
) -> None:
    COUNTDOWN.left, COUNTDOWN.fail = 1, fail
    with pytest.raises(kind, match="Nothing was changed"):
        transform(Hungry(), trace="make_fx")


@failures
def test_of_a_pass(fail: Callable[[], None]) -> None:
    x = vectors()[0]
    graph_module = export(Hungry(), (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    assert isinstance(graph_module, fx.GraphModule)
    before = state(graph_module)
    COUNTDOWN.left, COUNTDOWN.fail = 2, fail
    with pytest.raises(OutOfMemoryError, match="Nothing was changed"):
        MagRPass(vectors(), QUICK)(graph_module)
    assert changed(graph_module, before) == []
