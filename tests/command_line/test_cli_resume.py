"""Runs of the command line that are cut short: killed, interrupted, out of disk."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, contents, done, run, tensors
from crash_helpers import state_after_each_step
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama

from magr_fx.directories.convert_directory import report_of
from magr_fx.directories.run_folder import is_resumable
from magr_fx.directories.write_directory import publish
from magr_fx.passes.rewriting.checkpoint import Checkpoint
from magr_fx.reporting.report_files import read_report


@pytest.fixture(autouse=True)
def _state_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    state_after_each_step(monkeypatch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and what a run that nobody disturbs makes of them."""
    folder = tmp_path_factory.mktemp("reference")
    save_model(folder / "model", tiny_llama(), max_shard_size="40KB")
    save_text(folder / "text.txt")
    done(*command(folder, folder / "wanted", "--log-json", folder / "log.jsonl"))
    assert len(logged(folder / "log.jsonl")) == 8
    return folder


def command(folder: Path, out: Path, *more: Any) -> list[Any]:
    text = ("--calib", folder / "text.txt")
    return ["transform", folder / "model", out, *text, *INT3, *SMALL, *more]


def logged(log: Path) -> list[tuple[int, list[str]]]:
    """The blocks that a run has logged: their numbers, and the names of their sites."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(r["number"], [site["name"] for site in r["sites"]]) for r in records]


def after_steps(steps: int, what: BaseException, patched: pytest.MonkeyPatch) -> None:
    whole = Checkpoint.save

    def save(self: Checkpoint, step: int, *rest: Any) -> None:
        if step == steps:
            raise what
        whole(self, step, *rest)

    patched.setattr(Checkpoint, "save", save)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    with monkeypatch.context() as patched:
        after_steps(5, KeyboardInterrupt(), patched)
        result = run(*command(reference, out, "--log-json", log))
    assert result.exit_code == 130
    assert result.stderr == (
        "magr-fx: interrupted; the same command with --resume continues from the last saved state\n"
    )
    assert not out.exists()
    # What is done so far can be looked at, by either name.
    table = done("report", out).output
    assert table == done("report", f"{out}.unfinished").output
    rows = re.findall(r"^model\.layers\.0\.\S+", table, re.MULTILINE)
    assert len(rows) >= 4
    again = run(*command(reference, out))
    assert (again.exit_code, "add --resume" in again.stderr) == (2, True)
    done(*command(reference, out, "--resume", "--log-json", log))
    assert contents(out) == contents(reference / "wanted")
    assert not Path(f"{out}.unfinished").exists()
    assert logged(log) == logged(reference / "log.jsonl")


@pytest.mark.parametrize(("line", "torn"), [(0, 0), (4, 100)])
@pytest.mark.slow
def test_a_block_that_was_logged_and_not_saved_is_logged_once(
    line: int, torn: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill between the two leaves it, the last bytes of the line written or not."""
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    wanted = logged(reference / "log.jsonl")
    with monkeypatch.context() as patched:
        after_steps(wanted[line][0] - 1, KeyboardInterrupt(), patched)
        run(*command(reference, out, "--log-json", log))
    assert logged(log) == wanted[: line + 1]  # the last of a step that is not saved
    written = log.read_bytes()
    log.write_bytes(written[: len(written) - torn])
    done(*command(reference, out, "--resume", "--log-json", log))
    assert logged(log) == wanted


@pytest.mark.slow
def test_ctrl_c_before_anything_is_done_leaves_nothing(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_steps(0, KeyboardInterrupt(), monkeypatch)
    result = run(*command(reference, tmp_path / "out"))
    assert (result.exit_code, result.stderr) == (130, "magr-fx: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_configuration_is_refused_with_what_differs(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        after_steps(4, KeyboardInterrupt(), patched)
        run(*command(reference, out))
    before = contents(tmp_path)
    other = ("--damping", "0.2", "--target", "int4-per-channel", "--tokens", "64")
    result = run(*command(reference, out, "--resume", *other))
    assert result.exit_code == 2
    assert "belongs to another run, which differs in: calibration, configuration (" in result.stderr
    assert "damping was None, now 0.2" in result.stderr
    assert re.search(r"target was .*int3.*, now .*int4", result.stderr)
    saved = {n: c for n, c in contents(tmp_path).items() if "checkpoint" in n}
    assert saved == {n: c for n, c in before.items() if "checkpoint" in n}


@pytest.mark.slow
def test_what_is_finished_is_in_its_shard(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only at the end: each block's weights are in OUT's shards, and nowhere else but saved."""
    out, run_folder = tmp_path / "out", tmp_path / "out.unfinished"
    with monkeypatch.context() as patched:
        after_steps(5, KeyboardInterrupt(), patched)
        assert run(*command(reference, out)).exit_code == 130
    rewritten = [row.name for row in report_of(run_folder).rewritten]
    assert 0 < len(rewritten) < 14
    before, wanted = tensors(reference / "model"), tensors(reference / "wanted")
    now = tensors(run_folder / "rewritten")
    assert now.keys() == wanted.keys()
    assert all(torch.equal(now[name], wanted[name]) for name in rewritten)
    assert not any(torch.equal(before[name], wanted[name]) for name in rewritten)
    assert not any(run_folder.rglob("*.dat"))
    done(*command(reference, out, "--resume"))
    assert contents(out) == contents(reference / "wanted")


def test_a_run_that_was_cut_short_after_its_end(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is whole, and what was needed for it is still there: nothing is done again."""
    out = tmp_path / "out"

    def cut_short(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def published(folder: Path, out: Path) -> None:
        publish(folder, out)
        patched.setattr("magr_fx.directories.convert_directory.shutil.rmtree", cut_short)

    with monkeypatch.context() as patched:
        patched.setattr("magr_fx.directories.convert_directory.publish", published)
        assert run(*command(reference, out)).exit_code == 130
    assert contents(out) == contents(reference / "wanted")
    assert is_resumable(out)
    assert str(report_of(out)) == str(read_report(out))
    result = done(*command(reference, out, "--resume"))
    assert "14 rewritten" in result.output
    assert not (tmp_path / "out.unfinished").exists()
    assert contents(out) == contents(reference / "wanted")


@pytest.mark.slow
def test_gptq_goes_on_where_it_was(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quantize", *command(reference, tmp_path / "out")[1:], "--rounding", "gptq"]
    done(*arguments[:2], tmp_path / "whole", *arguments[3:])
    with monkeypatch.context() as patched:
        after_steps(5, KeyboardInterrupt(), patched)
        assert run(*arguments).exit_code == 130
    rounded = tmp_path / "out.unfinished" / "rounded"
    assert 0 < len(list(rounded.iterdir())) < 14
    done(*arguments, "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# What a full disk leaves.


def limit_files(size: int) -> Callable[[], None]:
    """No file may grow beyond so many bytes: the system itself then fails to write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "saved"), [(300, False), (70_000, True)])
@pytest.mark.slow_unless("300-False")
def test_what_cannot_be_written_is_no_file(
    size: int, saved: bool, reference: Path, tmp_path: Path
) -> None:
    """300 bytes are too few for the shards, 70,000 enough, but not for what a later block reads."""
    out = tmp_path / "out"
    lifted = limit_files(size)
    try:
        result = run(*command(reference, out))
    finally:
        lifted()
    assert result.exit_code == 2, result.output
    assert re.match(r"magr-fx: error: .*cannot be written: .*[Ff]ree some space", result.stderr)
    assert saved or os.strerror(errno.EFBIG) in result.stderr  # torch has words of its own
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()
    assert is_resumable(out) == saved
    assert ("--resume continues" in result.stderr) == saved
    done(*command(reference, out, "--resume"))
    assert contents(out) == contents(reference / "wanted")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_on_the_way(
    reference: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny_disk / "out"
    monkeypatch.setattr("magr_fx.directories.prepare_directory._check_space", lambda *_: None)
    filler = tiny_disk / "filler"
    filler.write_bytes(bytes(450_000))
    result = run(*command(reference, out))
    assert result.exit_code == 2, result.output
    assert os.strerror(errno.ENOSPC) in result.stderr or "No space" in result.stderr
    assert not out.exists()
    filler.unlink()
    done(*command(reference, out, "--resume"))
    assert contents(out) == contents(reference / "wanted")


# SIGKILL: a process that is forked off one where everything is imported, at calls drawn by a seed.
# A call, not a time: the library's own calls are the same however fast and busy the machine is.

KILLED = """
import os, random, signal, sys
sys.path[:0] = {path!r}
from click.testing import CliRunner
from magr_fx.command_line.cli import magr_fx as commands
import magr_fx.directories.convert_directory, magr_fx.passes
import transformers.models.llama.modeling_llama
magr_fx.passes.rewriting.checkpoint.BETWEEN_STATES = {between}

arguments, kills, calls = {arguments!r}, 0, 0
library = tuple(os.path.dirname(module.__file__) + os.sep for module in (magr_fx, magr_fx.passes))

def count(last):
    def called(frame, event, function):
        global calls
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(library):
            return
        calls += 1
        if calls == last:
            place = "%s:%d" % (os.path.basename(frame.f_code.co_filename), frame.f_lineno)
            print("killed at call", last, "of", needed, place, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return called

sys.setprofile(count(0))
first = CliRunner().invoke(commands, [*arguments, {first!r}])
sys.setprofile(None)
assert not first.exit_code, first.output
needed, chance = calls, random.Random({seed})
assert needed > 1000, needed
while True:
    last = 0 if kills == {kills} else chance.randint(1, needed)
    child = os.fork()
    if child == 0:
        calls = 0
        sys.setprofile(count(last))
        commands([*arguments, {out!r}, "--resume", "--log-json", {log!r}])
    _, status = os.waitpid(child, 0)
    if status == 0:
        sys.exit(0 if kills else "nothing was killed")
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        sys.exit("the run failed: " + str(status))
    kills += 1
    if os.path.exists({out!r}):
        print("OUT is there", flush=True)
        sys.exit(0)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.slow
def test_killed_at_any_call_it_comes_to_the_same_bits(
    reference: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "out"
    options = ["--calib", str(reference / "text.txt"), *INT3, *SMALL]
    script = KILLED.format(
        path=sys.path,
        arguments=["transform", str(reference / "model"), *options],
        first=str(tmp_path / "first"),
        out=str(out),
        log=str(tmp_path / "log.jsonl"),
        seed=seed,
        kills=6,
        between=0,
    )
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    }
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    print(f"--seed {seed}\n{ran.stdout}{ran.stderr}")  # noqa: T201 - pytest shows it with a failure
    assert ran.returncode == 0
    assert "killed at call" in ran.stderr
    wanted = contents(tmp_path / "first")  # by one thread too
    assert contents(out) == wanted
    assert logged(tmp_path / "log.jsonl") == logged(reference / "log.jsonl")
    assert not Path(f"{out}.unfinished").exists() or "is there" in ran.stdout
