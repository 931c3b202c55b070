"""Several ranks that share one run: the weights of one process, the same bits on every rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
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


WAYS = [transform, for_target, nearest, gptq, without_propagation, by_make_fx]


def outcome(model: nn.Module) -> dict[str, Any]:
    """What a run made of the model, as plain tensors and the rows of its report."""
    state: dict[str, Any] = model.state_dict()
    rows = [
        (row.as_dict(), row.channel_max_before, row.channel_max_after)
        for row in report_of(model).sites
    ]
    plain = {key: x.dequantize() if hasattr(x, "qdata") else x for key, x in state.items()}
    return {"weights": {key: x.detach().clone() for key, x in plain.items()}, "rows": rows}


def all_ways() -> list[dict[str, Any]]:
    return [outcome(way()) for way in WAYS]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return all_ways()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """For a number of ranks: what each made of all ways."""
    known: dict[int, list[Any]] = {}

    def run(world: int) -> list[Any]:
        if world not in known:
            known[world] = on_ranks(world, all_ways, tmp_path_factory.mktemp("ranks"))
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
    for other in others:
        for one, same in zip(first.value, other.value, strict=True):
            assert one["weights"].keys() == same["weights"].keys()
            assert all(torch.equal(x, same["weights"][key]) for key, x in one["weights"].items())
            np.testing.assert_equal(same["rows"], one["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])  # with 4, one has no batch
@pytest.mark.parametrize("way", range(len(WAYS)), ids=[way.__name__ for way in WAYS])
def test_the_result_is_that_of_one_process(
    way: int, world: int, of_ranks: Callable[[int], list[Any]], alone: list[dict[str, Any]]
) -> None:
    ours, wanted = of_ranks(world)[0].value[way], alone[way]
    names = [[row["name"] for row, *_ in made["rows"]] for made in (ours, wanted)]
    assert sorted(names[0]) == sorted(names[1])
    told = [{r["name"]: (r["outcome"], r["tokens"], r["reason"]) for r, *_ in made["rows"]}
            for made in (ours, wanted)]
    assert told[0] == told[1]
    for key, weight in wanted["weights"].items():
        print(key, float((ours["weights"][key] - weight).abs().max()), float(weight.abs().max()))
