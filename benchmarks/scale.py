"""Time and peak memory against depth, width and ranks, beside what the formulas predict. Linux.

    python benchmarks/scale.py

Llamas with random weights go from directory to directory, each in a process of its own with one
thread; its processor time and its peak memory are what the system says of the process when it has
ended. The predictions are those of `magr-fx plan`, with the rates of one thread in seconds of the
processor, measured just before each run. Writes its tables to benchmarks/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from resident import resident
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from magr_fx import magr_transform
from magr_fx.command_line.named_targets import named_target
from magr_fx.command_line.plan_directory import plan_directory
from magr_fx.costs.planning import measured_rate
from magr_fx.directories.convert_directory import PROCESS, transform_directory
from magr_fx.directories.prepare_directory import Job
from magr_fx.machine.memory import return_freed_memory_at_once
from magr_fx.passes.entries.plan import Plan
from magr_fx.reporting.report import MagRReport

OUT = Path(__file__).with_suffix(".md")
TARGET, VOCABULARY, TOKENS, LENGTH = "int3-per-channel", 512, 4096, 128
DEPTHS, WIDTH = (2, 4, 8, 16), 256
WIDTHS, DEPTH = (128, 256, 512, 1024), 2
RANKS, WIDTH_OF_RANKS = (1, 2, 4), 512
MB = 10**6
SIZES = {"own": "most", "bare": "bare", "traced": "traced"}


@dataclass(frozen=True)
class Run:
    """What one process was: seconds (of the processor, and by the clock), and bytes at its peak.

    Attributes:
        cpu, wall: of the whole process, imports and tracing included.
        stages, clock: of the report's stages, of the processor and by the clock.
        peak: resident memory, mapped files included, which the system can take back.
        own: what is the process's alone (anonymous memory), sampled.
        bare: the same, after the imports.
        traced: the same, with the model traced.
    """

    cpu: float
    wall: float
    stages: dict[str, float]
    clock: dict[str, float]
    peak: float
    own: float
    bare: float
    traced: float

    @property
    def calibration(self) -> float:
        return self.stages["check"] + self.stages["grams"]

    @property
    def solve(self) -> float:
        return self.stages["solve"] + self.stages["rewrite"]


class Measured(NamedTuple):
    """A run, what was predicted of it, and the FLOP/s of the machine just before."""

    run: Run
    plan: Plan
    rate: float

    @property
    def predicted(self) -> tuple[float, float]:
        """Seconds of the calibration and of the solves."""
        return self.plan.calibration / self.rate, self.plan.solve / self.rate


def save_llama(folder: Path, width: int, depth: int) -> Path:
    """A Llama with random weights and a tokenizer; shapes in the proportions of Llama-2-7B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = {f"w{at}": at for at in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    FastTokenizer(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def save_text(file: Path) -> Path:
    ids = torch.randint(0, VOCABULARY, (2 * TOKENS,), generator=torch.Generator().manual_seed(1))
    file.write_text(" ".join(f"w{at}" for at in ids.tolist()), encoding="utf-8")
    return file


@contextmanager
def processor_time(stages: dict[str, float], peak: Peak | None = None) -> Iterator[None]:
    """Count the processor's seconds of each stage of the report, beside the clock's."""
    timed = MagRReport.timed

    @contextmanager
    def counted(report: MagRReport, stage: str) -> Iterator[Callable[[], float]]:
        start = time.process_time()
        with timed(report, stage) as spent:
            yield spent
        stages[stage] = stages.get(stage, 0.0) + time.process_time() - start
        if stage == "trace" and peak is not None:
            peak.traced = resident("RssAnon")

    with mock.patch.object(MagRReport, "timed", counted):
        yield


class Peak(threading.Thread):
    """The most anonymous memory of this process, looked at every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bare = self.most = self.traced = resident("RssAnon")

    def run(self) -> None:
        while True:
            self.most = max(self.most, resident("RssAnon"))
            time.sleep(0.01)


def in_directory(folder: Path) -> None:
    """The process of one run: what it was goes to standard output."""
    return_freed_memory_at_once()  # as the command line does
    peak, stages = Peak(), dict[str, float]()
    peak.start()
    job = Job(
        model=str(folder / "model"),
        out=folder / "out",
        text=folder / "text.txt",
        target=named_target(TARGET),
        tokens=TOKENS,
        length=LENGTH,
        progress=False,
    )
    with processor_time(stages, peak):
        report = transform_directory(job)
    sizes = {name: getattr(peak, at) * 2**20 for name, at in SIZES.items()}
    print(json.dumps({"stages": stages, "clock": report.seconds, **sizes}))


def as_rank(folder: Path) -> None:
    """One of the processes that torchrun starts."""
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.randint(0, VOCABULARY, (TOKENS // (4 * LENGTH), 4, LENGTH))
    dist.broadcast(ids, 0)
    stages = dict[str, float]()
    with processor_time(stages):
        magr_transform(model, list(ids), target=named_target(TARGET), progress=False)
    found = {"stages": stages, "clock": model.magr_report.seconds}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(command: list[str]) -> tuple[str, float, float, int]:
    """Standard output, seconds of the processor and by the clock, and the peak in bytes."""
    start = time.perf_counter()
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=errors, env=os.environ | threads
        )
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0)
        errors.seek(0)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
        wall = time.perf_counter() - start
        return out.read(), usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024


def measure(width: int, depth: int) -> Measured:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_llama(folder / "model", width, depth)
        save_text(folder / "text.txt")
        plan = planned(folder)
        rate = json.loads(run([__file__, "--rates", name])[0].splitlines()[-1])
        out, cpu, wall, peak = run([__file__, "--directory", name])
    found = Run(cpu=cpu, wall=wall, peak=peak, **json.loads(out.splitlines()[-1]))
    print(f"width {width}, depth {depth}: {asdict(found)}, {rate}", file=sys.stderr)
    return Measured(found, plan, rate)


def planned(folder: Path) -> Plan:
    model, target = str(folder / "model"), named_target(TARGET)
    return plan_directory(model, target, tokens=TOKENS, length=LENGTH)[0]


def measure_rates() -> None:
    """A process of its own, as `magr-fx plan` is; it prints the rate."""
    return_freed_memory_at_once()  # as the command line does
    print(json.dumps(measured_rate()))


def measure_ranks(ranks: int) -> list[dict[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_llama(folder / "model", WIDTH_OF_RANKS, DEPTH)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run([*torchrun, __file__, "--rank", name])
        found = [json.loads((folder / f"rank{at}.json").read_text()) for at in range(ranks)]
    print(f"ranks {ranks}: {found}", file=sys.stderr)
    return found


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---:"] * len(header)
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


HEADER = [
    "checkpoint, MB", "peak memory, MB", "the process's own, MB", "above the imports, MB",
    "predicted, MB", "seconds by the clock", "processor seconds", "calibration", "predicted",
    "solve", "predicted",
]  # fmt: skip


def cells(measured: Measured) -> list[str]:
    found, plan = measured.run, measured.plan
    sizes = (plan.model, found.peak, found.own, found.own - found.bare, plan.memory)
    calibration, solve = measured.predicted
    return [
        *(f"{size / MB:.0f}" for size in sizes),
        f"{found.wall:.0f}",
        *(f"{each:.1f}" for each in (found.cpu, found.calibration, calibration)),
        *(f"{each:.1f}" for each in (found.solve, solve)),
    ]


def slope(xs: tuple[int, ...], ys: list[float]) -> float:
    """Of the straight line through the points that is nearest to them."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def depth_lines(known: dict[int, Measured]) -> list[str]:
    runs = [known[depth] for depth in DEPTHS]
    rows = [[str(d), *cells(r)] for d, r in zip(DEPTHS, runs, strict=True)]
    a_layer = slope(DEPTHS, [r.plan.model for r in runs]) / MB
    growth = slope(DEPTHS, [r.run.own for r in runs]) / MB
    graph = slope(DEPTHS, [r.run.traced for r in runs]) / MB
    cpu = [r.run.cpu for r in runs]
    line = slope(DEPTHS, cpu)
    first = sum(cpu) / len(cpu) - line * sum(DEPTHS) / len(DEPTHS)
    off = max(abs(c - first - line * d) / c for c, d in zip(cpu, DEPTHS, strict=True))
    return [
        f"## Depth, at width {WIDTH}",
        "",
        *table(["layers", *HEADER], rows),
        "",
        f"Time is linear: {first:.1f} s and {line:.2f} s a layer (processor), at most {off:.0%} "
        f"off. The process's own memory grows by {growth:.1f} MB a layer, whose weights are "
        f"{a_layer:.1f} MB: {graph:.1f} MB of it is there as soon as the model is traced, the "
        "graph of a layer, whose size does not depend on the width.",
        "",
    ]


def exponents(runs: list[Measured]) -> list[str]:
    parts: dict[str, tuple[list[float], list[float]]] = {
        "calibration": ([r.run.calibration for r in runs], [r.predicted[0] for r in runs]),
        "solve": ([r.run.solve for r in runs], [r.predicted[1] for r in runs]),
        "memory": ([r.run.own - r.run.bare for r in runs], [r.plan.memory for r in runs]),
    }
    rows = []
    for name, pair in parts.items():
        powers = [
            f"{math.log(many / few) / math.log(wide / narrow):.2f}"
            for side in pair
            for narrow, wide, few, many in zip(WIDTHS, WIDTHS[1:], side, side[1:], strict=False)
        ]
        rows.append([name, *powers])
    steps = [f"{a} to {b}" for a, b in pairwise(WIDTHS)]
    return table(["power of the width", *steps, *(f"predicted, {s}" for s in steps)], rows)


RATES = ["width", "product"]


def rates_of(measured: Measured) -> list[str]:
    return [f"{measured.rate / 1e9:.3g}"]


def width_lines(known: dict[int, Measured]) -> list[str]:
    runs = [known[width] for width in WIDTHS]
    rows = [[str(w), *cells(r)] for w, r in zip(WIDTHS, runs, strict=True)]
    rates = [[str(w), *rates_of(r)] for w, r in zip(WIDTHS, runs, strict=True)]
    return [
        f"## Width, at {DEPTH} layers",
        "",
        *table(["width", *HEADER], rows),
        "",
        *exponents(runs),
        "",
        "Solves are products, which grow with the cube of the width, and elementwise operations, "
        "which grow with its square. The rate of a product, in GFLOP/s, measured before each run:",
        "",
        *table(RATES, rates),
        "",
    ]


def rank_lines() -> list[str]:
    rows: list[list[str]] = []
    alone: dict[str, float] = {}
    for ranks in RANKS:
        found = measure_ranks(ranks)
        row = [str(ranks)]
        for name, stages in {"calibration": ("check", "grams"), "solve": ("solve",)}.items():
            most = max(sum(rank["stages"][stage] for stage in stages) for rank in found)
            clock = max(sum(rank["clock"][stage] for stage in stages) for rank in found)
            alone.setdefault(name, most)
            row += [f"{most:.1f}", f"{alone[name] / most:.2f}", f"{clock:.1f}"]
        rows.append(row)
    header = ["ranks"]
    for name in ("calibration", "solve"):
        header += [f"{name}, processor s", "speed-up", f"{name}, clock s"]
    return [
        f"## Ranks, at width {WIDTH_OF_RANKS} and {DEPTH} layers",
        "",
        *table(header, rows),
        "",
        "Through torchrun with gloo, each rank with the model in memory; of the rank that took "
        "longest. The speed-up is of its own processor time: what remains for it to do, waiting "
        "left out. On two cores this shows how the work is split, and for two ranks what the "
        "clock makes of it where nothing else runs; of four ranks the clock can show nothing, and "
        "of the cost of a network there is nothing to be seen on one machine.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.directory:
        return in_directory(args.directory)
    if args.rank:
        return as_rank(args.rank)
    if args.rates:
        return measure_rates()
    by_depth = {depth: measure(WIDTH, depth) for depth in DEPTHS}
    by_width = {w: by_depth[DEPTH] if w == WIDTH else measure(w, DEPTH) for w in WIDTHS}
    lines = [
        "# Scale",
        "",
        f"`python benchmarks/scale.py`: Llamas with random weights in float32, {TARGET}, "
        f"{TOKENS:,} tokens in windows of {LENGTH}, from directory to directory, one thread; torch "
        f"{torch.__version__}. Times by the clock say little where "
        "something else runs, processor seconds more. Both are of the whole process, "
        "imports and tracing included; calibration (with saving states, which is not predicted) "
        "and solve (with rewriting) "
        "are processor "
        "seconds, and so are those predicted, by the formulas of costs/planning.py and the rates "
        "that the machine had before each run. Predicted "
        f"memory is above the imports, for which `magr-fx plan` adds {PROCESS / MB:.0f} MB.",
        "",
        *depth_lines(by_depth),
        *width_lines(by_width),
        *rank_lines(),
    ]
    OUT.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
