"""What a run has done so far, on disk: after a crash the next one goes on from there.

After every step the weights that it rewrote are written. A state, that is the report's rows and the
values that later steps read, is much larger: it is written where :data:`BETWEEN_STATES` seconds
have gone by since the last one, and after the last step. A run goes on after its last state, and
does again what came later.

Each file is written under another name first, and what a state counts on is on the disk before the
state has its name. Of several ranks each writes what its own batches need, and the first one the
weights, which all have; a state counts once every rank has written it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from magr_fx.config import MagRConfig
from magr_fx.errors import CheckpointError
from magr_fx.machine.disk import BETWEEN_STATES, folder_named, fsync_path, save
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.ranks import ALONE, Ranks
from magr_fx.passes.graphs.torch_private import tree_leaves
from magr_fx.passes.graphs.trace import TracedBatch
from magr_fx.passes.graphs.unsupported_weights import shape_of, values_of
from magr_fx.passes.offloading.resident import Resident
from magr_fx.reporting.report import MagRReport, Quantization, SiteReport

_FINGERPRINT = "fingerprint.json"
# How many values of each weight tell one model from another.
_SAMPLE = 4096
_DEVICE_NUMBER = re.compile(r"(type='\w+'), index=\d+")
_NUMBER = "[0-9]" * 6
_ARRAYS = ("channel_max_before", "channel_max_after")


class Checkpoint:
    """The directory of one run.

    Args:
        folder: the directory; it is made if there is none.
        fingerprint: what must be the same for a run to be taken up again, see :func:`fingerprint`.
        ranks: those that share it; all have to see the same directory.

    Raises:
        CheckpointError: the directory belongs to another run, or cannot be written.
        ConfigError: ``folder`` is no name.

    Attributes:
        states, written: how many states this rank has written, and how many bytes in all, also
            before the run was cut short.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: dict[str, str], ranks: Ranks = ALONE
    ) -> None:
        self.folder, self._ranks = folder_named(folder, "checkpoint_dir"), ranks
        self.states = self.written = 0
        self._unsettled: list[Path] = []  # weights that no state counts on yet
        self._saved = monotonic()
        self._suffix = "" if ranks.world == 1 else f"-rank{ranks.rank}"
        if ranks.world > 1:  # each has kept the values of its own batches
            fingerprint = {**fingerprint, "number of ranks": str(ranks.world)}
        if ranks.rank == 0:
            known = self._known()
            if known is None:
                text = json.dumps(fingerprint, indent=1) + "\n"
                self._write(_FINGERPRINT, lambda file: file.write(text.encode()), settled=True)
        ranks.meet()
        known = self._known()
        if known is None:
            raise CheckpointError(
                f"checkpoint_dir {self.folder} is not the same directory on all ranks; give one "
                "that they share"
            )
        differing = [
            _difference(key, known.get(key, ""), fingerprint.get(key, ""))
            for key in {**fingerprint, **known}
            if known.get(key) != fingerprint.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint_dir {self.folder} belongs to another run, which differs in: "
                f"{', '.join(differing)}; give another directory, or empty this one to start anew"
            )

    @property
    def keeps_weights(self) -> bool:
        """Whether this rank is the one that writes the weights."""
        return self._ranks.rank == 0

    def last(self) -> dict[str, Any] | None:
        """What was saved last: ``step``, ``boundary`` and ``rows``; None in a new directory.

        Other states are removed, and weights of later steps: what is left of a step that not every
        rank had saved must not meet what another attempt makes of the same step.

        Raises:
            CheckpointError: a file is damaged, or cannot be removed.
        """
        own = {_step(path) for path in self._states()}
        whole = set.intersection(*self._ranks.gather(own))
        last = max(whole, default=-1)
        left = [path for path in self._states() if _step(path) != last]
        if self._ranks.rank == 0:
            left += [path for path in self._weights() if _step(path) > last]
        self._remove(left)
        self._ranks.meet()  # no rank begins a step of which another still has something
        if not whole:
            return None
        path = self.folder / self._state(last)
        state = _state(path)
        self.states, self.written = state.get("states", 0), state.get("written", 0)
        self.written += path.stat().st_size
        return state

    def weights(self, last: int) -> Iterator[dict[str, torch.Tensor]]:
        """The weights of each step up to the last one, by the names of their sites."""
        for path in self._weights():
            if _step(path) <= last:
                yield _load(path)

    def check_weights(self, last: int, rows: Iterable[SiteReport]) -> None:
        """Whether the weights of all sites that were rewritten are there, before any is written.

        Raises:
            CheckpointError: a file is missing, or damaged, or of something else.
        """
        missing = {row.name: tuple(row.shape) for row in rows if row.outcome == "rewritten"}
        for path in self._weights():
            if _step(path) <= last:
                weights = _load(path, mmap=True)  # values are read later
                for name, weight in weights.items() if isinstance(weights, dict) else ():
                    if missing.get(name) == tuple(getattr(weight, "shape", ())):
                        del missing[name]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks the weights of {len(missing)} sites that its last state "
                f"counts on, {next(iter(missing))} for one: a file weights-*.pt was removed or "
                "damaged; nothing was changed. Bring it back, or empty the directory to start anew"
            )

    def save(
        self,
        step: int,
        boundary: Callable[[], Any],
        rows: list[SiteReport],
        weights: dict[str, torch.Tensor],
        last: bool = False,
    ) -> None:
        """Write the weights of a step that is done, and a state where it is time for one.

        Args:
            step: its number.
            boundary: makes what the next step needs, see :func:`boundary`;
                called only for a state.
            rows: the report's, of all steps so far.
            weights: what this step made of its sites; needed where they are kept.
            last: whether no step follows, which makes it time.

        Raises:
            CheckpointError: it cannot be written; the last state is still there.
        """
        if weights and self.keeps_weights:
            name = f"weights-{step:06d}.pt"
            self._unsettled.append(self._write(name, lambda file: save(weights, file)))
        is_time = last or monotonic() - self._saved >= BETWEEN_STATES
        if not self._ranks.gather(is_time)[0]:  # by one clock: all write a state, or none does
            return
        self._settle()
        self.states += 1
        state = {
            "step": step,
            "boundary": boundary(),
            "rows": [_plain(row) for row in rows],
            "states": self.states,
            "written": self.written,
        }
        self._write(self._state(step), lambda file: save(state, file), settled=True)
        self._ranks.meet()  # all have written it: what came before is not needed any more
        self._remove(path for path in self._states() if _step(path) < step)
        self._saved = monotonic()

    def _state(self, step: int) -> str:
        return f"state-{step:06d}{self._suffix}.pt"

    def _states(self) -> list[Path]:
        return list(self.folder.glob(f"state-{_NUMBER}{self._suffix}.pt"))

    def _weights(self) -> list[Path]:
        return sorted(self.folder.glob(f"weights-{_NUMBER}.pt"))

    def _known(self) -> dict[str, str] | None:
        """The fingerprint of the run that the directory belongs to, if it belongs to one."""
        path = self.folder / _FINGERPRINT
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return None
            known: Any = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(known, dict) and all(isinstance(v, str) for v in known.values())):
                raise ValueError(f"{_FINGERPRINT} is damaged")
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"checkpoint_dir {self.folder} cannot be used: {error}; give another directory"
            ) from error
        return known

    def _write(self, name: str, write: Callable[[Any], Any], *, settled: bool = False) -> Path:
        """Write a file, which is whole once it has its name; ``settled``: and is on the disk."""
        path, unfinished = self.folder / name, self.folder / f"{name}.unfinished"
        with self._told(path):
            try:
                with unfinished.open("wb") as file:
                    write(file)
                    file.flush()
                    if settled:
                        os.fsync(file.fileno())
                    self.written += file.tell()
                unfinished.replace(path)
            except Exception:
                with contextlib.suppress(OSError):  # of a disk that takes nothing at all any more
                    unfinished.unlink()
                raise
            if settled:
                fsync_path(self.folder)  # before anything that counts on this file has its name
        return path

    def _settle(self) -> None:
        """Have the weights that were written since the last state on the disk."""
        for path in self._unsettled:
            with self._told(path), path.open("r+b") as file:
                os.fsync(file.fileno())
        if self._unsettled:
            with self._told(self.folder):
                fsync_path(self.folder)
        self._unsettled.clear()

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """What the disk does not take ends the run; all else that is raised is not about it."""
        try:
            yield
        except OSError as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{path} cannot be written: {error}. Free some space, or give another "
                "checkpoint_dir; a run with this one goes on from what was saved before"
            ) from error

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                path.unlink()
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be removed: {error}. Look after the disk; a run with this "
                    "checkpoint_dir goes on from what was saved"
                ) from error


def checkpoint_report(folder: Path) -> MagRReport:
    """The report of a run that is not finished: its sites so far.

    Raises:
        CheckpointError: the directory is damaged, or no run's.
    """
    states = sorted(folder.glob(f"state-{_NUMBER}*.pt"))  # of several ranks all have all rows
    rows = _state(states[-1])["rows"] if states else []
    try:
        known = json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8"))
        config = MagRConfig(**json.loads(known["configuration"])["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of a run: {error!r}") from error
    return MagRReport(config, sites=rows)


def _step(path: Path) -> int:
    """The number in the name of a state's or a step's weights' file."""
    return int(path.stem.split("-")[1])


def _state(path: Path) -> dict[str, Any]:
    state = _load(path)
    try:
        rows = [_row(plain) for plain in state["rows"]]
        return {**state, "rows": rows, "step": int(state["step"]), "boundary": state["boundary"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no state of a run: {error!r}; empty {path.parent} to start anew"
        ) from error


def _load(path: Path, *, mmap: bool = False) -> Any:
    try:
        return torch.load(path, weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a file raises that was damaged since
        if is_out_of_memory(error):  # no fault of the file
            raise
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}; empty {path.parent} to "
            "start anew"
        ) from error


def fingerprint(
    batches: Iterable[TracedBatch],
    weights: Iterable[tuple[str, torch.Tensor]],
    configuration: dict[str, Any],
    resident: Resident,
) -> dict[str, str]:
    """What tells one run from another: digests of the model, calibration, graphs, configuration.

    Args:
        batches: the calibration batches, each with its trace.
        weights: the model's parameters and buffers with their names.
        configuration: how to work, as JSON knows it.
        resident: has those weights in memory that are looked at.
    """
    batches = list(batches)
    model = hashlib.blake2b()
    for name, weight in weights:
        with resident([weight]):
            model.update(f"{name} {shape_of(weight)} {weight.dtype}".encode())
            for part in values_of(weight):
                values = part.detach().flatten()
                model.update(_bytes(values[:: max(1, values.numel() // _SAMPLE)]))
    calibration, graphs = hashlib.blake2b(), hashlib.blake2b()
    for batch in batches:
        for leaf in tree_leaves(batch.values):
            what = f"{leaf.shape} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
            calibration.update(what.encode())
            if isinstance(leaf, torch.Tensor):
                calibration.update(_bytes(leaf))
    for trace in dict.fromkeys(batch.trace for batch in batches):
        for node in trace.graph_module.graph.nodes:
            target = getattr(node.target, "__name__", node.target)
            what = f"{node.name} {target} {node.args} {node.kwargs}\n"
            # Each rank has a device of its own; which, is in the configuration.
            graphs.update(_DEVICE_NUMBER.sub(r"\1", what).encode())
    return {
        "model": model.hexdigest(),
        "calibration": calibration.hexdigest(),
        "graphs": graphs.hexdigest(),
        "configuration": json.dumps(configuration, sort_keys=True),
        "version of magr-fx": _version("magr-fx"),
        "version of torch": torch.__version__,
        "version of torchao": _version("torchao"),
    }


def _difference(key: str, was: str, now: str) -> str:
    """What differs, and how where that can be read."""
    if key == "number of ranks":  # which one process alone does not note
        return f"{key} (was {was or 1}, now {now or 1})"
    if key.startswith("version"):
        return f"{key} ({was}, now {now})"
    if key != "configuration":
        return key
    try:
        before, after = _flat(json.loads(was)), _flat(json.loads(now))
    except (ValueError, AttributeError):  # it is damaged
        return key
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    parts = [f"{n} was {before.get(n)}, now {after.get(n)}" for n in names]
    return f"{key} ({'; '.join(parts)})" if parts else key


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options in options by their own names; of lists, how long they are."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value)
        else:
            flat[name] = f"{len(value)} of them" if isinstance(value, list) else value
    return flat


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def _bytes(tensor: torch.Tensor) -> bytes:
    contiguous = tensor.detach().cpu().contiguous()
    raw = contiguous.view(-1).view(torch.uint8).numpy() if contiguous.numel() else np.empty(0)
    return raw.tobytes()


def _plain(row: SiteReport) -> dict[str, Any]:
    """A row as what torch.load takes without running code."""
    plain = asdict(row)
    for name in _ARRAYS:
        if plain[name] is not None:
            plain[name] = torch.from_numpy(plain[name])
    return plain


def _row(plain: dict[str, Any]) -> SiteReport:
    arrays = {name: plain[name].numpy() for name in _ARRAYS if plain[name] is not None}
    quantization = plain["quantization"] and Quantization(**plain["quantization"])
    return SiteReport(**{**plain, **arrays, "quantization": quantization})
