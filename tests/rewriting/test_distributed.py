"""Several ranks that share one run: the weights of one process, the same bits on every rank."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from crash_helpers import state_after_each_step
from rank_helpers import on_ranks
from targets import ASYMMETRIC, PACKED, intx, quantized
from tiny_models import tiny_llama, tiny_mixtral, token_ids
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchao.quantization import FqnToConfig
from toys import Overflows, changed, mlp, report_of, state, vectors

from magr_fx import (
    Budget,
    CalibrationError,
    CheckpointError,
    ConfigError,
    DistributedError,
    MagRConfig,
    magr_quantize,
    magr_transform,
    solve_magr,
)
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.offloading import execution
from magr_fx.passes.offloading.resident import Weights
from magr_fx.passes.rewriting import pipeline, solve_sites
from magr_fx.passes.rewriting import share_solves as spread
from magr_fx.passes.rewriting.checkpoint import Checkpoint

INT3 = intx(3, ASYMMETRIC, None)


def padded(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": token_ids(batch, length, seed), "attention_mask": mask}


CALIB: list[Any] = [padded(3, 17, 1), padded(2, 9, 2), padded(2, 12, 3)]


def chain() -> nn.Sequential:
    """Six linears, each a step of the run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)]
    return nn.Sequential(*layers)


def transform() -> nn.Module:
    model: nn.Module = tiny_llama()
    return magr_transform(model, CALIB, strict=True)


def for_target(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = chain() if model is None else model
    return magr_transform(model, vectors(40, 24, 70), target=INT3, **options)


def nearest() -> nn.Module:
    model: nn.Module = tiny_mixtral()
    return magr_quantize(model, CALIB, INT3)


def gptq(**options: Any) -> nn.Module:
    calib = vectors(40, 24, 70)
    return magr_quantize(chain(), calib, INT3, rounding="gptq", refine=2, **options)


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
        parts = zip(self.heads, x.chunk(4, -1), strict=True)
        return torch.cat([head(part) for head, part in parts], -1)


def of_whole_numbers(target: Any = INT3, **options: Any) -> nn.Module:
    """Sums of whole numbers are exact, in whatever order: so are the grams."""
    calib = [torch.randint(-9, 10, (rows, 128), generator=generator(rows)) for rows in (70, 50, 9)]
    calib = [x.float() for x in calib]
    model: nn.Module = Heads()
    options = {"config": MagRConfig(damping=0.1), **options}  # as where there are many tokens
    if target is None:
        return magr_transform(model, calib, **options)
    return magr_quantize(model, calib, target, **options)


def exact_nearest() -> nn.Module:
    return of_whole_numbers()


def exact_gptq() -> nn.Module:
    return of_whole_numbers(rounding="gptq", propagate=False)


def mixed() -> nn.Module:
    configs = {"re:heads.[02]": INT3, "re:heads.1": intx(4, ASYMMETRIC, None)}
    return of_whole_numbers(FqnToConfig(OrderedDict(configs)), propagate=False)


def budget() -> nn.Module:
    choices = (intx(3, ASYMMETRIC, None), intx(4, ASYMMETRIC, None), intx(6, ASYMMETRIC, None))
    return of_whole_numbers(Budget(bits=6.0, choices=choices), propagate=False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_rows(way: Callable[[], nn.Module]) -> nn.Module:
    """With the rows of each gram's sites split over the ranks, as those of large ones are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spread, "SPLIT_FROM", 0)
        patched.setattr(spread, "LEAST_ROWS", 1)
        return way()


def rows_nearest() -> nn.Module:
    return by_rows(of_whole_numbers)


def rows_gptq() -> nn.Module:
    return by_rows(partial(of_whole_numbers, rounding="gptq", refine=3))


def rows_in_groups() -> nn.Module:
    return by_rows(partial(of_whole_numbers, target=intx(4, ASYMMETRIC, 8)))


def rows_transform() -> nn.Module:
    return by_rows(partial(of_whole_numbers, target=None))


class Packed(nn.Module):
    """Linears of one input, whose rows three ranks cut in two of them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = nn.ModuleList(nn.Linear(32, rows) for rows in (48, 80, 96))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], -1)


def rows_packed() -> nn.Module:
    """For a target whose tensors come in panels of 16 rows."""
    calib = [torch.randint(-9, 10, (rows, 32), generator=generator(rows)) for rows in (70, 50, 9)]
    config = MagRConfig(damping=0.1)
    return by_rows(
        lambda: magr_transform(Packed(), [x.float() for x in calib], config, target=PACKED)
    )


WAYS: dict[int, list[Callable[[], nn.Module]]] = {
    2: [
        transform,
        for_target,
        nearest,
        gptq,
        exact_nearest,
        mixed,
        budget,
        rows_gptq,
        rows_in_groups,
    ],
    4: [by_make_fx, exact_gptq, rows_nearest, rows_transform],
}


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


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.slow
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
    pairs = [(ours["weights"][key], x) for key, x in wanted["weights"].items() if x.dim() > 1]
    share = [float((x - y).abs().le(1e-4 * y.abs().max()).float().mean()) for x, y in pairs]
    if way in ("exact_nearest", "exact_gptq", "mixed", "budget"):
        assert share == [1.0] * len(pairs)
        assert all(torch.equal(one, other) for one, other in pairs)
    elif way in ("transform", "by_make_fx", "rows_transform"):
        for one, other in pairs:
            assert float((one - other).abs().max()) < 2e-3 * float(other.abs().max())
    elif way.startswith("rows"):  # a row whose candidates are as good may choose another one
        assert min(share) > 0.95
        assert error_of(ours) == pytest.approx(error_of(wanted), rel=1e-3)
    else:  # as far apart as one process with its batches in another order: few rows choose alike
        assert sum(share) / len(share) > 0.15
        assert error_of(ours) == pytest.approx(error_of(wanted), rel=0.05)


@pytest.mark.slow
def test_rows_of_a_packed_target_are_cut_between_its_panels(tmp_path: Path) -> None:
    quantized(torch.zeros(16, 32), PACKED)  # skips where there is no kernel for it
    wanted, (first, *others) = rows_packed(), on_ranks(3, outcomes, tmp_path, [rows_packed])
    assert [row.outcome for row in report_of(wanted).sites] == 3 * ["rewritten"]
    for one in (first, *others):
        assert (one.error, one.code) == (None, 0)
        for key, x in one.value["rows_packed"]["weights"].items():
            assert torch.equal(x, first.value["rows_packed"]["weights"][key])
    made = first.value["rows_packed"]
    assert [row["outcome"] for row, *_ in made["rows"]] == 3 * ["rewritten"]
    assert error_of(made) == pytest.approx(error_of(outcome(wanted)), rel=1e-3)


def error_of(made: dict[str, Any]) -> float:
    known = [row["quantization"] for row, *_ in made["rows"]]
    return float(sum(quantization["error"] for quantization in known if quantization))


# What goes wrong on one rank ends all.


def test_no_memory_for_a_collective_is_no_lost_rank() -> None:
    error = torch.OutOfMemoryError("CUDA")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        Ranks(None, 0, 2)._call(Mock(side_effect=error))
    assert raised.value is error
    with pytest.raises(DistributedError, match="lost the others"):
        Ranks(None, 0, 2)._call(Mock(side_effect=RuntimeError("connection closed")))


def raised(function: Callable[[], Any]) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def failures() -> dict[str, tuple[str, str]]:
    """What each rank raises where one finds something wrong, and whether a rank may work alone."""
    rank = dist.get_rank()
    broken = vectors(8, 8, 8)
    broken[1][3] *= 1e30  # on rank 1, in the middle of the model
    model = Overflows("middle")
    before = state(model)
    found = {"nan": raised(lambda: magr_transform(model, broken))}
    found["changed"] = (str(changed(model, before)), "")
    found["calib"] = raised(lambda: magr_transform(mlp(), vectors(8, 8 + rank)))
    config = MagRConfig(group_size=16 if rank == 0 else 7)
    found["option"] = raised(lambda: magr_transform(mlp(), vectors(), config))
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(pipeline, "fill_up", divide_by_zero)
        found["solve"] = raised(lambda: magr_transform(mlp(), vectors()))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spread, "SPLIT_FROM", 0)
        patched.setattr(spread, "LEAST_ROWS", 1)
        if rank == 1:
            patched.setattr(solve_sites, "solve_magr", refuse_few_rows)
        report = report_of(magr_transform(mlp(), vectors()))
    outcomes = [(row.name, row.outcome, row.reason) for row in report.sites]
    found["site"] = (str(outcomes), "")
    if rank == 0:
        found["alone"] = raised(lambda: magr_transform(mlp(), vectors(), process_group=False))
    group = dist.new_group([0])
    found["group"] = raised(lambda: magr_transform(mlp(), vectors(), process_group=group))
    return found


def refuse_few_rows(weight: Tensor, *rest: Any, **options: Any) -> Any:
    if len(weight) < 10:
        raise CalibrationError("too few rows")
    return solve_magr(weight, *rest, **options)


def divide_by_zero(*_: Any) -> None:
    raise ZeroDivisionError("of a test")


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = on_ranks(2, failures, tmp_path)
    assert (first.error, second.error) == (None, None)
    for name in ("nan", "changed", "calib", "option", "site"):
        assert first.value[name] == second.value[name], name
    found = first.value
    assert found["nan"][0] == "CalibrationError"
    assert "the input of middle.weight holds NaN or Inf in calibration batch 1" in found["nan"][1]
    assert found["changed"][0] == "[]"
    assert found["calib"][0] == "DistributedError"
    assert "differ in: calibration" in found["calib"][1]
    assert found["option"][0] == "ConfigError"
    assert "groups of 7" in found["option"][1]
    for value in (first.value, second.value):
        kind, message = value["solve"]
        assert kind == "DistributedError"
        assert "rank 1 of 2 failed: ZeroDivisionError: of a test" in message
    assert "('2.weight', 'failed', 'CalibrationError: too few rows')" in found["site"][0]
    assert "('0.weight', 'rewritten', '')" in found["site"][0]
    assert found["alone"][0] == found["group"][0] == "nothing"
    assert second.value["group"][0] == "ConfigError"


def too_late() -> None:
    if dist.get_rank() == 1:
        time.sleep(6)
    magr_transform(mlp(), vectors())


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    first, _ = on_ranks(2, too_late, tmp_path, patience=2)
    assert isinstance(first.error, DistributedError)
    assert "longer timeout" in str(first.error)


def until_killed(folder: Path) -> None:
    """The second rank is killed as the fourth step is saved, before or after it has saved it."""
    whole = Checkpoint.save

    def save(self: Checkpoint, step: int, *rest: Any) -> None:
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, step, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoint, "save", save)
        state_after_each_step(patched)
        for_target(checkpoint_dir=folder)


def go_on(folder: Path) -> dict[str, Any]:
    steps = []
    whole = Checkpoint.save

    def save(self: Checkpoint, step: int, *rest: Any) -> None:
        steps.append(step)
        whole(self, step, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoint, "save", save)
        state_after_each_step(patched)
        ended = outcome(for_target(checkpoint_dir=folder))
    return {**ended, "steps": steps, "wanted": outcome(for_target())["weights"]}


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    first, second = on_ranks(2, until_killed, tmp_path, folder)
    assert isinstance(first.error, DistributedError)
    assert "checkpoint_dir" in str(first.error)
    assert second.code == -signal.SIGKILL
    # The first rank may have saved a step that the second has not: it does not count.
    saved = {path.name for path in folder.glob("state-*.pt")}
    both = {f"state-000002-rank{rank}.pt" for rank in (0, 1)}
    assert both <= saved <= {*both, "state-000003-rank0.pt"}
    with pytest.raises(CheckpointError, match=r"differs in: number of ranks \(was 2, now 1\)"):
        for_target(checkpoint_dir=folder)
    first, second = on_ranks(2, go_on, tmp_path, folder)
    assert (first.error, second.error) == (None, None)
    for ended in (first, second):
        wanted = ended.value["wanted"]
        assert ended.value["steps"] == [3, 4, 5, *ended.value["steps"][3:]]
        assert all(torch.equal(ended.value["weights"][key], x) for key, x in wanted.items())


# Sharded weights.


class Uneven(nn.Sequential):
    """Rows that two ranks cannot share evenly, and a weight that two modules share."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, last = nn.Linear(32, 32), nn.Linear(32, 7)
            again = nn.Linear(32, 32)
        again.weight = first.weight
        super().__init__(first, nn.Tanh(), again, last)


def fsdp(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def sharded() -> None:
    """A sharded model becomes what the same model becomes unsharded, and stays sharded."""
    largest = count_resident()
    model = tiny_llama()
    fsdp(model, model.model.layers)
    before = dict(model.named_parameters())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        model(**CALIB[0])  # the outermost module keeps its weights whole after this
    magr_transform(model, CALIB, target=INT3)
    wanted = magr_transform(tiny_llama(), CALIB, target=INT3)
    same_when_gathered(model, before, wanted)
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.allclose(model(**CALIB[0]).logits, wanted(**CALIB[0]).logits, atol=1e-5)
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
    assert 0 < max(largest) <= layer + 64 * 32 + 32  # and the embedding or the head

    for shard in (lambda m: fsdp(m, [m[3]]), by_columns):
        model = shard(Uneven())
        before = dict(model.named_parameters())
        with pytest.MonkeyPatch.context() as patched:
            if shard is by_columns:  # as if they were on another device than the CPU
                patched.setattr(execution, "device_of_shards", lambda model: torch.device("cpu"))
            magr_transform(model, vectors())
        same_when_gathered(model, before, magr_transform(Uneven(), vectors()))
    assert raised(lambda: magr_quantize(model, vectors(), INT3))[0] == "ModelError"
    kind, message = raised(lambda: magr_transform(model, vectors(), process_group=False))
    assert (kind, "every rank that holds a shard" in message) == ("ModelError", True)
    assert raised(lambda: magr_transform(model, vectors(), trace="make_fx"))[0] == "ConfigError"


def by_columns(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for weight in dict.fromkeys(linear.weight for linear in linears):
        shard = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(1)]))
        for linear in linears:
            if linear.weight is weight:
                linear.weight = shard
    return model


def same_when_gathered(
    model: nn.Module, before: dict[str, nn.Parameter], wanted: nn.Module
) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole = dict(wanted.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        full: Tensor = parameter
        if isinstance(parameter, DTensor):
            full = parameter.full_tensor()
            assert parameter.to_local().numel() < full.numel()
        assert torch.equal(full, whole[name]), name
    assert any(isinstance(parameter, DTensor) for parameter in before.values())
    names = [[site.name for site in report_of(m).rewritten] for m in (model, wanted)]
    assert names[0] == names[1]


def count_resident() -> list[int]:
    """How many weights are whole at a time, from now on."""
    sizes: list[int] = []
    load = Weights.resident

    @contextlib.contextmanager
    def counted(
        self: Weights, tensors: Iterable[Tensor], *, ahead: Iterable[Tensor] = ()
    ) -> Iterator[None]:
        with load(self, tensors, ahead=ahead):
            sizes.append(sum(weight.placeholder.parameter.numel() for weight in self._versions))
            yield

    Weights.resident = counted  # type: ignore[method-assign]
    return sizes


@pytest.mark.slow
def test_sharded_weights_stay_sharded(tmp_path: Path) -> None:
    for ended in on_ranks(2, sharded, tmp_path):
        assert (ended.error, ended.code) == (None, 0)


def test_without_a_group_there_is_nobody_to_work_with() -> None:
    with pytest.raises(ConfigError, match="process_group must be a"):
        magr_transform(mlp(), vectors(), process_group="gloo")  # type: ignore[arg-type]


# One process, several devices.


@pytest.mark.slow
def test_a_model_that_accelerate_dispatches_is_taken_as_it_is() -> None:
    """The hooks that bring inputs to each module's device stay where they are."""
    model = tiny_llama()
    for module in (model, *model.model.layers, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=module is model))
    magr_transform(model, CALIB)
    wanted = magr_transform(tiny_llama(), CALIB)
    assert hasattr(model.model.layers[1], "_hf_hook")
    assert report_of(model).tracer == "export"
    assert torch.equal(model(**CALIB[0]).logits, wanted(**CALIB[0]).logits)
    assert len(report_of(model).rewritten) == 15


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
def test_each_block_is_solved_where_its_weights_live() -> None:
    places: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), 1)
    model = dispatch_model(tiny_llama(), places)
    magr_transform(model, CALIB)
    wanted = magr_transform(tiny_llama(), CALIB)
    for (name, one), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert one.device.index == next(at for key, at in places.items() if name.startswith(key))
        assert torch.allclose(one.cpu(), other, atol=2e-3 * float(other.abs().max()))


def on_own_gpu() -> dict[str, Any]:
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    calib = [{key: x.to(device) for key, x in batch.items()} for batch in CALIB]
    found = outcome(magr_transform(tiny_llama().to(device), calib))
    return {**found, "weights": {key: x.cpu() for key, x in found["weights"].items()}}


def sharded_on_gpus() -> None:
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    model = tiny_llama().to(device)
    fsdp(model, model.model.layers)
    magr_transform(model, CALIB)
    wanted = dict(magr_transform(tiny_llama().to(device), CALIB).named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().device == device
        assert torch.allclose(parameter.full_tensor(), wanted[name], atol=1e-3), name


@pytest.mark.gpu
@two_gpus
def test_sharded_weights_on_gpus(tmp_path: Path) -> None:
    for ended in on_ranks(2, sharded_on_gpus, tmp_path, backend="nccl"):
        assert (ended.error, ended.code) == (None, 0)


@pytest.mark.gpu
@two_gpus
def test_nccl(tmp_path: Path, alone: dict[str, Any]) -> None:
    first, second = on_ranks(2, on_own_gpu, tmp_path, backend="nccl")
    assert (first.error, second.error) == (None, None)
    for key, weight in first.value["weights"].items():
        assert torch.equal(weight, second.value["weights"][key])
        wanted = alone["transform"]["weights"][key]
        assert torch.allclose(weight, wanted, atol=2e-3 * float(wanted.abs().max()))
