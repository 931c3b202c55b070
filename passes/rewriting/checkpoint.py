"""The results of a run on disk, from which it is resumed after a crash.

The weights that a step rewrites are written after that step. A state holds the report's rows, and
the activations and other values that later steps need. It is much larger, so it is written once
:data:`BETWEEN_STATES` seconds have passed since the last state, and after the last step. A run is
resumed from its last state, and repeats the steps after it.

Each file is first written under another name. A state gets its name only when all files that it
refers to are on the disk. With several ranks, each writes the activations of its own batches, and
rank 0 also writes the weights, which are the same on all. A state counts once every rank has
written it.
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
# How many values of each weight go into the fingerprint of a model.
_SAMPLE = 4096
_DEVICE_NUMBER = re.compile(r"(type='\w+'), index=\d+")
_NUMBER = "[0-9]" * 6
_ARRAYS = ("channel_max_before", "channel_max_after")


class Checkpoint:
    """The directory of one run.

    Args:
        folder: the directory; it is created if it does not exist.
        fingerprint: of the run, see :func:`fingerprint`; only a run with the same one is resumed.
        ranks: the ranks that work together; all have to see the same directory.

    Raises:
        CheckpointError: the directory belongs to another run, or cannot be written.
        ConfigError: ``folder`` is not a path.

    Attributes:
        states, written: how many states, and how many bytes in all, this rank has written,
            including those before an interruption.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: dict[str, str], ranks: Ranks = ALONE
    ) -> None:
        self.folder, self._ranks = folder_named(folder, "checkpoint_dir"), ranks
        self.states = self.written = 0
        self._unsynced: list[Path] = []  # files of weights that no state refers to yet
        self._saved = monotonic()
        self._suffix = "" if ranks.world == 1 else f"-rank{ranks.rank}"
        if ranks.world > 1:  # a state has the activations of the rank's own batches
            fingerprint = {**fingerprint, "number of ranks": str(ranks.world)}
        if ranks.rank == 0:
            known = self._known()
            if known is None:
                text = json.dumps(fingerprint, indent=1) + "\n"
                self._write(_FINGERPRINT, lambda file: file.write(text.encode()), sync=True)
        ranks.meet()
        known = self._known()
        if known is None:
            raise CheckpointError(
                f"checkpoint_dir {self.folder} is not the same directory on all ranks; give a "
                "directory that they share"
            )
        differing = [
            _difference(key, known.get(key, ""), fingerprint.get(key, ""))
            for key in {**fingerprint, **known}
            if known.get(key) != fingerprint.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint_dir {self.folder} belongs to another run, which differs in: "
                f"{', '.join(differing)}; give another directory, or empty this one to start again"
            )

    @property
    def keeps_weights(self) -> bool:
        """Whether this rank writes the weights."""
        return self._ranks.rank == 0

    def last(self) -> dict[str, Any] | None:
        """The last state: ``step``, ``boundary`` and ``rows``; None in a new directory.

        Other states, and weights of later steps, are removed: files of a step that not every rank
        has saved must not be mixed with those of a second attempt at that step.

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
        self._ranks.meet()  # no rank continues before all have removed their files
        if not whole:
            return None
        path = self.folder / self._state(last)
        state = _state(path)
        self.states, self.written = state.get("states", 0), state.get("written", 0)
        self.written += path.stat().st_size
        return state

    def weights(self, last: int) -> Iterator[dict[str, torch.Tensor]]:
        """The weights of each step up to number ``last``, by the names of their sites."""
        for path in self._weights():
            if _step(path) <= last:
                yield _load(path)

    def check_weights(self, last: int, rows: Iterable[SiteReport]) -> None:
        """Check, before any weight is written, that those of all rewritten sites are there.

        Raises:
            CheckpointError: a file is missing or damaged, or is not a file of this run.
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
                f"refers to, such as {next(iter(missing))}: a file weights-*.pt was removed or "
                "damaged; nothing was changed. Restore it, or empty the directory to start again"
            )

    def save(
        self,
        step: int,
        boundary: Callable[[], Any],
        rows: list[SiteReport],
        weights: dict[str, torch.Tensor],
        last: bool = False,
    ) -> None:
        """Write the weights of a step that is done, and a state if one is due.

        Args:
            step: its number.
            boundary: returns the activations that the next step reads; called only for a state.
            rows: the report's rows of all steps so far.
            weights: name of a site → its weight, or with GPTQ its tensor; needed on rank 0 only.
            last: whether no step follows; a state is then due.

        Raises:
            CheckpointError: a file cannot be written; the last state is still there.
        """
        if weights and self.keeps_weights:
            name = f"weights-{step:06d}.pt"
            self._unsynced.append(self._write(name, lambda file: save(weights, file)))
        is_time = last or monotonic() - self._saved >= BETWEEN_STATES
        if not self._ranks.gather(is_time)[0]:  # by the first rank's clock, so that all agree
            return
        self._sync_weights()
        self.states += 1
        state = {
            "step": step,
            "boundary": boundary(),
            "rows": [_plain(row) for row in rows],
            "states": self.states,
            "written": self.written,
        }
        self._write(self._state(step), lambda file: save(state, file), sync=True)
        self._ranks.meet()  # all ranks have written it, so earlier states can go
        self._remove(path for path in self._states() if _step(path) < step)
        self._saved = monotonic()

    def _state(self, step: int) -> str:
        return f"state-{step:06d}{self._suffix}.pt"

    def _states(self) -> list[Path]:
        return list(self.folder.glob(f"state-{_NUMBER}{self._suffix}.pt"))

    def _weights(self) -> list[Path]:
        return sorted(self.folder.glob(f"weights-{_NUMBER}.pt"))

    def _known(self) -> dict[str, str] | None:
        """The fingerprint of the run that the directory belongs to, or None."""
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

    def _write(self, name: str, write: Callable[[Any], Any], *, sync: bool = False) -> Path:
        """Write a file, and rename it once it is complete; ``sync`` also syncs it to the disk."""
        path, unfinished = self.folder / name, self.folder / f"{name}.unfinished"
        with self._disk_errors(path):
            try:
                with unfinished.open("wb") as file:
                    write(file)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
                    self.written += file.tell()
                unfinished.replace(path)
            except Exception:
                with contextlib.suppress(OSError):  # the disk may refuse this as well
                    unfinished.unlink()
                raise
            if sync:
                fsync_path(self.folder)  # before a file that refers to this one gets its name
        return path

    def _sync_weights(self) -> None:
        """Sync the weights that were written since the last state to the disk."""
        for path in self._unsynced:
            with self._disk_errors(path), path.open("r+b") as file:
                os.fsync(file.fileno())
        if self._unsynced:
            with self._disk_errors(self.folder):
                fsync_path(self.folder)
        self._unsynced.clear()

    @contextlib.contextmanager
    def _disk_errors(self, path: Path) -> Iterator[None]:
        """Turn an OSError into a CheckpointError with a remedy; other errors pass."""
        try:
            yield
        except OSError as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{path} cannot be written: {error}. Free some space, or give another "
                "checkpoint_dir; a run with this one resumes from the last state"
            ) from error

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                path.unlink()
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be removed: {error}. Check the disk; a run with this "
                    "checkpoint_dir resumes from the last state"
                ) from error


def checkpoint_report(folder: Path) -> MagRReport:
    """The report of an unfinished run: the sites that are done.

    Raises:
        CheckpointError: the directory is damaged, or does not belong to a run.
    """
    states = sorted(folder.glob(f"state-{_NUMBER}*.pt"))  # each rank has all rows
    rows = _state(states[-1])["rows"] if states else []
    try:
        known = json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8"))
        config = MagRConfig(**json.loads(known["configuration"])["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of a run: {error!r}") from error
    return MagRReport(config, sites=rows)


def _step(path: Path) -> int:
    """The number of the step in the name of a file."""
    return int(path.stem.split("-")[1])


def _state(path: Path) -> dict[str, Any]:
    state = _load(path)
    try:
        rows = [_row(plain) for plain in state["rows"]]
        return {**state, "rows": rows, "step": int(state["step"]), "boundary": state["boundary"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a state of a run: {error!r}; empty {path.parent} to start again"
        ) from error


def _load(path: Path, *, mmap: bool = False) -> Any:
    try:
        return torch.load(path, weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can raise anything
        if is_out_of_memory(error):  # not the file's fault
            raise
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}; empty {path.parent} to "
            "start again"
        ) from error


def fingerprint(
    batches: Iterable[TracedBatch],
    weights: Iterable[tuple[str, torch.Tensor]],
    configuration: dict[str, Any],
    resident: Resident,
) -> dict[str, str]:
    """Digests of the model, the calibration, the graphs and the configuration of a run.

    Args:
        batches: the calibration batches, each with its trace.
        weights: the model's parameters and buffers with their names.
        configuration: the options, as JSON values.
        resident: loads weights that are offloaded.
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
            # The device's number differs between ranks; the configuration has the devices.
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
    """What differs between two fingerprints, as text."""
    if key == "number of ranks":  # a single process does not store it
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
    """Nested options by their own names; of a list, only its length."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value)
        else:
            flat[name] = f"a list of {len(value)}" if isinstance(value, list) else value
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
    """A row as plain values and tensors, which torch.load reads with weights_only."""
    plain = asdict(row)
    for name in _ARRAYS:
        if plain[name] is not None:
            plain[name] = torch.from_numpy(plain[name])
    return plain


def _row(plain: dict[str, Any]) -> SiteReport:
    arrays = {name: plain[name].numpy() for name in _ARRAYS if plain[name] is not None}
    quantization = plain["quantization"] and Quantization(**plain["quantization"])
    return SiteReport(**{**plain, **arrays, "quantization": quantization})
