"""MagRReport: the table, the totals, the JSON file, the picture, and the figures in them."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig
from toys import INT, WIDTH, Shapes, mlp, report_of, vectors

from magr_fx import CalibrationError, MagRConfig, MagRReport, SiteReport, magr_quantize
from magr_fx import magr_transform as transform
from magr_fx.config import damping_for
from magr_fx.iterations.solution import Status
from magr_fx.machine.memory import high_water_mark
from magr_fx.passes.rewriting import solve_sites
from magr_fx.reporting.report import STAGES, Quantization
from magr_fx.reporting.report_files import read_report, write_report
from magr_fx.solver.solver import solve_magr

INT3 = IntxWeightOnlyConfig(weight_dtype=INT[3])


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> MagRReport:
    """Two rewritten sites, one that failed, and two that were skipped."""

    def solve(weight: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(weight) == 16:
            raise CalibrationError("no luck")
        return solve_magr(weight, *args, **options)

    monkeypatch.setattr(solve_sites, "solve_magr", solve)
    model = nn.Sequential(*mlp(), nn.Linear(16, 8), nn.Linear(8, 1000))
    model.register_parameter("idle", nn.Parameter(torch.ones(2, 3)))
    transform(model, vectors(), filter_fn=lambda module, name: name != "4")
    return report_of(model)


def sections(report: MagRReport) -> list[list[str]]:
    return [block.splitlines() for block in str(report).split("\n\n")]


def test_every_site_is_in_the_table(mixed: MagRReport) -> None:
    table, failed, skipped, totals = sections(mixed)
    assert [line.split()[0] for line in table] == ["site", "0.weight", "3.weight"]
    assert failed[0] == "failed:"
    share = 16 * 48 / (48 * 32 + 8 * 16 + 16 * 48 + 2 * 3 + 1000 * 8)
    assert failed[1:] == [f"2.weight  16x48  {share:.1%}  CalibrationError: no luck"]
    assert skipped[0] == "skipped:"
    assert [line.split()[:2] for line in skipped[1:]] == [["idle", "2x3"], ["4.weight", "1000x8"]]
    assert "\n".join(totals) == mixed.totals()


def test_the_columns_line_up(mixed: MagRReport) -> None:
    table, _, skipped, _ = sections(mixed)
    # Two spaces or more part the columns, and no cell has two spaces inside.
    header, *rows = [[c for c in line.split("  ") if c] for line in table]
    assert {len(row) for row in rows} == {len(header)} == {11}
    starts, ends = [], []
    for line in table:
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        at = 0
        places = []
        for cell in cells:
            at = line.index(cell, at)
            places.append((at, at + len(cell)))
            at += len(cell)
        starts.append([start for start, _ in places])
        ends.append([end for _, end in places])
    for column, name in enumerate(header):
        edges = starts if name.strip() in ("site", "rows by status") else ends
        assert len({edge[column] for edge in edges}) == 1, name
    assert not any(line != line.rstrip() for line in table)
    # Names that begin with a digit are names all the same.
    assert [line[0] for line in skipped] == ["s", "i", "4"]


def test_totals_add_up(mixed: MagRReport) -> None:
    first, magnitudes, damping, run, seconds = mixed.totals().splitlines()
    done, others = 48 * 32 + 8 * 16, 16 * 48 + 2 * 3 + 1000 * 8
    share = f"{done / (done + others):.1%} of {done + others:,} matrix parameters rewritten"
    assert first == f"2 rewritten, 2 skipped, 1 failed; {share}"
    before, after = (
        np.concatenate([getattr(site, f"channel_max_{when}") for site in mixed.rewritten])
        for when in ("before", "after")
    )
    errors = [site.output_error for site in mixed.rewritten]
    assert magnitudes == (
        f"largest magnitude per channel: median x{np.median(after / before):.2f}; output error "
        f"before quantization: median {sum(errors) / 2:.2%}, worst {max(errors):.2%}"
    )
    assert damping == "damping: 0.125 to 0.177 of each gram's mean diagonal"
    memory = f"peak memory {mixed.peak_memory:.0f} MiB"
    assert run == f"2 calibration batches, 1 traced graphs (by export); {memory}"
    assert seconds.startswith(f"seconds: trace {mixed.seconds['trace']:.1f}, check ")
    assert "quantize" not in seconds
    assert "quantized by torchao" not in mixed.totals()


def test_a_quantized_model_names_its_target() -> None:
    report = report_of(magr_quantize(mlp(), vectors(), INT3))
    line = "2 quantized by torchao: IntxWeightOnlyConfig(weight_dtype=torch.int3)"
    assert line in report.totals().splitlines()
    assert all(len(line) < 120 for line in report.totals().splitlines())


def test_lookups_split_the_sites_by_outcome(mixed: MagRReport) -> None:
    assert [*mixed.rewritten, *mixed.failed, *mixed.skipped] == mixed.sites
    assert [len(mixed.rewritten), len(mixed.failed), len(mixed.skipped)] == [2, 1, 2]


def test_figures_of_a_site() -> None:
    model = mlp()
    old = model.get_parameter("2.weight").detach().clone()
    site = report_of(transform(model, vectors(40, 24))).rewritten[1]
    new = model.get_parameter("2.weight").detach()
    assert (site.name, site.shape, site.calls, site.tokens) == ("2.weight", (16, 48), 1, 64)
    assert (site.max_before, site.max_after) == (float(old.abs().max()), float(new.abs().max()))
    assert site.status == "converged: 16 rows"
    assert 10 <= site.steps <= 100
    assert 0 < site.output_error < 1
    assert site.seconds > 0
    assert not site.quantized


def test_each_site_has_the_damping_of_its_gram(mixed: MagRReport) -> None:
    found = {site.name: site.damping for site in mixed.sites}
    wide, narrow = damping_for(64, 32), damping_for(64, 16)  # 0.177 and 0.125
    assert wide > narrow > 0.1
    assert found == {"0.weight": wide, "3.weight": narrow, "2.weight": None, "idle": None,
                     "4.weight": None}  # fmt: skip


def test_damping_that_was_given_and_the_published_solvers_none() -> None:
    for config, line in (
        (MagRConfig(damping=0.2), "damping: 0.2 of each gram's mean diagonal"),
        (MagRConfig.published(), "damping: 0 of each gram's mean diagonal"),
    ):
        report = report_of(transform(mlp(), vectors(), config))
        assert {site.damping for site in report.sites} == {config.damping or 0.0}
        assert line in report.totals().splitlines()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_target_s_sites_have_theirs_by_the_tokens_that_were_not_held_out(rounding: str) -> None:
    report = report_of(magr_quantize(mlp(), vectors(), INT3, rounding=rounding, holdout=0.5))
    assert [site.tokens for site in report.sites] == [32, 32]
    assert [site.damping for site in report.sites] == [damping_for(32, 32), damping_for(32, 48)]


def test_a_solution_that_was_refused_has_its_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(*args: Any, **options: Any) -> Any:
        solution = solve_magr(*args, **options)
        status = torch.full_like(solution.status, Status.FAILED)
        return dataclasses.replace(solution, status=status)

    monkeypatch.setattr(solve_sites, "solve_magr", solve)
    report = report_of(transform(mlp(), vectors()))
    assert [site.damping for site in report.failed] == [damping_for(64, 32), damping_for(64, 48)]
    assert "damping" not in report.totals()  # which are of what was rewritten


def test_steps_and_status_are_the_solvers() -> None:
    config = MagRConfig(tol=10.0, max_steps=30)  # the first look at the gap is at step 10
    (first, _) = report_of(transform(mlp(), vectors(), config)).rewritten
    assert (first.steps, first.status) == (10, "converged: 48 rows")


def test_stages_take_no_longer_than_the_whole_run() -> None:
    started = time.perf_counter()
    report = report_of(magr_quantize(mlp(), vectors(), INT3))
    wall = time.perf_counter() - started
    assert tuple(report.seconds) == STAGES
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert sum(report.seconds.values()) <= wall
    assert sum(site.seconds for site in report.sites) == pytest.approx(report.seconds["solve"])


def test_memory_is_the_high_water_mark() -> None:
    start = high_water_mark(torch.device("cpu"))
    report = report_of(transform(mlp(), vectors()))
    end = high_water_mark(torch.device("cpu"))
    assert 10 < start <= report.rewritten[0].memory <= report.peak_memory <= end
    assert math.isnan(MagRReport(MagRConfig()).peak_memory)


def test_memory_is_unknown_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(high_water_mark(torch.device("cpu")))
    report = report_of(transform(mlp(), vectors()))
    assert "MiB" not in report.totals()
    assert sections(report)[0][1].endswith(" nan")


def test_json_holds_every_figure(mixed: MagRReport, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    path = tmp_path / "report.json"
    mixed.to_json(path)
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    general = {"config", "target", "batches", "traces", "tracer", "refusal", "notes", "seconds"}
    general |= {"states", "saved_bytes", "comparison", "rotations", "bits"}
    assert record.keys() == {*general, "sites"}
    assert (record["tracer"], record["refusal"]) == ("export", "")
    assert record["config"] == {
        "alpha": 1e-2,
        "group_size": None,
        "solver": "admm",
        "max_steps": 100,
        "tol": 1e-3,
        "damping": None,
        "precision": "float32",
        "zero_point": None,
    }
    assert (record["batches"], record["traces"]) == (2, 1)
    assert record["seconds"] == mixed.seconds
    assert len(record["sites"]) == len(mixed.sites)
    fields = {f for f in SiteReport.__dataclass_fields__ if not f.startswith("channel_max")}
    for site, entry in zip(mixed.sites, record["sites"], strict=True):
        assert entry.keys() == fields | {"max_before", "max_after"}
        for name, value in entry.items():
            kept = getattr(site, name)
            if value is None:
                optional = name in ("quantization", "damping")
                assert kept is None if optional else math.isnan(kept), name
            else:
                assert value == (list(kept) if isinstance(kept, tuple) else kept), name
    assert record["sites"][0]["output_error"] > 0
    assert record["sites"][-1]["output_error"] is None


def test_a_directory_gives_the_damping_back(mixed: MagRReport, tmp_path: Path) -> None:
    write_report(mixed, tmp_path)
    again = read_report(tmp_path)
    assert [site.damping for site in again.sites] == [site.damping for site in mixed.sites]
    assert again.totals() == mixed.totals()


def test_a_report_that_was_written_without_damping_is_read(
    mixed: MagRReport, tmp_path: Path
) -> None:
    write_report(mixed, tmp_path)
    path = tmp_path / "magr_report.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for row in record["sites"]:
        del row["damping"]
    path.write_text(json.dumps(record), encoding="utf-8")
    again = read_report(tmp_path)
    assert [site.damping for site in again.sites] == [None] * 5
    kept = [line for line in mixed.totals().splitlines() if not line.startswith("damping")]
    assert again.totals().splitlines() == kept


def test_json_knows_no_infinity() -> None:
    site = SiteReport("w", (1, 1), "rewritten", output_error=math.inf)
    assert site.as_dict()["output_error"] is None


def test_an_empty_report_has_totals_and_no_table() -> None:
    report = MagRReport(MagRConfig())
    assert str(report) == report.totals()
    assert report.totals().startswith("0 rewritten, 0 skipped, 0 failed; 0.0% of 0 matrix")


def test_notes_are_listed(tmp_path: Path) -> None:
    site = SiteReport(
        "w", (1, 2), "rewritten", "padding is counted", output_error=0.0,
        channel_max_before=np.ones(1, np.float32), channel_max_after=np.ones(1, np.float32),
    )  # fmt: skip
    report = MagRReport(MagRConfig(), sites=[site])
    assert sections(report)[1] == ["notes:", "w  1x2  100.0%  padding is counted"]


# The picture


def zeroed() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, 4))
    nn.init.zeros_(model.get_parameter("0.weight"))
    return model


@pytest.mark.parametrize(
    ("build", "config"),
    [(Shapes, MagRConfig()), (zeroed, MagRConfig()), (mlp, MagRConfig(alpha=1e6))],
    ids=["usual", "a weight of zeros", "all shrunk to zero"],
)
def test_plot_draws_every_channel_and_every_site(
    build: Any, config: MagRConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **options: Any) -> None:
        drawn.append([[np.size(line.get_ydata()) for line in axes.lines] for axes in self.axes])
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    report = report_of(transform(build(), vectors(), config))
    path = tmp_path / "report.png"
    report.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    channels = sum(site.shape[0] for site in report.rewritten)
    ((left, right),) = drawn
    assert channels in left
    assert right == [len(report.rewritten)]
    assert report.totals()  # no warning about channels without a magnitude


def test_plot_leaves_pyplot_alone(tmp_path: Path) -> None:
    report_of(transform(mlp(), vectors())).plot(tmp_path / "report.svg")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_plot_without_matplotlib_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = report_of(transform(mlp(), vectors()))
    with pytest.raises(ImportError, match=r"pip install 'magr-fx\[plot\]'"):
        report.plot(tmp_path / "report.png")


def test_plot_with_nothing_rewritten(tmp_path: Path) -> None:
    report = MagRReport(MagRConfig(), sites=[SiteReport("w", (1, 1), "skipped", "why not")])
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


# What the target made of it


def judged(name: str, *errors: float, **options: Any) -> SiteReport:
    return SiteReport(
        name, (2, 3), "rewritten", output_error=0.1,
        quantization=Quantization({"0": 1, "0.002": 1}, 0.75, *errors),
        channel_max_before=np.ones(2, np.float32), channel_max_after=np.ones(2, np.float32),
        **options,
    )  # fmt: skip


def test_the_second_table_has_a_row_for_each_judged_site() -> None:
    report = report_of(magr_quantize(mlp(), vectors(), INT3, rounding="gptq"))
    first, second, _ = sections(report)
    assert len(first) == 3
    assert second[0] == "output error after quantization:"
    header, *rows = [[c.strip() for c in line.split("  ") if c.strip()] for line in second[1:]]
    assert header == [
        "site", "rows by alpha", "mean clip", "torchao alone", "quantized", "held out: alone",
        "quantized",
    ]  # fmt: skip
    for row, site in zip(rows, report.rewritten, strict=True):
        found = site.quantization
        assert found is not None
        alphas = " ".join(f"{alpha}:{count}" for alpha, count in found.alphas.items())
        errors = (found.error_alone, found.error, found.held_alone, found.held)
        assert row == [
            site.name, alphas, f"{found.clip:.2f}", *(f"{error:.2%}" for error in errors)
        ]  # fmt: skip
        assert sum(found.alphas.values()) == site.shape[0]
        assert 0 < found.error < found.error_alone < 1


def test_the_second_table_is_for_targets_that_took_part_only() -> None:
    for config, tables in ((MagRConfig(alpha=1e-3), 1), (None, 2)):
        report = report_of(transform(mlp(), vectors(), config, target=INT3))
        assert len(sections(report)) == tables + 1
        assert ("after quantization" in str(report)) == (tables == 2)
    report = MagRReport(MagRConfig(), sites=[judged("a", 0.2, 0.1), judged("b", 0.4, 0.2)])
    for line in sections(report)[1][2:]:  # of which nothing is known on held-out tokens
        assert line.split()[-2:] == ["-", "-"]


def test_the_totals_compare_with_torchao_alone() -> None:
    sites = [judged("a", 0.2, 0.1, 0.25, 0.15), judged("b", 0.4, 0.2, 0.35, 0.25)]
    lines = MagRReport(MagRConfig(), sites=sites).totals().splitlines()
    start = "output error after quantization, mean on the "
    assert f"{start}calibration: 15.00% (torchao alone 30.00%)" in lines
    assert f"{start}held-out tokens: 20.00% (torchao alone 30.00%)" in lines
    nothing_held = [judged("a", 0.2, 0.1), judged("b", math.inf, math.inf)]
    lines = MagRReport(MagRConfig(), sites=nothing_held).totals().splitlines()
    assert f"{start}calibration: 10.00% (torchao alone 20.00%)" in lines
    assert not any("held-out" in line for line in lines)
    assert not any("too closely" in line for line in lines)
    unknown = MagRReport(MagRConfig(), sites=[judged("a", math.inf, math.inf)]).totals()
    assert f"{start.replace(', mean on', ', on')}calibration: unknown" in unknown


@pytest.mark.parametrize(
    ("errors", "overfits"),
    [
        ((0.2, 0.1, 0.2, 0.1), False),  # the same gain
        ((0.2, 0.1, 0.4, 0.2), False),  # harder tokens, the same gain
        ((0.2, 0.1, 0.2, 0.139), False),
        ((0.2, 0.1, 0.2, 0.141), True),  # a gain of less than a 1.4th
        ((0.2, 0.19, 0.2, 0.201), True),  # none at all
        ((0.2, 0.1, 0.2, 0.05), False),  # better still
        ((0.2, 0.1), False),  # nothing was held
        ((0.0, 0.0, 0.2, 0.3), False),  # torchao alone loses nothing
        ((0.2, 0.0, 0.2, 0.3), False),
        ((0.2, 0.1, 0.0, 0.0), False),
    ],
)
def test_which_gains_do_not_carry_over(errors: tuple[float, ...], overfits: bool) -> None:
    report = MagRReport(MagRConfig(), sites=[judged("a", *errors), judged("b", 0.2, 0.1, 0.2, 0.1)])
    assert [site.name for site in report.overfitted] == (["a"] if overfits else [])
    assert ("1 sites fit the calibration too closely" in report.totals()) == overfits


def test_too_close_a_fit_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Fewer tokens than inputs, fitted without damping, and others that are unlike them."""
    config = MagRConfig(damping=1e-6)
    few = torch.cat([vectors(20)[0], torch.randn(20, WIDTH)])
    with caplog.at_level(logging.WARNING, "magr_fx"):
        model = magr_quantize(mlp(), [few], INT3, config, rounding="gptq", holdout=0.5)
    report = report_of(model)
    assert report.overfitted
    found = report.overfitted[0].quantization
    assert found is not None
    assert found.held / found.held_alone > 1.4 * found.error / found.error_alone
    name, count = report.overfitted[0].name, len(report.overfitted)
    assert f"{count} sites gain much less over torchao alone on the held-out" in caplog.text
    assert f"such as {name}: calibrate on more text" in caplog.text

    caplog.clear()
    many = vectors(1000)[0]
    many = many[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    with caplog.at_level(logging.WARNING, "magr_fx"):
        assert not report_of(magr_quantize(mlp(), [many], INT3)).overfitted
    assert caplog.text == ""


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_json_knows_what_the_target_made_of_it(holdout: float, tmp_path: Path) -> None:
    report = report_of(magr_quantize(mlp(), vectors(), INT3, holdout=holdout))
    path = tmp_path / "report.json"
    report.to_json(path)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    record = json.loads(text)
    assert record["config"]["alpha"] == "auto"
    for site, entry in zip(report.sites, record["sites"], strict=True):
        found = site.quantization
        assert found is not None
        assert entry["quantization"] == {
            "alphas": found.alphas,
            "clip": found.clip,
            "error_alone": found.error_alone,
            "error": found.error,
            "held_alone": found.held_alone if holdout else None,
            "held": found.held if holdout else None,
            "free": 0.0,
        }
    site = judged("w", math.inf, math.nan)
    assert site.as_dict()["quantization"]["error_alone"] is None


def test_what_is_left_unquantized_is_listed_with_its_share() -> None:
    model = mlp()
    report = report_of(magr_quantize(model, vectors(), INT3, filter_fn=lambda _, name: name == "0"))
    share = 16 * 48 / (16 * 48 + 48 * 32)
    line = f"1 not quantized, {share:.1%} of the matrix parameters: 2.weight"
    assert line in report.totals().splitlines()
    whole = report_of(magr_quantize(mlp(), vectors(), INT3))
    assert "not quantized," not in whole.totals()
