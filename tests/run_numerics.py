"""`make test-numerics`: the suite as other processors would run it, and every test that minds.

A verdict that hangs on the last bits of a product is a coin, which another processor may toss
otherwise. So the same tests run several times:

- under each instruction set that this processor has, with 1 and 2 threads (ATEN_CPU_CAPABILITY);
- with the code paths that Intel's MKL takes on other processors, AMD's among them (MKL_CBWR);
- with inputs, products, sums and factorisations moved in their last bits (tests/other_rounding.py)
  under ten seeds.

These are the tests of the rooms that compute numbers, without the slow ones; `--all` takes every
room. The output of each run is kept in out/numerics. One and a half hours on two cores (twice that
with `--all`); some of it by names: `ARGS="avx2* seed-3"`.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "out" / "numerics"
CAPABILITIES = ("default", "avx2", "avx512")
SEEDS = range(1, 11)
# Where numbers are computed and judged. The other rooms compare what is found, refused or kept, or
# two runs of the same operations.
ROOMS = (
    *("collecting", "comparing", "entries", "grams", "iterations", "rewriting", "rounding"),
    "solver",
)
# Files, directories, names and texts: no number is computed that could be another.
NO_NUMBERS = (
    *("bad_input", "block_log", "cli_bad_input", "cli_device", "cli_hub", "cli_stderr", "config"),
    *("disk", "examples", "memory", "memory_limit", "package", "planning", "quickstart", "readme"),
)
# Compare what processes of their own compute with what this one does, to the bit: these processes
# are not reached by a perturbation, but by all that the environment says.
PROCESSES = ("cli", "cli_resume", "cli_torchrun", "distributed", "rank_crashes")


class Setting(NamedTuple):
    """One way to run the suite."""

    name: str
    environment: dict[str, str]
    perturbed: int | None = None

    def command(self, workers: int, rooms: Sequence[str]) -> list[str]:
        left_out = [*NO_NUMBERS, *(PROCESSES if self.perturbed is not None else ())]
        how = ["--numprocesses", str(workers), "--dist", "loadfile"] if workers > 1 else []
        if self.perturbed is not None:
            how += ["--perturb", str(self.perturbed)]
        quiet = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
        files = [file for name in left_out for file in ROOT.glob(f"tests/**/test_{name}.py")]
        ignored = [f"--ignore={file.relative_to(ROOT)}" for file in files]
        return [sys.executable, "-m", "pytest", *quiet, *ignored, *how, *rooms]


def settings() -> list[Setting]:
    """Those that this machine can run."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    known = CAPABILITIES[: CAPABILITIES.index(own) + 1] if own in CAPABILITIES else (own,)
    found = [
        Setting(f"{name}-{threads}", {"ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": str(threads)})
        for name in known
        for threads in (1, 2)
    ]
    one = {"OMP_NUM_THREADS": "1"}
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        paths = [
            ("compatible", "default", "SSE41"),
            ("sse4_2", "default", "SSE41"),
            *([("avx", "avx2", "AVX2"), ("avx2", "avx2", "AVX2")] if "avx2" in known else []),
        ]
        found += [
            Setting(
                f"mkl-{path}",
                {"MKL_CBWR": path.upper(), "ATEN_CPU_CAPABILITY": aten, **one}
                | {"ONEDNN_MAX_CPU_ISA": onednn},
            )
            for path, aten, onednn in paths
        ]
    return [*found, *(Setting(f"seed-{seed}", one, seed) for seed in SEEDS)]


def run(setting: Setting, workers: int, rooms: Sequence[str]) -> list[str]:
    """The tests that failed, or what else went wrong; the whole output goes to a file."""
    log = LOGS / f"{setting.name}.txt"
    # torch.compile keeps code by its source alone, and code for another instruction set gives
    # wrong outputs.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(LOGS / f"{setting.name}-compiled")}
    with log.open("w") as output:
        ended = subprocess.run(
            setting.command(workers, rooms),
            cwd=ROOT,
            env={**os.environ, **compiled, **setting.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = log.read_text(errors="replace").splitlines()
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if ended.returncode and not failed:
        failed = [f"pytest ended with {ended.returncode}: see {log}"]
    return failed


def main() -> int:
    known = settings()
    parser = argparse.ArgumentParser(description="the suite as other processors would run it")
    parser.add_argument("names", nargs="*", default=["*"], help="of settings, with * for any")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--all", action="store_true", help="the tests of every room")
    chosen = parser.parse_args()
    todo = [s for s in known if any(fnmatch.fnmatch(s.name, name) for name in chosen.names)]
    if not todo:
        parser.error(f"none of these is one of {', '.join(setting.name for setting in known)}")
    rooms = [] if chosen.all else [f"tests/{room}" for room in ROOMS]
    LOGS.mkdir(parents=True, exist_ok=True)
    minded: dict[str, list[str]] = {}
    for setting in todo:
        started = time.monotonic()
        failed = run(setting, chosen.workers, rooms)
        for test in failed:
            minded.setdefault(test, []).append(setting.name)
        minutes = (time.monotonic() - started) / 60
        say(f"{setting.name}: {len(failed)} failed, {minutes:.1f} minutes")
    say(f"{len(minded)} tests failed under some of {len(todo)} settings")
    for test, names in sorted(minded.items()):
        say(f"{test}\n    {', '.join(names)}")
    return 1 if minded else 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
