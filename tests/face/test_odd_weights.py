"""Weights without elements, and of dtypes and layouts that nothing is solved in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import SYMMETRIC, intx
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import quantize_
from toys import changed, report_of, state

from magr_fx import (
    CalibrationError,
    CoverageError,
    MagRConfig,
    ModelError,
    TraceError,
    magr_quantize,
    magr_transform,
)

FLOAT8 = [dtype for dtype in vars(torch).values() if str(dtype).startswith("torch.float8")]
INTEGERS = [torch.int8, torch.uint8, torch.int64, torch.bool]
QUICK = MagRConfig(alpha=1e-2)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning"),
]


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
        magr_transform(model, [x], QUICK, trace=trace, strict=strict)
    report = report_of(model)
    assert {site.name for site in report.rewritten} == {"first.weight", "last.weight"}
    skipped = {site.name: site.reason for site in report.skipped}
    assert "no elements" in skipped["no_outputs.weight"]
    assert "no elements" in skipped["no_inputs.weight"]
    with torch.no_grad():
        assert model(x).shape == (16, 4)


Read = Callable[[Tensor, Tensor], Tensor]


class Odd(nn.Module):
    """Two linears, and between them something that reads an odd parameter."""

    def __init__(self, weight: Tensor, read: Read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.odd = nn.Linear(8, 8, bias=False)
        self.odd.weight = nn.Parameter(weight, requires_grad=False)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.last(self.read(self.first(x), self.odd.weight))


def upcast(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype))


def packed(x: Tensor, weight: Tensor) -> Tensor:
    return x + weight.view(torch.uint8).sum().to(x.dtype)


def of_complex(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x.to(weight.dtype), weight).real


def masked(x: Tensor, weight: Tensor) -> Tensor:
    return x.masked_fill(weight[0], 0.0)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.T).T


def unread(x: Tensor, weight: Tensor) -> Tensor:
    return x


def dense() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([dense(), dense()[:3]], layout=layout)


# What a weight may be, who reads it, the reason that the report gives, whether an input meets it
ODD: dict[str, tuple[Callable[[], Tensor], Read, str, bool]] = {
    **{
        f"{dtype}": (lambda dtype=dtype: dense().abs().to(dtype), upcast, str(dtype), True)  # type: ignore[misc]
        for dtype in FLOAT8
    },
    **{
        f"{dtype}": (lambda dtype=dtype: (3 * dense()).abs().to(dtype), upcast, str(dtype), True)  # type: ignore[misc]
        for dtype in INTEGERS
    },
    "boolean mask": (lambda: dense() > 0, masked, "torch.bool", False),
    "float8, unread": (lambda: dense().to(torch.float8_e5m2), unread, "float8_e5m2", True),
    "float4": (
        lambda: torch.zeros(8, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        packed,
        "torch.float4_e2m1fn_x2",
        False,
    ),
    "complex": (lambda: dense().to(torch.complex64), of_complex, "torch.complex64", True),
    "sparse": (lambda: dense().to_sparse(), product, "torch.sparse_coo", True),
    "sparse, unread": (lambda: dense().to_sparse(), unread, "torch.sparse_coo", True),
    "csr, unread": (lambda: dense().to_sparse_csr(), unread, "torch.sparse_csr", True),
    "bsr, unread": (lambda: dense().to_sparse_bsr((2, 2)), unread, "torch.sparse_bsr", True),
    "nested, unread": (lambda: nested(torch.strided), unread, "nested", True),
    "jagged, unread": (lambda: nested(torch.jagged), unread, "nested", True),
}
odd_weights = pytest.mark.parametrize("kind", ODD)


def work(verb: str, model: nn.Module, x: Tensor, **options: Any) -> None:
    if verb == "transform":
        magr_transform(model, [x], QUICK, **options)
    else:
        rounding = "gptq" if verb == "gptq" else "nearest"
        magr_quantize(model, [x], intx(4, SYMMETRIC, None), rounding=rounding, **options)


@pytest.mark.parametrize("verb", ["transform", "quantize", "gptq"])
@odd_weights
def test_a_weight_that_cannot_be_shrunk_is_skipped(kind: str, verb: str, tmp_path: Path) -> None:
    make, read, reason, _ = ODD[kind]
    model, x = Odd(make(), read), torch.randn(64, 8)
    weight = model.odd.weight
    kept = weight if weight.is_nested or weight.layout is not torch.strided else weight.clone()
    work(verb, model, x, checkpoint_dir=tmp_path)
    report = report_of(model)
    assert {site.name for site in report.rewritten} == {"first.weight", "last.weight"}
    assert reason in {site.name: site.reason for site in report.skipped}["odd.weight"]
    assert model.odd.weight is weight
    if kept is not weight:
        bits = [t.contiguous().view(torch.uint8) for t in (weight.data, kept)]
        assert torch.equal(*bits)
    with torch.no_grad():
        assert model(x).isfinite().all()


@odd_weights
def test_strict_refuses_it_where_an_input_meets_it(kind: str) -> None:
    make, read, reason, met = ODD[kind]
    model, x = Odd(make(), read), torch.randn(64, 8)
    before = state(model.first)
    if met:
        with pytest.raises(CoverageError, match=rf"odd\.weight: .*{re.escape(reason)}"):
            work("transform", model, x, strict=True)
        assert changed(model.first, before) == []
    work("transform", model, x, strict=True, filter_fn=lambda module, name: name != "odd")
    assert {s.name for s in report_of(model).rewritten} == {"first.weight", "last.weight"}


class Reading(nn.Module):
    """A linear between two others whose weight its own code does not fit."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.odd.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.odd(self.first(x)))


@pytest.mark.parametrize("trace", ["auto", "make_fx"])
@pytest.mark.parametrize("verb", ["transform", "quantize"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: dense().to(torch.float8_e4m3fn), r"\(8, 8\) is stored as torch.float8_e4m3fn"),
        (lambda: dense().to(torch.int8), r"\(8, 8\) is stored as torch.int8"),
        (lambda: dense().to_sparse_csr(), r"\(8, 8\) is stored as torch.sparse_csr"),
        (lambda: nested(torch.jagged), r"\(2,\) is a nested tensor"),
    ],
)
def test_where_the_model_does_not_run_with_it_its_name_is_said(
    make: Callable[[], Tensor], what: str, verb: str, trace: str
) -> None:
    model = Reading(make())
    before = state(model.first)
    errors = (TraceError, CalibrationError, ModelError)  # by what of torch is first to refuse it
    with pytest.raises(errors, match=rf"odd\.weight {what}.*full-precision"):
        work(verb, model, torch.randn(64, 8), trace=trace)
    assert changed(model.first, before) == []


class Masked(nn.Module):
    """Attention with a causal mask that is a parameter, and added to the scores."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 4)
        allowed = torch.ones(6, 6, dtype=torch.bool).tril()
        self.mask = nn.Parameter(torch.zeros(6, 6).masked_fill(~allowed, hidden), False)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.first(x).chunk(3, -1)
        return self.last((q @ k.mT + self.mask).softmax(-1) @ v)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("trace", ["export", "make_fx"])
@pytest.mark.parametrize("verb", ["transform", "quantize"])
def test_a_mask_may_be_a_parameter(verb: str, trace: str, hidden: float) -> None:
    model, x = Masked(hidden), torch.randn(8, 6, 8)
    work(verb, model, x, trace=trace)
    report = report_of(model)
    assert {site.name for site in report.rewritten} == {"first.weight", "last.weight"}
    assert {site.name for site in report.skipped} == {"mask"}
    with torch.no_grad():
        assert model(x).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("verb", ["transform", "quantize"])
def test_weights_that_are_not_finite_are_refused(verb: str, value: float) -> None:
    model = Reading(dense())
    model.odd.weight[3, 5] = value
    before = state(model.first)
    with pytest.raises(ModelError, match=r"odd\.weight holds NaN or Inf"):
        work(verb, model, torch.randn(64, 8))
    assert changed(model.first, before) == []


@pytest.mark.parametrize("verb", ["transform", "quantize"])
@pytest.mark.parametrize("what", ["quantized", "meta", "nan", "float8"])
def test_what_filter_fn_leaves_out_may_be_anything(what: str, verb: str) -> None:
    model, x = Odd(dense(), upcast if what == "float8" else unread), torch.randn(64, 8)
    if what == "quantized":
        model.read = functional.linear
        quantize_(model.odd, intx(4, SYMMETRIC, None))
    elif what == "nan":
        model.odd.weight.fill_(torch.nan)
    else:
        to = "meta" if what == "meta" else torch.float8_e4m3fn
        model.odd.weight = nn.Parameter(model.odd.weight.to(to), False)
    weight = model.odd.weight
    work(verb, model, x, filter_fn=lambda module, name: name != "odd")
    report = report_of(model)
    assert {site.name for site in report.rewritten} == {"first.weight", "last.weight"}
    assert [site.name for site in report.skipped] == ["odd.weight"]
    assert model.odd.weight is weight
    with torch.no_grad():
        assert model(x).shape == (64, 4)


def test_a_weight_without_values_is_refused_where_it_is_read() -> None:
    model = Odd(dense().to("meta"), upcast)
    with pytest.raises((ModelError, TraceError), match=r"odd\.weight .*meta device"):
        work("transform", model, torch.randn(64, 8), filter_fn=lambda module, name: name != "odd")


@pytest.mark.parametrize("make", [lambda: dense().to(torch.float8_e5m2), dense().to_sparse])
def test_quantize_with_magr_says_what_to_leave_out(make: Callable[[], Tensor]) -> None:
    model = Reading(make())
    config = MagRConfig(step="prepare")
    with pytest.raises(ModelError, match=r"\(8, 8\) is stored as .*leave it out with quantize_"):
        quantize_(model, config)
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "odd")
