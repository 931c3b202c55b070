"""What cannot be solved is one site's failure, whatever linear algebra raised; the others go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import ASYMMETRIC, intx
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from toys import mlp, vectors

from magr_fx import CalibrationError, magr_transform
from magr_fx.passes.rewriting import quantized_weights, solve_sites

RAISED = [ZeroDivisionError("of an iteration"), LinAlgError("no luck"), CalibrationError("no gram")]


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_one_site_fails_and_keeps_its_weight(
    error: Exception, searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = (quantized_weights, "choose") if searched else (solve_sites, "solve_magr")
    whole: Any = getattr(module, name)
    calls = 0

    def fail_once(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise error
        return whole(*given, **options)

    monkeypatch.setattr(module, name, fail_once)
    model = mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    target = intx(3, ASYMMETRIC, None) if searched else None
    report: Any = magr_transform(model, vectors(), target=target).magr_report
    assert len(report.failed) == 1
    assert type(error).__name__ in report.failed[0].reason
    assert report.rewritten
    for site in report.failed:
        assert torch.equal(model.state_dict()[site.name], before[site.name])
    for site in report.rewritten:
        assert not torch.equal(model.state_dict()[site.name], before[site.name])


def test_no_memory_is_not_a_sites_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("of the device")

    monkeypatch.setattr(solve_sites, "solve_magr", fail)
    with pytest.raises(torch.OutOfMemoryError):
        magr_transform(mlp(), vectors())
