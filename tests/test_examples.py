"""The examples run as a newcomer runs them: in a process of their own, from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pipeline_output() -> str:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "examples/fx_pipeline.py", "--backend", "aot_eager"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_fx_pipeline_finds_every_weight(pipeline_output: str) -> None:
    names = ["query", "key", "value", "out", "up.weight", "down.weight"]
    first = [line.split(maxsplit=1)[0] for line in pipeline_output.splitlines() if line]
    assert [name for name in first if name in names] == names
    assert "6 rewritten, 0 skipped, 0 failed; 100.0% of 49,152" in pipeline_output


@pytest.mark.slow
def test_fx_pipeline_keeps_the_outputs(pipeline_output: str) -> None:
    def error(what: str) -> float:
        (figure,) = re.findall(rf"{what}: (\S+)$", pipeline_output, re.MULTILINE)
        return float(figure)

    assert 0 < error("rewritten against original") < 0.03
    assert error("compiled against rewritten") < 1e-5
    assert "another batch size through the compiled graph: (3, 32, 64)" in pipeline_output
