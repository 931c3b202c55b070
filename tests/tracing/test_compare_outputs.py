"""What tells two lists of tensors apart, and that it takes no copy of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import activations
from torch import Tensor

from magr_fx.passes.tracing import compare_outputs
from magr_fx.passes.tracing.compare_outputs import difference

INF, NAN = float("inf"), float("nan")
HALF = torch.float16
LARGEST = torch.finfo(HALF).max


def of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# one, other, tolerance, what is said
PAIRS: list[tuple[Tensor, Tensor, float, str]] = [
    (of(1, 2), of(1, 2), 0, ""),
    (of(1, 2.0001), of(1, 2), 1e-3, ""),
    (of(3, 4), of(3, 5), 1e-3, "differ by 0.17 of their norm"),
    (of(1, 2), of(0, 0), 1e-3, "differ by 2.2 from their norm"),
    (of(1, NAN, INF), of(1, NAN, INF), 0, ""),
    (of(1, NAN, -INF), of(1, -INF, NAN), 0, ""),  # what is lost may be lost in either way
    (of(1, NAN), of(1, 2), 1e-3, "differ in infinite or NaN values (1 of 2)"),
    (of(1, 2), of(1, NAN), 1e-3, "differ in infinite or NaN values (1 of 2)"),
    (of(1, INF), of(1, 2), 1e-3, "differ in infinite or NaN values (1 of 2)"),
    (of(-INF, 1), of(INF, 1), 1e-3, "differ in infinite or NaN values (1 of 2)"),
    (of(INF, dtype=HALF), of(LARGEST, dtype=HALF), 1e-3, ""),
    (of(-LARGEST, dtype=HALF), of(-INF, dtype=HALF), 1e-3, ""),
    (of(INF, dtype=HALF), of(-LARGEST, dtype=HALF), 1e-3, "differ in infinite"),
    (of(INF, dtype=HALF), of(LARGEST / 2, dtype=HALF), 1e-3, "differ in infinite"),
    (of(1), of(1, 2), 1, r"have the shapes [(1,)] instead of [(2,)]"),
    (of(1, 2), torch.tensor([1, 2]), 1, "have values of torch.float32 instead of torch.int64"),
    (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), 0, ""),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), 0.1, "differ in 1 of 2 integers"),
    (torch.arange(2000), torch.arange(2000).clamp(max=1998), 1e-3, ""),  # an argmax, say
    (torch.tensor([True, False]), torch.tensor([True, True]), 1e-3, "differ in 1 of 2 integers"),
    (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), 0, ""),
    (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), 1e-3, "differ by 1.8 of their norm"),
    (torch.tensor([1 - 2j]).conj(), torch.tensor([1 + 2j]), 0, ""),
    (torch.eye(3).to_sparse(), torch.eye(3).to_sparse(), 0, ""),
    (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse(), 0, "differ by 0.5 of their norm"),
    (torch.zeros(0, 3), torch.zeros(0, 3), 0, ""),
    (torch.tensor(2.0), torch.tensor(3.0), 0.1, "differ by 0.33 of their norm"),
    (of(1, 2, dtype=torch.bfloat16), of(1, 2), 0, ""),
]


@pytest.mark.parametrize(("one", "other", "tolerance", "said"), PAIRS)
def test_what_is_said(one: Tensor, other: Tensor, tolerance: float, said: str) -> None:
    found = difference([one], [other], tolerance)
    assert found.startswith(said)
    assert bool(found) is bool(said)
    both = difference([torch.ones(2), one], [torch.ones(2), other], tolerance)
    assert bool(both) is bool(said)


def test_another_number_of_outputs() -> None:
    assert "instead of" in difference([torch.ones(2)], [torch.ones(2)] * 2, 1)


VIEWS: list[Any] = [
    lambda x: x,
    lambda x: x.mT,
    lambda x: x[:, ::2],
    lambda x: x[:, :1].expand_as(x),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.slow_unless("<lambda>2")
def test_parts_say_what_the_whole_says(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = activations(60, 50)
    one, other = view(one), view(one + activations(60, 50, seed=1) * 0.01)
    exact = float((one.double() - other.double()).norm() / other.double().norm())
    for part in (2**20, 64, 1):
        monkeypatch.setattr(compare_outputs, "PART", part)
        assert difference([one], [other], exact * 1.0001) == ""
        assert difference([one], [other], exact * 0.9999).startswith("differ by 0.0")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.slow_unless("True")
def test_no_copy_is_taken_of_what_is_compared(transposed: bool) -> None:
    one, other = torch.ones(64, 2**17), torch.ones(64, 2**17)  # 32 MiB each
    one[-1, -1] = 2e4
    if transposed:
        other = other.t().contiguous().t()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        assert difference([one], [other], 1e-3).startswith("differ by 6.9 of")
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 2**20 * 8
