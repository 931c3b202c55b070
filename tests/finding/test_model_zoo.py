"""Every weight of every family: found, with the right gram, rewritten, and quantized or listed."""

from __future__ import annotations

import functools
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from coverage_table import coverage
from model_zoo import ZOO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import IntxWeightOnlyConfig, MappingType
from toys import INT, report_of
from transformers.integrations import moe
from weight_oracle import Matrix, Row, oracle, site_matrix

from magr_fx import MagRConfig, magr_quantize, magr_transform
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.graphs.trace import TracedBatch, calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

MAKE_FX_ONLY = ("DBRX", "`if` on data")  # their control flow depends on values
FUSED = ("Mixtral", "Qwen3-MoE", "gpt-oss", "DeepSeek-V3", "GraniteMoE")
TARGET = IntxWeightOnlyConfig(weight_dtype=INT[4], mapping_type=MappingType.ASYMMETRIC)


@functools.cache
def truth(name: str, experts: str = "") -> dict[Matrix, Tensor]:
    model = made(name, experts)
    return oracle(model, read_calib(ZOO[name].calib(), model))


def made(name: str, experts: str = "") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers has to say of tiny sizes
        model = ZOO[name].make()
    if experts:
        model.set_experts_implementation(experts)  # type: ignore[operator]
    return model


def traced(
    name: str, tracing: Tracing | None = None, experts: str = ""
) -> tuple[nn.Module, list[TracedBatch]]:
    """A model and its batches, each with what it was traced to."""
    model = made(name, experts)
    batches = read_calib(ZOO[name].calib(), model)
    with calibration_mode(model):
        return model, trace_or_read(model, batches, tracing or Tracing())


# Tracing is most of the time of each test here: what the finder was tested with is kept for the
# test that rewrites it.
_FOUND: dict[str, tuple[nn.Module, list[TracedBatch]]] = {}


def compare(
    name: str,
    of: tuple[nn.Module, list[TracedBatch]],
    experts: str = "",
    ops: set[str] | None = None,
) -> str:
    """Hold finder and grams against the oracle; returns what traced the model.

    ``ops`` is given the names of the products that were found.
    """
    model, batches = of
    with calibration_mode(model):
        found = find_linears(dict.fromkeys(batch.trace for batch in batches), model)
        if ops is not None:
            targets: list[Any] = [c.node.target for site in found.sites for c in site.calls]
            ops.update(target._schema.name for target in targets)
        grams = {}
        for shared in chain.from_iterable(
            CalibrationRun(batches, found.sites).collect(progress=False)
        ):
            for site in shared.sites:
                if shared.gram is not None:  # else no token went to this expert
                    matrix, gram = site_matrix(model, site, shared.gram)
                    grams[matrix] = gram
    expected = by_row(truth(name, experts))
    measured = by_row(grams)
    assert {row.parameter for row in expected.keys() - measured.keys()} == set(ZOO[name].tied)
    assert measured.keys() <= expected.keys()
    pairs = {(id(measured[r]), id(expected[r])): r for r in measured}
    for row in pairs.values():
        error = (measured[row] - expected[row]).abs().max() / expected[row].abs().max()
        assert float(error) < 1e-5, row.parameter
    reasons = {rejection.name: rejection.reason for rejection in found.rejections}
    assert all(reasons[parameter].startswith("tied") for parameter in ZOO[name].tied)
    return batches[0].trace.tracer


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.slow_unless(
    "Mixtral",
    "BERT",
    "raw parameters",
    "einsum",
    "`if` on data",
    "a shared module",
    "cross-attention",
    "convolutions",
)
def test_finder_and_grams_agree_with_the_oracle(name: str) -> None:
    _FOUND[name] = traced(name)
    tracer = compare(name, _FOUND[name])
    assert tracer == ("make_fx" if name in MAKE_FX_ONLY else "export")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in MAKE_FX_ONLY])
@pytest.mark.slow_unless(
    "Llama",
    "OPT",
    "Falcon",
    "BERT",
    "ViT",
    "CLIP",
    "Mamba",
    "raw parameters",
    "einsum",
    "a shared module",
    "TransformerEncoder",
    "cross-attention",
    "convolutions",
)
def test_make_fx_finds_the_same(name: str) -> None:
    assert compare(name, traced(name, Tracing("make_fx"))) == "make_fx"


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.slow_unless("GraniteMoE-batched_mm")
def test_every_way_to_run_experts(name: str, experts: str) -> None:
    tracer = compare(name, traced(name, experts=experts), experts)
    assert tracer == ("make_fx" if experts == "eager" else "export")


@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
@pytest.mark.slow_unless("Mixtral-make_fx")
def test_the_fallback_of_transformers_for_grouped_mm(
    name: str, tracer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own op, for dtypes and devices that torch's does not serve; stored both ways round."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    ops: set[str] = set()
    of = traced(name, Tracing(tracer), "grouped_mm")
    assert compare(name, of, "grouped_mm", ops) == tracer
    assert "transformers::grouped_mm_fallback" in ops
    assert "aten::_grouped_mm" not in ops


def by_row(grams: dict[Matrix, Tensor]) -> dict[Row, Tensor]:
    """The gram that each row meets: how rows make up matrices does not matter."""
    return {row: gram for matrix, gram in grams.items() for row in matrix.rows}


def first_output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        output = model(**batch) if isinstance(batch, dict) else model(batch)
    first: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return first


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_transform_rewrites_everything_and_keeps_the_outputs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the trace that the finder was tested with; the next test makes its own."""
    model, batches = _FOUND.pop(name) if name in _FOUND else traced(name)
    monkeypatch.setattr("magr_fx.passes.entries.run.trace_or_read", lambda *_: batches)
    calib = ZOO[name].calib()
    before = first_output(model, calib[0])
    magr_transform(model, calib, MagRConfig(damping=1e-3), progress=False)
    after, report = first_output(model, calib[0]), report_of(model)
    change = float((after - before).norm() / before.norm())
    assert 0 < change < 0.3
    assert not report.failed
    rows = by_row(truth(name))
    assert sum(site.shape[0] for site in report.rewritten) == sum(
        row.parameter not in ZOO[name].tied for row in rows
    )


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.slow_unless(
    "Llama",
    "raw parameters",
    "einsum",
    "`if` on data",
    "a shared module",
    "cross-attention",
    "convolutions",
)
def test_quantize_leaves_nothing_unlisted(name: str) -> None:
    model = made(name)
    calib = ZOO[name].calib()
    before, family = first_output(model, calib[0]), ZOO[name]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    magr_quantize(model, calib, TARGET, progress=False)
    after, report = first_output(model, calib[0]), report_of(model)
    assert 0 < float((after - before).norm() / before.norm()) < 0.6
    # Every weight that the oracle knows is a torchao tensor, or in the report with its reason.
    listed = {site.name.partition("[")[0] for site in report.skipped if not site.quantized}
    meant = {matrix.parameter for matrix in truth(name)}
    meant |= {site.name for site in report.skipped if site.quantized}  # by torchao alone
    assert meant & listed == {*family.tied, *family.unquantizable}
    quantized = sum(p.numel() for p in model.parameters() if is_quantized(p))
    sizes = dict(made(name).named_parameters())
    assert quantized == sum(sizes[parameter].numel() for parameter in meant - listed)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "einsum", "`if` on data"])
@pytest.mark.slow_unless("einsum", "`if` on data")
def test_the_readme_has_the_rows_that_its_command_writes(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = coverage(name)
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(row)} |" in readme


def test_the_readme_names_every_family() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- coverage")[2].partition("<!-- end")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if "|" in line]
    assert rows[2:] == list(ZOO)
