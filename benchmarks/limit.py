"""A checkpoint several times as large as the memory of its control group is rewritten as a whole.

    python benchmarks/limit.py        # 40 minutes on a core; Linux, as root: control groups

A Llama with random weights goes through `magr-fx transform` in a process of its own that may use so
much memory and no more, with the pages of the files that it writes; the system kills what asks for
more. Writes its table to benchmarks/limit.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from scale import LENGTH, TARGET, save_llama, save_text
from solver import align

OUT = Path(__file__).with_suffix(".md")
TOKENS = 1024
MIB = 2**20
# Of version 1 and 2: where groups are made, and the file of the limit.
GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


def limited(limit: int) -> Path:
    """A control group whose processes have so many bytes together."""
    for folder, file in GROUPS:
        group = folder / f"magr-fx-{os.getpid()}"
        if (folder / file).exists() or file == "memory.max":
            try:
                group.mkdir()
                (group / file).write_text(str(limit))
            except OSError:
                continue
            return group
    sys.exit("no control group with a limit on memory can be made here: root is needed")


def transform(folder: Path, group: Path) -> tuple[int, int, float]:
    """The exit status, how many blocks were logged, and the seconds of the processor."""
    entered = ["sh", "-c", 'echo $$ >"$1"; shift; exec "$@"', "sh", group / "cgroup.procs"]
    command = [sys.executable, "-m", "magr_fx", "transform", folder / "model", folder / "out"]
    options = ["--calib", folder / "text.txt", "--target", TARGET, "--log-json", folder / "log"]
    tokens = ["--tokens", TOKENS, "--length", LENGTH]
    child = subprocess.Popen(
        [str(part) for part in (*entered, *command, *options, *tokens)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(child.pid, 0)
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    code = os.waitstatus_to_exitcode(status)
    return code, len(lines), usage.ru_utime + usage.ru_stime


def table(width: int, depth: int, limit: int, size: int, blocks: int, cpu: float) -> str:
    header = [
        "width", "layers", "blocks", "checkpoint, MB", "limit, MB", "checkpoint / limit",
        "seconds of the processor",
    ]  # fmt: skip
    row = [
        str(width),
        str(depth),
        str(blocks),
        f"{size / 1e6:,.0f}",
        f"{limit / 1e6:.0f}",
        f"{size / limit:.1f}",
        f"{cpu:.0f}",
    ]
    return (
        f"`magr-fx transform`, {TARGET}, {TOKENS:,} tokens, one thread, torch {torch.__version__}: "
        "every weight of every layer rewritten, within the limit.\n\n"
        f"{align(header, [row])}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=54)
    parser.add_argument("--limit", type=int, default=860, help="MiB")
    args = parser.parse_args()
    group = limited(args.limit * MIB)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_llama(folder / "model", args.width, args.layers)
            save_text(folder / "text.txt")
            size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
            code, blocks, cpu = transform(folder, group)
            if code or not (folder / "out" / "config.json").exists():
                sys.exit(f"ended with {code} after {blocks} blocks")
    finally:
        group.rmdir()
    text = table(args.width, args.layers, args.limit * MIB, size, blocks, cpu)
    print(text)
    OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
