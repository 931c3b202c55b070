"""Runs that are cut short, and go on where they were, to the same bits."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import disk_offload
from crash_helpers import recorded_syncs, state_after_each_step
from targets import ASYMMETRIC, intx
from tiny_models import tiny_llama, tiny_mixtral, token_ids
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from toys import mlp, report_of, vectors

from magr_fx import CheckpointError, ConfigError, MagRConfig, magr_quantize, magr_transform
from magr_fx.machine.disk import BETWEEN_STATES
from magr_fx.passes.collecting.boundary import boundary, restore
from magr_fx.passes.offloading.execution import Execution
from magr_fx.passes.offloading.resident import all_resident
from magr_fx.passes.rewriting import solve_sites
from magr_fx.passes.rewriting.checkpoint import Checkpoint, checkpoint_report, fingerprint

CALIB = [token_ids(3, 17, seed=1), token_ids(2, 9, seed=2)]
INT3 = intx(3, ASYMMETRIC, None)


@pytest.fixture(autouse=True)
def _state_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    state_after_each_step(monkeypatch)


class InterruptedRunError(Exception):
    pass


def transform(model: nn.Module, **options: Any) -> nn.Module:
    return magr_transform(model, CALIB, **options)


def for_target(model: nn.Module, **options: Any) -> nn.Module:
    return magr_transform(model, CALIB, target=INT3, **options)


def nearest(model: nn.Module, **options: Any) -> nn.Module:
    return magr_quantize(model, CALIB, INT3, **options)


def gptq(model: nn.Module, **options: Any) -> nn.Module:
    return magr_quantize(model, CALIB, INT3, rounding="gptq", **options)


@functools.cache
def undisturbed(way: Callable[..., nn.Module]) -> nn.Module:
    """What a run of this way that nothing cuts short makes of the tiny Llama."""
    return way(tiny_llama())


def small() -> nn.Module:
    """For tests that are about the directory and not the model."""
    model: nn.Module = tiny_llama(num_hidden_layers=1)
    return model


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(_plain(ours[key]), _plain(theirs[key])) for key in ours)


def _plain(tensor: Any) -> torch.Tensor:
    plain: torch.Tensor = tensor.dequantize() if hasattr(tensor, "qdata") else tensor
    return plain


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run fail once that many steps are saved."""
    whole = Checkpoint.save

    def save(self: Checkpoint, step: int, *rest: Any) -> None:
        if step == steps:
            raise InterruptedRunError
        whole(self, step, *rest)

    monkeypatch.setattr(Checkpoint, "save", save)


def cut_short(
    way: Callable[..., nn.Module], model: nn.Module, folder: Path, steps: int, **options: Any
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(steps, patched)
        with pytest.raises(InterruptedRunError):
            way(model, checkpoint_dir=folder, **options)


@pytest.mark.parametrize(
    ("way", "steps"),
    [(transform, 1), (for_target, 0), (nearest, 3), (gptq, 0)],
)
@pytest.mark.slow_unless("transform-1")
def test_it_goes_on_to_the_same_bits(
    way: Callable[..., nn.Module], steps: int, tmp_path: Path
) -> None:
    wanted = undisturbed(way)
    cut_short(way, tiny_llama(), tmp_path, steps)
    model = way(tiny_llama(), checkpoint_dir=tmp_path)
    assert same_bits(model, wanted)
    ours, theirs = report_of(model), report_of(wanted)
    assert [site.name for site in ours.rewritten] == [site.name for site in theirs.rewritten]
    for one, other in zip(ours.rewritten, theirs.rewritten, strict=True):
        first, second = one.as_dict(), other.as_dict()
        for figures in (first, second):
            del figures["seconds"], figures["memory"]
        assert first == second
        assert one.damping == other.damping is not None


@pytest.mark.slow
def test_steps_that_are_done_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[str] = []
    whole = solve_sites.quantized_weights  # type: ignore[attr-defined]

    def counted(shared: Any, *rest: Any) -> Any:
        solved.extend(site.name for site in shared.sites)
        return whole(shared, *rest)

    monkeypatch.setattr(solve_sites, "quantized_weights", counted)
    cut_short(nearest, tiny_llama(), tmp_path, 4)
    first = set(solved)
    solved.clear()
    model = nearest(tiny_llama(), checkpoint_dir=tmp_path)
    rows = {site.name for site in report_of(model).rewritten}
    again = first & set(solved)
    assert first | set(solved) == rows
    assert 0 < len(again) < len(first)  # what the last step, which was not saved, had done
    solved.clear()
    same = nearest(tiny_llama(), checkpoint_dir=tmp_path)
    assert solved == []
    assert same_bits(same, model)


@pytest.mark.slow
def test_experts_and_buffers_go_on(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen: Any = self.seen
            for layer in self.layers:
                seen.add_(x.mean(0))
                x = torch.tanh(layer(x + seen))
            return x

    calib = [torch.randn(20, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)]

    def counted(model: nn.Module, **options: Any) -> nn.Module:
        return magr_transform(model, calib, target=INT3, **options)

    for way, make in ((counted, Counting), (for_target, tiny_mixtral)):
        folder = tmp_path / make.__name__
        wanted = way(make())
        cut_short(way, make(), folder, 2)
        assert same_bits(way(make(), checkpoint_dir=folder), wanted)


@pytest.mark.slow
def test_offloaded_models_go_on(tmp_path: Path) -> None:
    model, wanted = tiny_llama(), undisturbed(for_target)
    first = disk_offload(copy.deepcopy(model), str(tmp_path / "one"))
    cut_short(for_target, first, tmp_path / "checkpoint", 3)
    second = disk_offload(copy.deepcopy(model), str(tmp_path / "two"))
    for_target(second, checkpoint_dir=tmp_path / "checkpoint")
    assert torch.equal(second(CALIB[0]).logits, wanted(CALIB[0]).logits)


# Each run is forked off a process in which everything is imported.
KILLED = """
import os, pathlib, signal, sys, time
sys.path[:0] = {path!r}
from test_checkpoint import gptq
from tiny_models import tiny_llama
from magr_fx.passes.rewriting import checkpoint
checkpoint.BETWEEN_STATES = 0
folder = pathlib.Path(sys.argv[1])
for kill in range(3):
    child = os.fork()
    if child == 0:
        gptq(tiny_llama(), checkpoint_dir=folder)
        os._exit(0)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(folder.glob("weights-*.pt"))) > 2 * kill:
            break
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, len(list(folder.glob("weights-*.pt"))))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Killed again and again, each time a bit later; then one comes to its end."""
    ran = subprocess.run(
        [sys.executable, "-c", KILLED.format(path=sys.path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    ends = [tuple(map(int, line.split())) for line in ran.stdout.splitlines()]
    assert [code for code, _ in ends] == 3 * [-signal.SIGKILL]
    assert all(saved > 2 * kill for kill, (_, saved) in enumerate(ends))
    assert same_bits(gptq(tiny_llama(), checkpoint_dir=tmp_path), undisturbed(gptq))


# How often a state is written, and what is in it.


class Clock:
    """Seconds that go by only as they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("magr_fx.passes.rewriting.checkpoint.monotonic", lambda: self.now)
        monkeypatch.setattr("magr_fx.passes.rewriting.checkpoint.BETWEEN_STATES", BETWEEN_STATES)


@pytest.mark.parametrize(
    "steps",
    [[0.01] * 50, [1.0] * 200, [12.0, 0.1] * 10, [BETWEEN_STATES + 1] * 5, [600.0, 1.0, 1.0, 31.0]],
    ids=lambda steps: f"{len(steps)} of {steps[0]:g} s",
)
def test_a_kill_at_any_time_costs_half_a_minute_and_a_step(
    steps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run has done since its last state, looked at before each step's end; and the bytes."""
    clock = Clock(monkeypatch)
    boundary = Mock(return_value={"values": torch.zeros(1000)})
    checkpoint = Checkpoint(tmp_path, {})
    saved, states = clock.now, 0
    for step, seconds in enumerate(steps):
        clock.now += seconds
        assert clock.now - saved <= BETWEEN_STATES + seconds
        last = step == len(steps) - 1
        checkpoint.save(step, boundary, [], {"weight": torch.tensor(step)}, last)
        assert (tmp_path / f"weights-{step:06d}.pt").exists()  # at once, and not in memory
        if (tmp_path / f"state-{step:06d}.pt").exists():
            saved, states = clock.now, states + 1
            assert len(list(tmp_path.glob("state-*"))) == 1
    assert saved == clock.now
    assert states == boundary.call_count == checkpoint.states
    assert states <= 1 + sum(steps) / BETWEEN_STATES
    again = Checkpoint(tmp_path, {})
    state = again.last()
    assert state is not None
    assert state["step"] == len(steps) - 1
    assert [int(w["weight"]) for w in again.weights(state["step"])] == list(range(len(steps)))
    assert (again.states, again.written) == (states, checkpoint.written)


@pytest.mark.slow
def test_a_run_that_is_killed_between_two_states_does_the_same_steps_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    whole = Checkpoint.save

    def save(self: Checkpoint, step: int, *rest: Any) -> None:
        clock.now += BETWEEN_STATES if step == 2 else 1.0
        if step == 5:
            raise InterruptedRunError
        whole(self, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", save)
        with pytest.raises(InterruptedRunError):
            nearest(tiny_llama(), checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000002.pt"]
    assert (tmp_path / "weights-000004.pt").exists()
    assert same_bits(nearest(tiny_llama(), checkpoint_dir=tmp_path), undisturbed(nearest))
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000011.pt"]


@pytest.mark.slow
def test_the_report_says_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = Path.replace, dict[str, int]()

    def replace(self: Path, target: Any) -> Any:
        sizes[Path(target).name] = self.stat().st_size
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    cut_short(nearest, tiny_llama(), tmp_path, 4)
    report = report_of(nearest(tiny_llama(), checkpoint_dir=tmp_path))
    states = [name for name in sizes if name.startswith("state")]
    assert report.states == len(states) == 12
    assert report.saved_bytes == sum(sizes.values())
    assert f"{report.saved_bytes / 1e6:.3g} MB in all, 12 states" in report.totals()
    assert report_of(nearest(tiny_llama())).saved_bytes == 0


@pytest.mark.slow
def test_a_state_has_nothing_that_can_be_had_again(tmp_path: Path) -> None:
    """No token ids, and what both runs have alike, masks and positions, once."""
    cut_short(for_target, tiny_llama(), tmp_path, 4)
    (path,) = tmp_path.glob("state-*.pt")
    quantized, original = torch.load(path, weights_only=True)["boundary"]["streams"]
    for ours, theirs in zip(quantized, original, strict=True):
        assert ours.keys() == theirs.keys()
        whole = [v for v in (*ours.values(), *theirs.values()) if isinstance(v, torch.Tensor)]
        assert not any(value.dtype == torch.int64 and value.dim() == 2 for value in whole)
        alike = [key for key, value in theirs.items() if isinstance(value, str)]
        assert any(isinstance(ours[key], torch.Tensor) for key in alike)
        differing = [key for key, value in theirs.items() if isinstance(value, torch.Tensor)]
        assert differing
        assert not any(torch.equal(ours[key], theirs[key]) for key in differing)


@pytest.mark.parametrize("in_place", [False, True])
def test_values_come_back_as_they_were(in_place: bool) -> None:
    """Empty ones too, which lie in no weight's memory, as an empty weight says it does."""
    graph = fx.Graph()
    given, mask, empty, part = (graph.placeholder(name) for name in ("x", "mask", "empty", "part"))
    moved = graph.call_function(torch.ops.aten.neg.default, (given,))
    function = torch.ops.aten.add_ if in_place else torch.ops.aten.add
    graph.output(graph.call_function(function.Tensor, (moved, 1)))
    for node in (mask, empty, part):
        node.op, node.target, node.args = "call_function", torch.ops.aten.neg.default, (given,)
    stored = [nn.Parameter(torch.empty(0, 5)), nn.Parameter(torch.arange(6.0))]
    zeros = torch.tensor([[0.0, -0.0, torch.nan]])

    def values(changed: float) -> dict[fx.Node, Any]:
        return {
            given: torch.arange(3),
            mask: (torch.tensor([True]), zeros.clone()),
            empty: torch.empty(0, 3, dtype=torch.int64),
            part: stored[1].detach()[2:4],
            moved: torch.tensor([changed, -changed]),
        }

    streams = [[values(0.0)], [values(-0.0)]]
    saved = boundary(streams, [], [], stored, [])
    where = io.BytesIO()
    torch.save(saved, where)
    where.seek(0)
    back: list[list[dict[fx.Node, Any]]] = [[{given: torch.arange(3)}], [{given: torch.arange(3)}]]
    read = torch.load(where, weights_only=True)
    restore(read, back, [graph], [], [], stored, keep_spilled=False)
    for envs, wanted in zip(back, streams, strict=True):
        for node, value in wanted[0].items():
            ours, theirs = tree_leaves(envs[0][node]), tree_leaves(value)
            for one, other in zip(ours, theirs, strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert one.numpy().tobytes() == other.numpy().tobytes()
        assert envs[0][part].data_ptr() == stored[1][2:4].data_ptr()
    described = [[type(value) for value in envs[0].values()] for envs in read["streams"]]
    # All but -0 for 0; of a graph that works in place none.
    assert sum(kind is str for kind in described[1]) == (0 if in_place else 4)


# What is refused, and what a full disk leaves.


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("calibration", {"calib": CALIB[:1]}),
        ("configuration", {"config": MagRConfig(damping=0.2)}),
        ("configuration", {"holdout": 0.2}),
        ("configuration", {"target": intx(2, ASYMMETRIC, None)}),
        ("graphs", {"model": tiny_llama(num_hidden_layers=1, rms_norm_eps=1e-3)}),
    ],
)
@pytest.mark.slow
def test_another_run_is_refused(what: str, change: dict[str, Any], tmp_path: Path) -> None:
    cut_short(for_target, small(), tmp_path, 1)
    model = small()
    before = copy.deepcopy(model.state_dict())
    options = {"model": model, "calib": CALIB, "target": INT3, **change}
    with pytest.raises(CheckpointError, match=rf"differs in: .*{what}"):
        magr_transform(checkpoint_dir=tmp_path, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_a_rewritten_model_is_another_one(tmp_path: Path) -> None:
    model = for_target(small(), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="differs in: model"):
        for_target(model, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.fsync
    written = 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 10:  # two of each file
            raise OSError(28, "No space left on device")
        whole(descriptor)

    wanted = undisturbed(for_target)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*resumes from"):
            for_target(tiny_llama(), checkpoint_dir=tmp_path)
    assert not list(tmp_path.glob("*.unfinished"))
    assert same_bits(for_target(tiny_llama(), checkpoint_dir=tmp_path), wanted)


def test_each_file_is_on_the_disk_before_another_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its directory is synced, a loss of power may undo a rename, and keep a later one."""
    events = recorded_syncs(tmp_path, monkeypatch)
    checkpoint = Checkpoint(tmp_path, {})
    monkeypatch.setattr("magr_fx.passes.rewriting.checkpoint.BETWEEN_STATES", 1e9)
    for step in (0, 1):
        checkpoint.save(step, dict, [], {"weight": torch.zeros(2)})
    checkpoint.save(2, dict, [], {}, True)
    both = ["weights-000000.pt", "weights-000001.pt"]

    def settled(name: str) -> list[str]:
        return [f"sync {name}.unfinished", f"replace {name}", f"sync {tmp_path.name}"]

    wanted = [*settled("fingerprint.json"), *(f"replace {name}" for name in both)]
    wanted += [*(f"sync {name}" for name in both), f"sync {tmp_path.name}"]
    assert events == wanted + settled("state-000002.pt")


def test_a_platform_that_opens_no_directory_writes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.open

    def refusing(path: Any, *rest: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing)
        events = recorded_syncs(tmp_path, patched)
        Checkpoint(tmp_path, {}).save(0, lambda: {"kept": 1}, [], {})
    assert f"sync {tmp_path.name}" not in events
    last = Checkpoint(tmp_path, {}).last()
    assert last is not None
    assert last["boundary"] == {"kept": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_torch_says_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    (tmp_path / "weights-000000.pt.unfinished").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(0, dict, [], {"weight": torch.zeros(100_000)})
    assert list(tmp_path.glob("*.pt*")) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError("of the host")])
@pytest.mark.parametrize("where", ["making", "writing"])
def test_no_memory_is_no_full_disk(
    error: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An activation of a device comes to the CPU as it is written, which needs memory."""
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save(0, dict, [], {})
    boundary = Mock(side_effect=error) if where == "making" else dict
    if where == "writing":
        monkeypatch.setattr(torch, "save", Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        checkpoint.save(1, boundary, [], {})
    assert raised.value is error
    assert not list(tmp_path.glob("*.unfinished"))
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000000.pt"]


def test_no_memory_to_read_a_state_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told to empty the directory loses the run."""
    Checkpoint(tmp_path, {}).save(0, dict, [], {})
    error = torch.OutOfMemoryError("CUDA")
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        Checkpoint(tmp_path, {}).last()
    assert raised.value is error


@pytest.mark.slow
def test_rows_that_were_saved_without_damping_are_read(tmp_path: Path) -> None:
    cut_short(for_target, tiny_llama(), tmp_path, 2)
    (path,) = tmp_path.glob("state-*.pt")
    state = torch.load(path, weights_only=True)
    assert all(row.pop("damping") is not None for row in state["rows"])
    torch.save(state, path)
    saved = checkpoint_report(tmp_path).sites
    assert [site.damping for site in saved] == [None] * len(state["rows"])
    report = report_of(for_target(tiny_llama(), checkpoint_dir=tmp_path))
    noted = [site.damping is not None for site in report.rewritten]
    assert noted == [False] * len(saved) + [True] * (len(noted) - len(saved))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cut_short(for_target, small(), tmp_path, 2)
    (state,) = tmp_path.glob("state-*.pt")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{state.name} cannot be read"):
        for_target(small(), checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="another directory"):
        transform(small(), checkpoint_dir=tmp_path / "file")
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(CheckpointError, match="another directory"):
        transform(small(), checkpoint_dir=tmp_path)


def drop(path: Path) -> None:
    path.unlink()


def reshape(path: Path) -> None:
    weights = torch.load(path)
    torch.save({name: torch.ones(3, 3) for name in weights}, path)


def make_a_list(path: Path) -> None:
    torch.save([1], path)


@pytest.mark.parametrize("damage", [drop, reshape, make_a_list])
@pytest.mark.parametrize("way", [transform, gptq])
@pytest.mark.slow
def test_weights_that_a_state_counts_on_are_not_missed_in_silence(
    way: Callable[..., nn.Module], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    way(small(), checkpoint_dir=tmp_path)
    damage(min(tmp_path.glob("weights-*.pt")))
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"lacks the weights of \d+ sites .*_proj.*start again"
    ):
        way(model, checkpoint_dir=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("state", [[1], {}, {"rows": [{"name": "a"}], "step": 0, "boundary": {}}])
@pytest.mark.slow
def test_a_state_of_something_else_is_named(state: Any, tmp_path: Path) -> None:
    transform(small(), checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("state-*.pt")
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match=rf"{path.name} is not a state of a run: .* to start again"
    ):
        transform(small(), checkpoint_dir=tmp_path)


@pytest.mark.parametrize("text", ["[1]", "3", '{"model": 3}', '{"configuration": "[1]"}', "null"])
@pytest.mark.slow_unless("3")
def test_a_fingerprint_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "fingerprint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is damaged; give another|belongs to another run"):
        transform(small(), checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "state-abcdef.pt", tmp_path / "weights-abcdef.pt"]
    for path in others:
        path.write_bytes(b"theirs")
    for _ in range(2):
        transform(small(), checkpoint_dir=tmp_path)
    assert [path.read_bytes() for path in others] == [b"theirs"] * 2


@pytest.mark.parametrize("name", ["", 3, 0.5])
@pytest.mark.parametrize("option", ["checkpoint_dir", "spill_dir"])
@pytest.mark.slow_unless("checkpoint_dir-3")
def test_what_is_no_name_of_a_directory_is_refused(option: str, name: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be the name of a directory"):
        transform(small(), **{option: name})


def test_the_fingerprint_is_readable(tmp_path: Path) -> None:
    transform(small(), checkpoint_dir=tmp_path)
    known = json.loads((tmp_path / "fingerprint.json").read_text())
    assert known["version of torch"] == torch.__version__
    assert json.loads(known["configuration"])["config"]["solver"] == "admm"


def test_graphs_are_the_same_on_every_ranks_own_device() -> None:
    def graphs(device: str) -> str:
        graph = fx.Graph()
        made = graph.call_function(
            torch.ops.aten.arange.default, (3,), {"device": torch.device(device)}
        )
        graph.output(made)
        trace = Mock(graph_module=fx.GraphModule({}, graph))
        batch: Any = Mock(trace=trace, values=())
        return fingerprint([batch], [], {}, all_resident)["graphs"]

    assert graphs("cuda:0") == graphs("cuda:1") == graphs("cuda")
    assert graphs("cuda:0") != graphs("cpu")


def test_another_device_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved lies on the device; its random numbers are drawn there as well."""
    magr_transform(mlp(), vectors(), checkpoint_dir=tmp_path)
    monkeypatch.setattr(Execution, "names_of_devices", lambda execution, model: "cuda:1")
    with pytest.raises(CheckpointError, match=r"devices was cpu, now cuda:1"):
        magr_transform(mlp(), vectors(), checkpoint_dir=tmp_path)
