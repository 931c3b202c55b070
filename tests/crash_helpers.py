"""Where a run may die: named moments in its solves, its meetings, and the writes of its steps."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from magr_fx.machine.ranks import Ranks
from magr_fx.passes.rewriting import checkpoint, solve_sites


def state_after_each_step(patched: pytest.MonkeyPatch) -> None:
    """Let a run write a state after each step, however little time has gone by."""
    patched.setattr(checkpoint, "BETWEEN_STATES", 0)


@contextlib.contextmanager
def moments(moment: Callable[[str], None], folder: Path) -> Iterator[None]:
    """Call ``moment`` with a name before each thing that is done to files in a folder, and others.

    These are "open", "half" (of it is written), "replace" and "unlink" with a file's name, "fsync",
    "meet" and "met" (before and after the ranks meet), and "solve". Nothing is really synced: what
    a killed process wrote, the system has. Each step has its state.
    """
    whole_open, whole_replace, whole_unlink = Path.open, Path.replace, Path.unlink
    whole_save, whole_meet = torch.save, Ranks.meet

    def open_(self: Path, *args: Any, **options: Any) -> Any:
        if self.parent == folder and "wb" in args:
            moment(f"open {self.name.removesuffix('.unfinished')}")
        return whole_open(self, *args, **options)

    def save(value: Any, file: Any, *args: Any, **options: Any) -> None:
        name = Path(str(getattr(file, "name", "")))
        if name.parent != folder:
            whole_save(value, file, *args, **options)
            return
        buffer = io.BytesIO()
        whole_save(value, buffer, *args, **options)
        raw = buffer.getvalue()
        file.write(raw[: len(raw) // 2])
        file.flush()
        moment(f"half {name.name.removesuffix('.unfinished')}")
        file.write(raw[len(raw) // 2 :])

    def replace(self: Path, target: Any) -> Any:
        if self.parent == folder:
            moment(f"replace {Path(target).name}")
        return whole_replace(self, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.parent == folder:
            moment(f"unlink {self.name}")
        whole_unlink(self, missing_ok)

    def meet(self: Ranks, error: Exception | None = None) -> None:
        moment("meet")
        whole_meet(self, error)
        moment("met")

    def before_solving(whole: Callable[..., Any]) -> Callable[..., Any]:
        def solve(*args: Any, **options: Any) -> Any:
            moment("solve")
            return whole(*args, **options)

        return solve

    with pytest.MonkeyPatch.context() as patched:
        state_after_each_step(patched)
        patched.setattr(Path, "open", open_)
        patched.setattr(Path, "replace", replace)
        patched.setattr(Path, "unlink", unlink)
        patched.setattr(torch, "save", save)
        patched.setattr(os, "fsync", lambda _: moment("fsync"))
        patched.setattr(Ranks, "meet", meet)
        for name in ("quantized_weights", "solve_magr"):
            patched.setattr(solve_sites, name, before_solving(getattr(solve_sites, name)))
        yield


def recorded_syncs(folder: Path, patched: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed from now on: "sync" and "replace", with a name.

    Args:
        folder: it, and what is in it, is known by name.
        patched: undoes it.
    """
    events: list[str] = []
    whole_fsync, whole_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        known = {path.stat().st_ino: path.name for path in (folder, *folder.rglob("*"))}
        events.append(f"sync {known[os.fstat(descriptor).st_ino]}")
        whole_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        events.append(f"replace {Path(target).name}")
        whole_replace(source, target)

    patched.setattr(os, "fsync", fsync)
    patched.setattr(os, "replace", replace)
    return events
