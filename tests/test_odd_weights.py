"""Weights without elements, and weights of dtypes that nothing is computed in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import SYMMETRIC, intx
from torch import Tensor, nn
from toys import changed, report_of, state

from magr_fx import MagRConfig, ModelError, magr_quantize, magr_transform

FLOAT8 = [dtype for dtype in vars(torch).values() if str(dtype).startswith("torch.float8")]


class WithEmpty(nn.Module):
    """Linears without inputs, and without outputs, beside others; one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.no_outputs, self.no_inputs = nn.Linear(8, 0), nn.Linear(0, 4)
        self.unread, self.table = nn.Linear(0, 4), nn.Embedding(0, 8)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x)) + self.no_inputs(self.no_outputs(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("trace", ["export", "make_fx"])
@pytest.mark.parametrize("quantize", [False, True])
def test_weights_without_elements_are_skipped(quantize: bool, trace: str, strict: bool) -> None:
    model, x = WithEmpty(), torch.randn(16, 8)
    if strict:
        del model.unread  # which no input reaches, and which is refused for that
    if quantize:
        magr_quantize(model, [x], intx(4, SYMMETRIC, None), trace=trace, strict=strict)
    else:
        magr_transform(model, [x], MagRConfig(alpha=1e-2), trace=trace, strict=strict)
    report = report_of(model)
    assert {site.name for site in report.rewritten} == {"first.weight", "last.weight"}
    skipped = {site.name: site.reason for site in report.skipped}
    assert "no elements" in skipped["no_outputs.weight"]
    assert "no elements" in skipped["no_inputs.weight"]
    with torch.no_grad():
        assert model(x).shape == (16, 4)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_refused_by_name(dtype: torch.dtype, quantize: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 8).to(dtype), requires_grad=False)
    before = state(model[0])
    work, options = (
        (magr_quantize, [intx(4, SYMMETRIC, None)]) if quantize else (magr_transform, [])
    )
    with pytest.raises(ModelError, match=r"1.weight \(4, 8\) is stored as torch.float8"):
        work(model, [torch.randn(9, 8)], *options)
    assert changed(model[0], before) == []
