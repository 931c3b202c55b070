"""An exported graph that computes something else than its model is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_helpers import Formula
from tiny_models import activations
from torch import Tensor, nn
from toys import WIDTH, changed, report_of, state, vectors

from magr_fx import MagRConfig, TraceError, magr_transform

QUICK = MagRConfig(alpha=1e-3)


def linears() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, 8)}


def otherwise(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    if torch.compiler.is_exporting():
        x = x.tril()
    return m.b(x)


def another_shape(m: Any, x: Tensor) -> Any:
    x = m.b(m.a(x))
    return x[:, :4] if torch.compiler.is_exporting() else x


def test_auto_takes_the_model_as_it_runs() -> None:
    calib = vectors(40, 24)
    model = magr_transform(Formula(otherwise, **linears()), calib, QUICK)
    report = report_of(model)
    assert report.tracer == "make_fx"
    assert report.refusal.startswith(
        "the exported graph of Formula computes something else than the model itself with "
        "calibration batch 0: its outputs differ by 0."
    )
    assert f"\nbecause {report.refusal}\n" in report.totals()
    plain = magr_transform(Formula(lambda m, x: m.b(m.a(x)), **linears()), calib, QUICK)
    assert report_of(plain).tracer == "export"
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "how"), [(otherwise, "differ by 0."), (another_shape, r"shapes \[\(40, 4\)\]")]
)
def test_asked_for_export_it_is_an_error(function: Any, how: str) -> None:
    model = Formula(function, **linears())
    before = state(model)
    with pytest.raises(TraceError, match=rf'{how}.*needs trace="make_fx"'):
        magr_transform(model, vectors(), trace="export")
    assert changed(model, before) == []


def test_every_signature_is_compared_but_not_every_batch() -> None:
    calls = []

    def function(m: Any, x: Tensor, scale: float = 1.0) -> Any:
        if not torch.compiler.is_exporting():
            calls.append(scale)
        return m.b(m.a(x)) * (3.0 if scale == 2.0 and torch.compiler.is_exporting() else 1.0)

    x, y = vectors(40, 24)
    magr_transform(Formula(function, **linears()), [x, y, x], QUICK, trace="export")
    assert calls == [1.0]
    with pytest.raises(TraceError, match="with calibration batch 1"):
        magr_transform(Formula(function, **linears()), [x, (y, 2.0)], QUICK, trace="export")


def test_state_random_numbers_and_inputs_stay() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x.mul_(2)
        m.count.add_(1)
        m.last = x
        return m.b(m.a(x)) + m.count

    model = Formula(function, **linears())
    model.register_buffer("count", torch.zeros(1))
    model.register_buffer("last", torch.zeros(1))
    x = activations(40, WIDTH)
    kept, generator = x.clone(), torch.get_rng_state()
    magr_transform(model, [x], QUICK, trace="export")
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.count.item() == 0
    assert torch.equal(model.last, torch.zeros(1))


def test_random_numbers_are_no_difference() -> None:
    def function(m: Any, x: Tensor) -> Any:
        return m.b(m.a(x) + torch.randn_like(x))

    model = magr_transform(Formula(function, **linears()), vectors(), QUICK)
    assert report_of(model).tracer == "export"


def test_rounding_in_half_precision_is_no_difference() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        return m.b(x * 1.01 if torch.compiler.is_exporting() else x)

    half = Formula(function, **linears()).to(torch.bfloat16)
    calib = vectors(dtype=torch.bfloat16)
    assert report_of(magr_transform(half, calib, QUICK)).tracer == "export"
    assert report_of(magr_transform(Formula(function, **linears()), vectors(), QUICK)).refusal
