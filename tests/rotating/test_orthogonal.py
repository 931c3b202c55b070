"""Random orthogonal matrices."""

from __future__ import annotations

import pytest
import torch

from magr_fx.passes.rotating.orthogonal import random_orthogonal


@pytest.mark.parametrize("size", [1, 2, 3, 16, 65])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_they_are_orthogonal(size: int, keeps_mean: bool) -> None:
    if size == 1 and keeps_mean:
        return
    generator = torch.Generator().manual_seed(size)
    q = random_orthogonal(size, generator, keeps_mean=keeps_mean)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(q @ ones, ones, atol=1e-12) == (keeps_mean or bool((q == 1).all()))


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_seed_is_a_matrix(keeps_mean: bool) -> None:
    def made(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return random_orthogonal(8, generator, keeps_mean=keeps_mean)

    assert torch.equal(made(0), made(0))
    assert not torch.allclose(made(0), made(1))


def test_every_direction_is_as_likely() -> None:
    """Of the image of a unit vector each coordinate has the mean 0 and the variance 1/n."""
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([random_orthogonal(4, generator)[0] for _ in range(4000)])
    assert images.mean(0).abs().max() < 0.04
    assert (images.var(0) - 0.25).abs().max() < 0.02
