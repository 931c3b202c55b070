"""Several ranks that share one run: the weights of one process, the same bits on every rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_helpers import on_ranks
from targets import ASYMMETRIC, intx
from tiny_models import tiny_llama, tiny_mixtral, token_ids
from torch import Tensor, nn
from torch import distributed as dist
from toys import Overflows, mlp, report_of, vectors

from magr_fx import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DistributedError,
    magr_quantize,
    magr_transform,
)
from magr_fx.passes import pipeline
from magr_fx.passes.checkpoint import Checkpoint

INT3 = intx(3, ASYMMETRIC, None)


def padded(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": token_ids(batch, length, seed), "attention_mask": mask}


CALIB: list[Any] = [padded(3, 17, 1), padded(2, 9, 2), padded(2, 12, 3)]


def transform() -> nn.Module:
    return magr_transform(tiny_llama(), CALIB, strict=True)


def for_target() -> nn.Module:
    return magr_transform(tiny_llama(), CALIB, target=INT3)


def nearest() -> nn.Module:
    return magr_quantize(tiny_mixtral(), CALIB, INT3)


def gptq() -> nn.Module:
    return magr_quantize(tiny_llama(), CALIB, INT3, rounding="gptq", refine=2)


def without_propagation() -> nn.Module:
    return magr_quantize(tiny_mixtral(), CALIB, INT3, rounding="gptq", propagate=False)


def by_make_fx() -> nn.Module:
    return magr_transform(mlp(), vectors(40, 24, 7), trace="make_fx")


class Heads(nn.Module):
    """Linears of several shapes, each on inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = nn.ModuleList(nn.Linear(32, rows) for rows in (24, 40, 8, 56))

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.heads, x.split(32, -1), strict=True)
        return torch.cat([head(part) for head, part in parts], -1)


def of_whole_numbers(**options: Any) -> nn.Module:
    """Sums of whole numbers are exact, in whatever order: so are the grams."""
    calib = [torch.randint(-9, 10, (rows, 128), generator=generator(rows)) for rows in (70, 50, 9)]
    calib = [x.float() for x in calib]
    return magr_quantize(Heads(), calib, INT3, **options)


def exact_nearest() -> nn.Module:
    return of_whole_numbers()


def exact_gptq() -> nn.Module:
    return of_whole_numbers(rounding="gptq", propagate=False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EXACT = [exact_nearest, exact_gptq]
WAYS = {2: [transform, for_target, nearest, gptq, *EXACT], 4: [transform, by_make_fx, *EXACT]}


def outcome(model: nn.Module) -> dict[str, Any]:
    """What a run made of the model, as plain tensors and the rows of its report."""
    state: dict[str, Any] = model.state_dict()
    rows = [
        (row.as_dict(), row.channel_max_before, row.channel_max_after)
        for row in report_of(model).sites
    ]
    plain = {key: x.dequantize() if hasattr(x, "qdata") else x for key, x in state.items()}
    return {"weights": {key: x.detach().clone() for key, x in plain.items()}, "rows": rows}


def outcomes(ways: Iterable[Callable[[], nn.Module]]) -> dict[str, Any]:
    return {way.__name__: outcome(way()) for way in ways}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return outcomes(dict.fromkeys([*WAYS[2], *WAYS[4]]))


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """For a number of ranks: what each made of all ways."""
    known: dict[int, list[Any]] = {}

    def run(world: int) -> list[Any]:
        if world not in known:
            known[world] = on_ranks(world, outcomes, tmp_path_factory.mktemp("ranks"), WAYS[world])
        return known[world]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_has_the_same_bits_and_rows(
    world: int, of_ranks: Callable[[int], list[Any]]
) -> None:
    first, *others = of_ranks(world)
    for other in (first, *others):
        assert (other.error, other.code) == (None, 0)
    for name, one in first.value.items():
        for same in (other.value[name] for other in others):
            assert one["weights"].keys() == same["weights"].keys()
            assert all(torch.equal(x, same["weights"][key]) for key, x in one["weights"].items())
            np.testing.assert_equal(same["rows"], one["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "way"),
    [(world, way.__name__) for world, ways in WAYS.items() for way in ways],
)
def test_the_result_is_that_of_one_process(
    way: str, world: int, of_ranks: Callable[[int], list[Any]], alone: dict[str, Any]
) -> None:
    ours, wanted = of_ranks(world)[0].value[way], alone[way]
    told = [
        {row["name"]: (row["outcome"], row["tokens"], row["reason"]) for row, *_ in made["rows"]}
        for made in (ours, wanted)
    ]
    assert told[0] == told[1]
    worst, same, total = 0., 0, 0
    for key, weight in wanted["weights"].items():
        if weight.dim() < 2: continue
        d = (ours["weights"][key] - weight).abs()
        worst = max(worst, float(d.max()/weight.abs().max()))
        same += int((d < 1e-4*weight.abs().max()).sum()); total += d.numel()
    errs = [np.mean([r["quantization"]["error"] for r, *_ in m["rows"] if r["quantization"]]) for m in (ours, wanted)]
    print(way, world, worst, same/total, errs)
