"""A report in a directory: its rows in a JSON file, the channels' magnitudes in an npz file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from magr_fx.config import MagRConfig
from magr_fx.errors import ConfigError
from magr_fx.reporting.bit_plan import BitPlan
from magr_fx.reporting.report import MagRReport, Quantization, SiteReport
from magr_fx.reporting.rotation import Rotation

ROWS, CHANNELS = "magr_report.json", "magr_report.npz"
_ARRAYS = ("channel_max_before", "channel_max_after")


def write_report(report: MagRReport, folder: Path) -> None:
    """Write ``magr_report.json`` and ``magr_report.npz``.

    Raises:
        OSError: the disk is full, or the files may not be written.
    """
    report.to_json(folder / ROWS)
    arrays = {
        f"{at}.{name}": getattr(site, name)
        for at, site in enumerate(report.sites)
        for name in _ARRAYS
        if getattr(site, name) is not None
    }
    np.savez(folder / CHANNELS, **arrays)


def has_report(folder: Path) -> bool:
    """Whether the directory has a report."""
    return (folder / ROWS).exists()


def read_report(folder: Path) -> MagRReport:
    """Read what :func:`write_report` wrote, also reports of older versions with fewer values.

    Raises:
        ConfigError: there is no report, or it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        # Opened here, because np.load leaves a damaged file open.
        with (folder / CHANNELS).open("rb") as file, np.load(file) as arrays:
            sites = [_site(row, at, arrays) for at, row in enumerate(record["sites"])]
        rest = {
            key: value
            for key, value in record.items()
            if key not in ("config", "sites", "comparison", "rotations", "bits")
        }
        rotations = [Rotation(**row) for row in record.get("rotations", ())]
        bits = None if record.get("bits") is None else BitPlan.of_dict(record["bits"])
        config = MagRConfig(**record["config"])
        report = MagRReport(config, sites=sites, rotations=rotations, bits=bits, **rest)
        str(report)  # a report that cannot be printed counts as damaged
        return report
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} has no {Path(error.filename).name}; give a directory that magr-fx wrote, or "
            "the directory of an unfinished run"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"the report in {folder} cannot be read: {error!r}") from error


def _site(row: dict[str, Any], at: int, arrays: Any) -> SiteReport:
    known = {f.name for f in fields(SiteReport)}
    values = {name: _number(value) for name, value in row.items() if name in known}
    if row["quantization"] is not None:
        found = {name: _number(value) for name, value in row["quantization"].items()}
        values["quantization"] = Quantization(**found)
    else:
        values["quantization"] = None
    values["shape"] = tuple(row["shape"])
    values["damping"] = row.get("damping")  # stays None: not solved, or not recorded
    for name in _ARRAYS:
        if f"{at}.{name}" in arrays:
            values[name] = arrays[f"{at}.{name}"]
    return SiteReport(**values)


def _number(value: Any) -> Any:
    """The value, with NaN for None, which stands for NaN in JSON."""
    return float("nan") if value is None else value
