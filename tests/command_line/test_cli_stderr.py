"""What a process of the command line writes to stderr: its own words, and nobody else's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magr_fx.machine.quiet import errors_only

SKIP = "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"


def run(*arguments: str, kernels: bool) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which torchao looks for its kernels or does not."""
    environment = {key: value for key, value in os.environ.items() if key != SKIP}
    environment |= {"OMP_NUM_THREADS": "1", **({} if kernels else {SKIP: "1"})}
    command = [sys.executable, "-m", "magr_fx", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.slow
def test_what_is_wrong_is_the_one_line(kernels: bool, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    ran = run("transform", missing, str(tmp_path / "out"), "--calib", "x", kernels=kernels)
    assert ran.returncode == 2
    assert ran.stderr == (
        f"magr-fx: error: {missing} is not a directory; give a directory, or a model's "
        "name on the Hub\n"
    )
    assert ran.stdout == ""


def test_errors_are_let_through_and_levels_restored(caplog: pytest.LogCaptureFixture) -> None:
    above, below = logging.getLogger("magr_fx_test"), logging.getLogger("magr_fx_test.below")
    above.setLevel(logging.INFO)
    with errors_only("magr_fx_test"):
        below.warning("a note")
        below.error("an error")
    below.info("later")
    assert caplog.messages == ["an error", "later"]
    assert above.level == logging.INFO
