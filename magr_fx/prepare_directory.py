"""A job → its model found and checked, its calibration read, and a directory to work in.

All that can be checked is checked here, before anything is read or written at length.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torchao.core.config import AOBaseConfig
from transformers import AutoTokenizer

from magr_fx.calibration_text import text_batches
from magr_fx.config import MagRConfig
from magr_fx.disk import is_full
from magr_fx.errors import CheckpointError, ConfigError, ModelError
from magr_fx.model_directory import (
    StoredTensor,
    experts_of,
    find_model,
    read_config,
    read_directory,
)
from magr_fx.passes.ranks import Ranks, together
from magr_fx.run_folder import run_folder, run_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What to make of which model.

    Attributes:
        model: a directory with the safetensors of a model that reads text, or a name on the Hub.
        out: the directory to make; it may be there if it is empty.
        text: a text file to calibrate on.
        target: the torchao config that quantizes the model.
        tokens, length: how much of the text, and in windows of how many tokens.
        config: how to solve.
        skip: patterns (``*`` and ``?``) of the names of modules to leave alone.
        head: whether to rewrite what transformers does not quantize by default: the head.
        resume: whether to go on with a run for ``out`` that was cut short.
        device: where the model's blocks are run and solved.
        options: more of :func:`magr_fx.magr_transform` or :func:`magr_fx.magr_quantize`.
    """

    model: str
    out: Path
    text: Path
    target: AOBaseConfig | None
    tokens: int = 16_384
    length: int = 512
    config: MagRConfig | None = None
    skip: tuple[str, ...] = ()
    head: bool = False
    resume: bool = False
    device: torch.device = _CPU
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """Where the job keeps what is not finished: ``OUT.unfinished``."""
        return run_of(self.out)


@dataclass(frozen=True)
class Prepared:
    """A job that can begin: its model's directory, what that holds, and the calibration batches."""

    job: Job
    ranks: Ranks
    source: Path
    tensors: dict[str, StoredTensor]
    calib: list[torch.Tensor]

    @property
    def writes(self) -> bool:
        """Whether this rank is the one that writes what is made; the others only read."""
        return self.ranks.rank == 0


@contextlib.contextmanager
def prepared(job: Job, ranks: Ranks, *, quantized: bool) -> Iterator[Prepared]:
    """Check all that can be checked first; then the run's directory is ours, until the end.

    It stays, if the work is cut short, where there is something in it to go on from.

    Args:
        job: what to do.
        ranks: who does it together.
        quantized: whether a quantized model is made.

    Raises:
        MagRError: something is missing, damaged or too small.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("models are read with accelerate: pip install 'magr-fx[cli]'")
    # Inside, they end together: when the directory is removed, nobody works there any more.
    if ranks.rank == 0:
        _check_out(job)
    with run_folder(job.out, ranks), together(ranks.group or False), _disk_errors_told(job):
        ranks.agree_on({"kind of device": job.device.type})
        source = _found(job.model, ranks)
        config = read_config(source)
        check_length(config, job.length)
        tensors = read_directory(source)
        if ranks.rank == 0:
            _check_apart(job, source)
            copies = copies_of(config, quantized=quantized, ranks=ranks.world)
            _check_space(job, config, copies, sum(tensor.nbytes for tensor in tensors.values()))
        tokenizer = _tokenizer(source)
        calib = text_batches(tokenizer, job.text, tokens=job.tokens, length=job.length)
        yield Prepared(job, ranks, source, tensors, calib)


@contextlib.contextmanager
def _disk_errors_told(job: Job) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not is_full(error):
            raise CheckpointError(f"{error}. What was saved is still there") from error
        raise CheckpointError(
            f"{getattr(error, 'filename', None) or job.run} cannot be written: {error}. Free "
            "some space; what was saved is still there"
        ) from error


def _found(model: str, ranks: Ranks) -> Path:
    """The model's directory; one rank of each machine downloads it, the others find it then."""
    machines = ranks.gather(socket.gethostname())
    first = machines.index(machines[ranks.rank]) == ranks.rank
    source = find_model(model) if first else None
    ranks.meet()
    return find_model(model) if source is None else source


def check_length(config: dict[str, Any], length: int) -> None:
    """Whether the model knows so many positions.

    Raises:
        ConfigError: windows are longer than that.
    """
    own = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    most = next((own[name] for name in names if own.get(name)), None)
    # ALiBi knows distances, not positions: of Falcon, and of MPT.
    alibi = own.get("alibi") or (own.get("attn_config") or {}).get("alibi")
    if isinstance(most, int) and length > most and not alibi:
        raise ConfigError(
            f"windows of {length:,} tokens are longer than the {most:,} positions that the model "
            f"knows; give --length {most}, or less"
        )


def copies_of(config: dict[str, Any], *, quantized: bool, ranks: int = 1) -> int:
    """How many copies of the weights the disk needs room for, beside the model, at most.

    What is saved to go on from and the result; of a quantized model what it is made of as well; and
    what transformers fuses it writes anew, for each rank.
    """
    return 2 + quantized + ranks * (experts_of(config) is not None)


def _check_apart(job: Job, source: Path) -> None:
    """Nothing may be written into the model's own directory, all of which is copied."""
    for what, folder in (("OUT", job.out), ("--spill", job.options.get("spill_dir"))):
        if folder is not None and Path(folder).resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{what}, {folder}, lies in the model's directory; name one outside of {source}"
            )


def _check_out(job: Job) -> None:
    if not job.out.name:
        raise ConfigError(f"OUT, {job.out}, has no name; name a directory to make")
    if job.out.exists() and not (job.out.is_dir() and not any(job.out.iterdir())):
        raise ConfigError(f"{job.out} is there and is not empty; name another directory for OUT")
    if job.run.exists() and not job.resume:
        raise ConfigError(
            f"{job.run} is of a run that was cut short: add --resume to go on with it, or remove "
            "it to start anew"
        )


def _check_space(job: Job, config: dict[str, Any], copies: int, size: int) -> None:
    """Whether the disk has room for the weights and for what one block hands to the next."""
    text = config.get("text_config") or config
    widths = (text.get(name) or 0 for name in ("hidden_size", "intermediate_size"))
    # Of the original and of the quantized model, in float32; the last state and the next one.
    activations = 4 * 2 * 2 * job.tokens * sum(widths)
    needed = copies * size + activations
    existing = next(folder for folder in job.out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if job.resume:  # some of it is written already
        free += sum(path.stat().st_size for path in job.run.rglob("*") if path.is_file())
    if free < needed:
        raise ConfigError(
            f"{existing} has {free / 1e9:.1f} GB of free disk, and up to {needed / 1e9:.1f} GB are "
            f"needed: {copies} times the weights, and activations. Free some, or name an OUT on "
            "another disk"
        )


def _tokenizer(source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever transformers raises of what it does not find
        raise ModelError(
            f"{source} has no tokenizer that transformers can load ({brief(error)}); copy its "
            "tokenizer files there"
        ) from error


def brief(error: Exception) -> str:
    """The kind and the first line of an error of another library."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
