"""A job → its model found and checked, its calibration read, and a directory to work in.

All that can be checked is checked here, before anything is read or written at length.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torchao.core.config import AOBaseConfig
from transformers import AutoTokenizer

from magr_fx.config import MagRConfig
from magr_fx.directories.run_folder import is_ours, run_folder, run_of
from magr_fx.directories.skipped import check_skipped
from magr_fx.directories.write_directory import check_rest
from magr_fx.errors import CalibrationError, CheckpointError, ConfigError, ModelError, brief
from magr_fx.machine.disk import is_full
from magr_fx.machine.ranks import Ranks, distributed_session
from magr_fx.machine.safetensors_header import StoredTensor
from magr_fx.model_files.calibration_text import text_batches
from magr_fx.model_files.model_directory import (
    experts_of,
    find_model,
    read_config,
    read_directory,
    size_of,
    text_config,
)
from magr_fx.model_files.stored_model import check_stored, empty_model

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
        refine, propagate, spill_dir, progress: as for :func:`magr_fx.magr_quantize`.
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
    refine: int = 0
    propagate: bool | None = None
    spill_dir: Path | None = None
    progress: bool | None = None

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
    with (
        run_folder(job.out, ranks),
        distributed_session(ranks.group or False),
        _disk_errors_told(job),
    ):
        ranks.agree_on({"kind of device": job.device.type})
        source = _found(job.model, ranks)
        config = read_config(source)
        model = empty_model(source, config)
        check_length(config, model, job.length)
        tensors = read_directory(source)
        check_stored(model, source, tensors)
        check_skipped(model, job.skip, head=job.head, linears_only=quantized)
        check_rest(source)
        if ranks.rank == 0:
            _check_apart(job, source)
            copies = copies_of(config, quantized=quantized, ranks=ranks.world)
            _check_space(job, config, copies, sum(tensor.nbytes for tensor in tensors.values()))
        tokenizer = _tokenizer(source)
        calib = text_batches(tokenizer, job.text, tokens=job.tokens, length=job.length)
        _check_ids(model, tokenizer, calib, source)
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


def check_length(config: dict[str, Any], model: nn.Module, length: int) -> None:
    """Whether the model knows so many positions.

    Raises:
        ConfigError: windows are longer than that.
    """
    own = text_config(config)
    most = size_of(config, "max_position_embeddings", "n_positions", "max_seq_len")
    attention = own.get("attn_config")
    # ALiBi knows distances, not positions: of Falcon, and of MPT.
    alibi = own.get("alibi") or (isinstance(attention, dict) and attention.get("alibi"))
    for name, module in model.named_modules():
        positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if positions and most == module.num_embeddings and module.padding_idx is not None:
            most -= module.padding_idx + 1  # RoBERTa counts from behind its padding
            break
    if most is not None and length > most and not alibi:
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
    spill = job.spill_dir
    for place in (job.out, job.run):  # the one has to be empty in the end, the other goes
        if spill is not None and spill.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"--spill, {spill}, lies in {place}; name a directory outside of it")
    for what, folder in (("OUT", job.out), ("--spill", spill)):
        if folder is not None and folder.resolve().is_relative_to(source.resolve()):
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
    if job.run.is_dir() and any(job.run.iterdir()) and not is_ours(job.run):
        raise ConfigError(
            f"{job.run}, where a run for {job.out} would keep what is not finished, was not made "
            "by one; name another OUT"
        )


def _check_space(job: Job, config: dict[str, Any], copies: int, size: int) -> None:
    """Whether the disk has room for the weights and for what one block hands to the next."""
    widths = (size_of(config, name) or 0 for name in ("hidden_size", "intermediate_size"))
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
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises of what it does not find
        raise ModelError(
            f"{source} has no tokenizer that transformers can load ({brief(error)}); copy its "
            "tokenizer files there"
        ) from error


def _check_ids(model: Any, tokenizer: Any, calib: list[torch.Tensor], source: Path) -> None:
    """Whether the model's embedding has a row for each of the tokens.

    Raises:
        CalibrationError: it has not; the message names the token.
    """
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model that does not say which it is
        return
    rows, largest = getattr(embedding, "num_embeddings", None), max(int(b.max()) for b in calib)
    if rows is not None and largest >= rows:
        raise CalibrationError(
            f"the tokenizer of {source} makes the id {largest:,} of "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, and the model's embedding has "
            f"{rows:,} rows: they are of two models; copy the tokenizer files of this one there"
        )
