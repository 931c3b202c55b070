"""What does it save that the disk reads the next block while one is worked on?

    python benchmarks/read_ahead.py [--rate 60]    # Linux, as root: control groups of version 1

Grams are collected of a model that is offloaded to a disk that gives so many MB a second (the
system holds it to that), with nothing of its file in memory yet, reading ahead and not, in turns,
and with all of it in memory. Writes its table to benchmarks/read_ahead.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from scale import save_llama
from solver import align
from transformers import AutoModelForCausalLM

from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.offloaded import offloaded_weights_loaded
from magr_fx.passes.offloading.resident import Resident
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

OUT = Path(__file__).with_suffix(".md")
GROUPS = Path("/sys/fs/cgroup/blkio")
WIDTH, LAYERS, TOKENS, ROUNDS = 1024, 6, 1024, 3


def slow_down(folder: Path, rate: int) -> Path:
    """Put this process in a group that reads so many bytes a second of the folder's disk."""
    group = GROUPS / f"magr-fx-{os.getpid()}"
    group.mkdir()
    disk = os.major(os.stat(folder).st_dev)  # as a whole, which has the minor number 0
    (group / "blkio.throttle.read_bps_device").write_text(f"{disk}:0 {rate}")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def forget(folder: Path) -> None:
    """Let the system drop what it has of the files in memory."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def without_ahead(resident: Resident) -> Resident:
    def only(
        tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
    ) -> AbstractContextManager[None]:
        del ahead
        return resident(tensors)

    return only


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=int, default=60, help="MB a second (%(default)s)")
    args = parser.parse_args()
    found: dict[str, list[float]] = {"all in memory": [], "read ahead": [], "not read ahead": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_llama(folder / "model", WIDTH, LAYERS)
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map={"": "disk"}, offload_folder=str(folder / "offload")
        )
        tokens = torch.randint(0, model.config.vocab_size, (TOKENS // 256, 256))
        with offloaded_weights_loaded(model) as resident, calibration_mode(model):
            tracing = Tracing("auto", False).without_values()
            traced = trace_or_read(model, read_calib([tokens], model), tracing)
            sites = find_linears([traced[0].trace], model, None).sites
            group = slow_down(folder, args.rate * 10**6)
            try:
                for _ in range(ROUNDS):
                    for label, spent in found.items():
                        if label != "all in memory":
                            forget(folder / "model")
                        way = without_ahead(resident) if label == "not read ahead" else resident
                        start = time.perf_counter()
                        for _ in CalibrationRun(traced, sites, resident=way).collect(
                            progress=False
                        ):
                            pass
                        spent.append(time.perf_counter() - start)
            finally:
                (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
                group.rmdir()
    rows = [[label, f"{min(spent):.1f}"] for label, spent in found.items()]
    table = (
        f"{LAYERS} layers of a Llama of width {WIDTH:,}, {size / 1e6:.0f} MB, {TOKENS:,} tokens, a "
        f"disk of {args.rate} MB/s, {torch.get_num_threads()} CPU threads, torch "
        f"{torch.__version__}; the least of {ROUNDS} rounds.\n\n"
        f"{align(['grams collected', 'seconds'], rows)}\n"
    )
    OUT.write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
