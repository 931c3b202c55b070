"""full_float32: nothing but float32 inside, and afterwards what was in force before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from magr_fx.grams.gram import add_to_gram
from magr_fx.machine.matmul_precision import full_float32

MKLDNN: Any = torch.backends.mkldnn


@pytest.fixture(params=["highest", "high", "medium"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def in_force() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, MKLDNN.matmul.fp32_precision


def test_inside_it_is_float32_and_afterwards_as_before(setting: str) -> None:
    before = in_force()
    with full_float32():
        assert in_force() == ("ieee", "ieee")
        with full_float32():
            pass
        assert in_force() == ("ieee", "ieee")
    assert in_force() == before
    assert torch.get_float32_matmul_precision() == setting


def test_it_is_put_back_after_an_error(setting: str) -> None:
    before = in_force()
    with pytest.raises(ValueError, match="inside"), full_float32():
        raise ValueError("inside")
    assert in_force() == before


def test_a_gram_has_the_same_bits_whatever_the_setting(setting: str) -> None:
    tokens = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(64, 64)
    add_to_gram(gram, tokens)
    exact = tokens.double().T @ tokens.double()
    assert (gram - exact).norm() < 1e-6 * exact.norm()
