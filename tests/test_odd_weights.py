"""Weights without elements, and weights of dtypes that nothing is computed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import Formula
from targets import SYMMETRIC, intx
from torch import Tensor, nn
from torch.nn import functional
from toys import changed, report_of, state

from magr_fx import CoverageError, MagRConfig, ModelError, magr_quantize, magr_transform

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


class Odd(nn.Module):
    """A parameter of any kind between two linears, whose input goes through ``read``."""

    def __init__(self, weight: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.odd, self.read = nn.Parameter(weight, requires_grad=False), read

    def forward(self, x: Tensor) -> Any:
        return self.last(self.read(self.first(x), self.odd))


def cast(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype))


def unread(x: Tensor, _: Tensor) -> Tensor:
    return x


def as_bytes(x: Tensor, weight: Tensor) -> Tensor:
    return x + weight.view(torch.uint8).float().mean()


def in_complex(x: Tensor, weight: Tensor) -> Tensor:
    return (x.to(weight.dtype) @ weight).real


def numbers(dtype: torch.dtype) -> Tensor:
    if dtype is torch.float4_e2m1fn_x2:
        return torch.arange(64, dtype=torch.uint8).view(8, 8).view(dtype)
    return (torch.arange(64.0).view(8, 8) / 16 + 1).to(dtype)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("dtype", "read", "reason"),
    [
        *((dtype, cast, f"stored as {dtype}: MagR works on floating numbers") for dtype in FLOAT8),
        *((dtype, as_bytes, "no matmul that can be rewritten") for dtype in FLOAT8),
        *((dtype, unread, "no calibration input reaches it") for dtype in FLOAT8),
        (torch.float4_e2m1fn_x2, as_bytes, "no matmul that can be rewritten"),
        (torch.float4_e2m1fn_x2, unread, "no calibration input reaches it"),
        (torch.int8, cast, "of a torch.int8 weight"),
        (torch.bool, cast, "of a torch.bool weight"),
        (torch.complex64, in_complex, "of a torch.complex64 weight"),
    ],
)
def test_a_weight_of_another_dtype_is_skipped(
    dtype: torch.dtype, read: Any, reason: str, quantize: bool, filtered: bool
) -> None:
    model, x = Odd(numbers(dtype), read), torch.randn(16, 8)
    before = model.odd.clone()
    chosen = (lambda module, name: name in ("first", "last")) if filtered else None
    if quantize:
        magr_quantize(model, [x], intx(4, SYMMETRIC, None), filter_fn=chosen)
    else:
        magr_transform(model, [x], MagRConfig(alpha=1e-2), filter_fn=chosen)
    report = report_of(model)
    assert [site.name for site in report.rewritten] == ["first.weight", "last.weight"]
    assert [site.name for site in report.skipped] == ["odd"]
    assert reason in report.skipped[0].reason
    assert torch.equal(model.odd.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_a_linear_of_float8_that_nothing_reaches_is_left_alone(dtype: torch.dtype) -> None:
    model = Odd(torch.ones(8), unread)
    model.other = nn.Linear(8, 8)
    model.other.weight = nn.Parameter(numbers(dtype), requires_grad=False)
    magr_quantize(model, [torch.randn(16, 8)], intx(4, SYMMETRIC, None))
    assert model.other.weight.dtype == dtype
    assert [site.name for site in report_of(model).skipped] == ["other.weight"]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_strict_does_not_leave_float8_as_it_is(dtype: torch.dtype) -> None:
    model = Odd(numbers(dtype), cast)
    before = state(model.first)
    with pytest.raises(CoverageError, match=f"odd: stored as {dtype}"):
        magr_transform(model, [torch.randn(16, 8)], MagRConfig(alpha=1e-2), strict=True)
    assert changed(model.first, before) == []


def test_a_model_of_nothing_else_is_refused() -> None:
    weight = nn.Parameter(numbers(torch.float8_e5m2), requires_grad=False)
    model = Formula(lambda m, x: cast(x, m.odd), odd=weight)
    with pytest.raises(ModelError, match=r"odd: stored as .*full-precision model"):
        magr_transform(model, [torch.randn(16, 8)])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated
@pytest.mark.filterwarnings("ignore:Sparse")  # CSR tensors are in beta
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (lambda: torch.eye(8).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.eye(8).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.eye(8).to_mkldnn(), "torch._mkldnn"),
        (lambda: torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda: torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)]), "nested"),
        (
            lambda: torch.nested.nested_tensor(
                [torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged
            ),
            "nested",
        ),
    ],
    ids=["coo", "csr", "mkldnn", "quantized", "nested", "jagged"],
)
def test_a_parameter_without_plain_memory_is_refused_by_name(weight: Any, kind: str) -> None:
    model = Odd(torch.ones(8), unread)
    model.odd = nn.Parameter(weight(), requires_grad=False)
    before = state(model.first)
    with pytest.raises(ModelError, match=f"odd is stored as {kind}"):
        magr_transform(model, [torch.randn(9, 8)])
    assert changed(model.first, before) == []
