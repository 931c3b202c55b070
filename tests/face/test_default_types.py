"""torch's default dtype and device are for the caller's own tensors: no result depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from targets import SYMMETRIC, intx
from torch import Tensor, nn
from toys import WIDTH, vectors

from magr_fx import MagRConfig, magr_quantize, magr_transform
from magr_fx.grams.gram import EXACT_UP_TO, largest_eigenvalue

CALIB = vectors()
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "admm": lambda m: magr_transform(m, CALIB, MagRConfig(alpha=1e-2)),
    "pgd": lambda m: magr_transform(m, CALIB, MagRConfig(alpha=1e-2, solver="pgd")),
    "make_fx": lambda m: magr_transform(m, CALIB, MagRConfig(alpha=1e-2), trace="make_fx"),
    "auto": lambda m: magr_quantize(m, CALIB, intx(3, SYMMETRIC, None)),
    "groups": lambda m: magr_quantize(m, CALIB, intx(3, SYMMETRIC, 4)),
    "gptq": lambda m: magr_quantize(m, CALIB, intx(3, SYMMETRIC, None), rounding="gptq", refine=1),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weights(way: str, around: Any = None) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, 8))
    if around is None:
        WAYS[way](model)
    else:
        with around:
            WAYS[way](model)
    found: Any = (model[0].weight, model[2].weight)
    return [w.detach() if type(w) is nn.Parameter else w.dequantize() for w in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow_if("make_fx-dtype1")
def test_the_default_dtype_changes_nothing(way: str, dtype: torch.dtype) -> None:
    wanted, found = weights(way), weights(way, default_dtype(dtype))
    assert [w.dtype for w in found] == [torch.float32] * 2
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("way", WAYS)
def test_nor_does_the_default_device(way: str) -> None:
    """Where no model is: what is made there by mistake fails in an op with what is not."""
    assert all(map(torch.equal, weights(way, torch.device("meta")), weights(way)))


def test_nor_do_they_where_the_largest_eigenvalue_is_iterated_for() -> None:
    gram = torch.diag(torch.linspace(1, 2, EXACT_UP_TO + 8))
    wanted = largest_eigenvalue(gram)
    with torch.device("meta"), default_dtype(torch.float64):
        assert torch.equal(largest_eigenvalue(gram), wanted)
