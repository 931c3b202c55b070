"""Ranks that die, and disks that fill up, at any moment: the others end, and the run goes on."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_helpers import moments, state_after_each_step
from rank_helpers import on_ranks
from test_distributed import by_rows, chain, for_target, gptq, outcome, raised
from torch import distributed as dist
from toys import changed, state

from magr_fx import CheckpointError, DistributedError
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.collecting import spill
from magr_fx.passes.rewriting.checkpoint import Checkpoint

# Two threads, each of which does to the directory what a rank does, and dies where it is told to.

STEPS = 3


class Killed(BaseException):
    """Nothing that the code under test may handle."""


@dataclass
class Meetings:
    """Who has come to how many meetings, and who is dead."""

    come: list[int] = field(default_factory=lambda: [0, 0])
    said: list[Any] = field(default_factory=lambda: [None, None])
    dead: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def come_to(self, rank: int) -> None:
        """Wait for the other, who may die as soon as it has come."""
        with self.changed:
            self.come[rank] += 1
            self.changed.notify_all()
            number, other = self.come[rank], 1 - rank
            self.changed.wait_for(lambda: self.come[other] >= number or other in self.dead)
            if self.come[other] < number:
                raise DistributedError("the other has died")

    def die(self, rank: int) -> None:
        with self.changed:
            self.dead.add(rank)
            self.changed.notify_all()


@dataclass(frozen=True)
class Thread(Ranks):
    """One of two ranks that are threads."""

    world: int = 2
    meetings: Meetings = field(default_factory=Meetings)

    def meet(self, error: Exception | None = None) -> None:
        died_at("meet")
        self.meetings.come_to(self.rank)
        died_at("met")

    def gather(self, item: Any) -> list[Any]:
        self.meetings.said[self.rank] = item
        self.meet()
        said = list(self.meetings.said)
        self.meet()
        return said


@dataclass
class Life:
    """A rank's: the moments it has come to, that of its death, and what it has seen."""

    death: int | str | None
    moments: list[str] = field(default_factory=list)
    looked: bool = False  # for what was saved
    found: tuple[int, int] | None = None  # the step that it went on after, and who had made it
    made: list[int] = field(default_factory=list)  # by whom each step's weights were made
    saved: int = -1  # the last step that it knows to be saved
    ended: str = ""


_life = threading.local()


def died_at(moment: str) -> None:
    life: Life = _life.of
    if life.death in (len(life.moments), moment):
        raise Killed(moment)
    life.moments.append(moment)


def live(folder: Path, ranks: Thread, life: Life, attempt: int) -> None:
    _life.of = life
    try:
        checkpoint = Checkpoint(folder, {"model": "the same"}, ranks)
        last = checkpoint.last()
        life.looked = True
        if last is not None:
            life.found = (last["step"], last["boundary"]["by"])
            life.made = [int(w["by"]) for w in checkpoint.weights(last["step"])]
        for step in range(0 if last is None else last["step"] + 1, STEPS):
            made = {"by": torch.tensor(attempt)}
            checkpoint.save(step, lambda: {"by": attempt}, [], made, step == STEPS - 1)
            life.saved = step
        life.ended = "done"
    except (Killed, DistributedError) as error:
        life.ended = type(error).__name__
    finally:
        ranks.meetings.die(ranks.rank)


def run(folder: Path, *deaths: int | str | None, attempt: int = 0) -> list[Life]:
    """Both ranks, until the moments of their deaths."""
    meetings, lives = Meetings(), [Life(death) for death in deaths]
    threads = [
        threading.Thread(target=live, args=(folder, Thread(None, rank, 2, meetings), life, attempt))
        for rank, life in enumerate(lives)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return lives


def consistent(lives: list[Life], saved: int) -> None:
    """Both went on after one step, which one attempt had made, and lost none that was saved."""
    first, second = lives
    assert first.found == second.found
    assert first.made == second.made
    step, by = first.found or (-1, None)
    assert step >= saved
    assert len(first.made) == step + 1
    assert step < 0 or first.made[-1] == by


def killed_and_gone_on(folder: Path, deaths: list[tuple[int | None, int | None]]) -> None:
    saved = -1
    for attempt, (first, second) in enumerate([*deaths, (None, None)]):
        lives = run(folder, first, second, attempt=attempt)
        if all(life.looked for life in lives):
            consistent(lives, saved)
        saved = max(saved, *(life.saved for life in lives))
    assert [life.ended for life in lives] == ["done", "done"]
    last = f"{STEPS - 1:06d}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fingerprint.json",
        *(f"state-{last}-rank{rank}.pt" for rank in (0, 1)),
        *(f"weights-{step:06d}.pt" for step in range(STEPS)),
    ]


@pytest.fixture
def clean(tmp_path: Path) -> list[list[str]]:
    """The moments of both ranks, of a run in which none dies."""
    folder = tmp_path / "clean"
    with moments(died_at, folder):
        lives = run(folder, None, None)
    assert [life.ended for life in lives] == ["done", "done"]
    return [life.moments for life in lives]


def test_a_rank_may_die_at_any_moment(clean: list[list[str]], tmp_path: Path) -> None:
    assert "unlink state-000001-rank1.pt" in clean[1]
    assert "half weights-000002.pt" in clean[0]
    for rank, known in enumerate(clean):
        for at in range(len(known)):
            folder = tmp_path / f"rank-{rank}-{at}"
            deaths = (at, None) if rank == 0 else (None, at)
            with moments(died_at, folder):
                killed_and_gone_on(folder, [deaths])


@pytest.mark.slow
def test_both_may_die_at_any_moments_again_and_again(
    clean: list[list[str]], tmp_path: Path
) -> None:
    choose = random.Random(0)
    for number in range(100):
        folder = tmp_path / f"{number}"
        deaths: list[tuple[int | None, int | None]] = []
        for _ in range(3):
            first, second = (choose.randrange(len(known)) for known in clean)
            deaths.append(choose.choice([(first, second), (first, None), (None, second)]))
        with moments(died_at, folder):
            killed_and_gone_on(folder, deaths)


def test_what_one_attempt_left_of_a_step_does_not_meet_what_another_makes(tmp_path: Path) -> None:
    """First the one, then the other dies before it has saved what its peer has."""
    with moments(died_at, tmp_path):
        run(tmp_path, "open state-000001-rank0.pt", None, attempt=0)
        saved = sorted(path.name for path in tmp_path.glob("state-*"))
        assert saved == [f"state-00000{name}.pt" for name in ("0-rank0", "0-rank1", "1-rank1")]
        lives = run(tmp_path, None, "open state-000001-rank1.pt", attempt=1)
        assert [life.ended for life in lives] == ["DistributedError", "Killed"]
        lives = run(tmp_path, None, None, attempt=2)
    assert [life.found for life in lives] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("fast", [0, 1])
def test_all_write_a_state_or_none_does(
    fast: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first one's clock, whatever those of the others say."""
    ticks, written = itertools.count(0, 100), list[str]()
    whole = Checkpoint._write

    def write(self: Checkpoint, name: str, *rest: Any, **more: Any) -> Path:
        written.append(name)
        return whole(self, name, *rest, **more)

    def clock() -> float:
        return float(next(ticks)) if _life.of.death == "fast" else 0.0

    monkeypatch.setattr(Checkpoint, "_write", write)
    monkeypatch.setattr("magr_fx.passes.rewriting.checkpoint.monotonic", clock)
    lives = run(tmp_path, *("fast" if rank == fast else None for rank in (0, 1)))
    assert [life.ended for life in lives] == ["done", "done"]
    steps = range(STEPS) if fast == 0 else [STEPS - 1]  # the last one always has its state
    wanted = [f"state-{step:06d}-rank{rank}.pt" for step in steps for rank in (0, 1)]
    assert sorted(name for name in written if name.startswith("state")) == wanted
    assert len(list(tmp_path.glob("weights-*"))) == STEPS


def test_a_file_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save(0, dict, [], {}, True)
    (tmp_path / "state-000000.pt").unlink()
    (tmp_path / "state-000000.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"state-000000.pt cannot be removed: .*resumes from"):
        checkpoint.save(1, dict, [], {}, True)


@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_ranks_is_refused(was: int, now: int, tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"model": "the same"}, Ranks(None, 0, was))
    wanted = rf"differs in: number of ranks \(was {was}, now {now}\); give another directory"
    with pytest.raises(CheckpointError, match=wanted):
        Checkpoint(tmp_path, {"model": "the same"}, Ranks(None, 0, now))


# Processes that are killed.

NEVER = "never"


def gptq_by_rows(**options: Any) -> Any:
    """With every gram's rows split over the ranks, which then meet within a solve."""
    return by_rows(partial(gptq, **options))


def until(deaths: tuple[str | int, str | int], folder: Path, way: Callable[..., Any]) -> None:
    """A run whose ranks are killed at their moments, by name (and count from 0) or by number."""
    known: list[str] = []

    def moment(name: str) -> None:
        if deaths[dist.get_rank()] in (name, f"{name} {known.count(name)}", len(known)):
            os.kill(os.getpid(), signal.SIGKILL)
        known.append(name)

    with moments(moment, folder):
        way(checkpoint_dir=folder)


def go_on(folder: Path, way: Callable[..., Any]) -> dict[str, Any]:
    """What a run that is taken up again makes, and one that was never killed; what it saves."""
    known: list[str] = []
    with moments(known.append, folder):
        made = outcome(way(checkpoint_dir=folder))["weights"]
    saved = [name for name in known if name.startswith("replace state")]
    return {"made": made, "saved": saved, "wanted": outcome(way())["weights"]}


def same_bits(found: dict[str, Any]) -> bool:
    made, wanted = found["made"], found["wanted"]
    return made.keys() == wanted.keys() and all(torch.equal(made[k], x) for k, x in wanted.items())


CHOSEN = random.Random(1)


@pytest.mark.parametrize(
    ("way", "deaths", "first"),
    [
        # One between the weights and its state of them; then both in the middle of a write.
        (
            for_target,
            [
                ("open state-000002-rank0.pt", NEVER),
                ("half weights-000004.pt", "half state-000004-rank1.pt"),
            ],
            4,
        ),
        # One in a solve of which the other has a part; then whoever comes to its moment first.
        (gptq_by_rows, [(NEVER, "solve 2"), (CHOSEN.randrange(60), CHOSEN.randrange(60))], None),
    ],
)
@pytest.mark.slow
def test_ranks_that_are_killed_go_on_to_the_same_bits(
    way: Callable[..., Any],
    deaths: list[tuple[str | int, str | int]],
    first: int | None,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoint"
    for pair in deaths:
        ended = on_ranks(2, until, tmp_path, pair, folder, way, patience=40, deadline=80)
        assert -signal.SIGKILL in [one.code for one in ended]
        for one, death in zip(ended, pair, strict=True):
            if one.code == 0:
                assert isinstance(one.error, DistributedError)
                assert "lost the others" in str(one.error)
                assert "checkpoint_dir" in str(one.error)
            else:
                assert (one.code, death != NEVER) == (-signal.SIGKILL, True)
    for rank, one in enumerate(on_ranks(2, go_on, tmp_path, folder, way)):
        assert (one.error, one.code) == (None, 0)
        assert same_bits(one.value)
        saved = one.value["saved"]
        assert 0 < len(saved) < 6
        steps = range(6 - len(saved) if first is None else first, 6)
        assert saved == [f"replace state-{step:06d}-rank{rank}.pt" for step in steps]


# Disks that fill up.

FULL = Path("/dev/full")
FILLS = (
    "fingerprint.json",
    "weights-000001.pt",
    "state-000002-rank0.pt",
    "state-000003-rank1.pt",
)


def on_a_full_disk(folder: Path, of_one_process: Path) -> dict[str, Any]:
    """What each rank raises where the disk of one is full; what was made when it had room again."""
    found: dict[str, Any] = {}
    for name in FILLS:
        place = folder / f"{name}.unfinished"
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            place.symlink_to(FULL)  # which takes nothing, as a disk without room
        dist.barrier()
        with pytest.MonkeyPatch.context() as patched:
            state_after_each_step(patched)
            found[name] = raised(lambda: for_target(checkpoint_dir=folder))
    model = chain()
    before = state(model)
    found["ranks"] = raised(lambda: for_target(model, checkpoint_dir=of_one_process))
    found["changed"] = changed(model, before)
    return {**found, **go_on(folder, for_target)}


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    for_target(checkpoint_dir=alone)
    folder = tmp_path / "checkpoint"
    for rank, ended in enumerate(on_ranks(2, on_a_full_disk, tmp_path, folder, alone)):
        assert (ended.error, ended.code) == (None, 0)
        found = ended.value
        for name in FILLS:
            kind, message = found[name]
            assert kind == "CheckpointError", message
            assert f"{folder / name} cannot be written" in message
            assert "No space left on device" in message
            assert "resumes from the last state" in message
        assert found["ranks"][0] == "CheckpointError"
        assert "number of ranks (was 1, now 2)" in found["ranks"][1]
        assert found["changed"] == []
        assert found["saved"] == [f"replace state-{step:06d}-rank{rank}.pt" for step in (3, 4, 5)]
        assert same_bits(found)
    assert not list(folder.glob("*.unfinished"))


def on_a_full_spill(folder: Path, spilled: Path) -> dict[str, Any]:
    """What each rank raises where the disk of one takes no more activations; then there is room."""
    own = spilled / f"{dist.get_rank()}"
    model = chain()
    before = state(model)
    known = 0

    def full(descriptor: int, offset: int, size: int) -> None:
        nonlocal known
        known += 1
        if known > 10:  # when some steps are saved
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, offset + size)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spill, "LEAST", 1)
        state_after_each_step(patched)
        if dist.get_rank() == 1:
            patched.setattr(os, "posix_fallocate", full)
        error = raised(lambda: for_target(model, checkpoint_dir=folder, spill_dir=own))
        patched.undo()
        patched.setattr(spill, "LEAST", 1)
        way = partial(for_target, spill_dir=own)
        done = go_on(folder, way)
    left = [path.name for path in own.iterdir()]
    return {**done, "error": error, "changed": changed(model, before), "left": left, "known": known}


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
@pytest.mark.slow
def test_activations_that_do_not_fit_on_one_rank_end_all_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    folder, spilled = tmp_path / "checkpoint", tmp_path / "spilled"
    ranks = on_ranks(2, on_a_full_spill, tmp_path, folder, spilled, patience=40, deadline=80)
    for ended in ranks:
        assert (ended.error, ended.code) == (None, 0)
        assert 0 < len(ended.value["saved"]) < 6  # some were saved before, and are not made again
        assert same_bits(ended.value)
    first, second = (ended.value for ended in ranks)
    assert first["error"] == second["error"]
    kind, message = first["error"]
    assert kind == "CheckpointError"
    assert f"activations cannot be written to {spilled / '1'}" in message
    assert "Free some space, or give another spill_dir" in message
    assert second["known"] == 11
    assert first["changed"] == second["changed"]  # by the same steps
    assert first["left"] == second["left"] == []
