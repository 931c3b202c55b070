"""Prepare a job: find and check its model, read its calibration text, make its folder.

Everything that can be checked is checked here, before the run reads or writes any weight.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torchao.core.config import AOBaseConfig
from transformers import AutoTokenizer

from magr_fx.config import MagRConfig
from magr_fx.directories.run_folder import is_run_folder, run_folder, run_of
from magr_fx.directories.skipped import check_skipped
from magr_fx.directories.write_directory import check_rest
from magr_fx.errors import CalibrationError, CheckpointError, ConfigError, ModelError, brief
from magr_fx.machine.disk import is_full
from magr_fx.machine.ranks import Ranks, distributed_session
from magr_fx.machine.safetensors_header import StoredTensor
from magr_fx.model_files.calibration_text import calibration_batches
from magr_fx.model_files.model_directory import (
    experts_of,
    find_model,
    read_config,
    read_directory,
    size_of,
    text_config,
)
from magr_fx.model_files.stored_model import check_stored, empty_model
from magr_fx.passes.budgeting.budget import Budget
from magr_fx.passes.handover.to_compressed_tensors import check_format, check_installed

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What to convert, and how.

    Attributes:
        model: a directory with the safetensors of a model that reads text, or a name on the Hub.
        out: the directory to write; it must be empty or not exist.
        text: a UTF-8 text file to calibrate on.
        target: the torchao config that will quantize the weights, or what they may take.
        tokens: the number of calibration tokens.
        length: the number of tokens in each window.
        config: the solver's options.
        skip: patterns (``*`` and ``?``) of the names of modules to leave unchanged.
        head: whether to rewrite the head too, which transformers does not quantize by default.
        resume: whether to continue an interrupted run for ``out``, if there is one.
        device: where the model's blocks are run and solved.
        format: of a quantized model: "torchao", or "compressed-tensors".
        refine, propagate, spill_dir, progress: as for :func:`magr_fx.magr_quantize`.
    """

    model: str
    out: Path
    text: Path
    target: AOBaseConfig | Budget | None
    tokens: int = 16_384
    length: int = 512
    config: MagRConfig | None = None
    skip: tuple[str, ...] = ()
    head: bool = False
    resume: bool = False
    device: torch.device = _CPU
    format: str = "torchao"
    refine: int = 0
    propagate: bool | None = None
    spill_dir: Path | None = None
    progress: bool | None = None

    @property
    def solving(self) -> MagRConfig:
        """``config``, or the default one, with whole zero points where the format has no others."""
        config = self.config or MagRConfig()
        if self.format == "compressed-tensors" and config.zero_point is None:
            return replace(config, zero_point="whole")
        return config

    @property
    def run(self) -> Path:
        """The folder of the unfinished run: ``OUT.unfinished``."""
        return run_of(self.out)


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run.

    Attributes:
        job: the job.
        ranks: the ranks that share the work.
        source: the model's directory.
        tensors: its stored tensors, by name.
        calib: batches of token ids.
    """

    job: Job
    ranks: Ranks
    source: Path
    tensors: dict[str, StoredTensor]
    calib: list[torch.Tensor]

    @property
    def writes(self) -> bool:
        """Whether this is rank 0, which writes the result; the other ranks only read."""
        return self.ranks.rank == 0


@contextlib.contextmanager
def prepared(job: Job, ranks: Ranks, *, quantized: bool) -> Iterator[Prepared]:
    """Check the job and its inputs, and hold the lock on its ``OUT.unfinished`` until the end.

    If the work is interrupted, that folder is kept if there is a state to resume from.

    Args:
        job: the job.
        ranks: the ranks that share the work.
        quantized: whether the result is a quantized model.

    Raises:
        MagRError: an input is missing, damaged or too small.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            "accelerate, which reads models from disk, is not installed: pip install 'magr-fx[cli]'"
        )
    if job.format == "compressed-tensors":
        check_installed()
        budget = job.target if isinstance(job.target, Budget) else None
        for target in [job.target] if budget is None else budget.choices:
            check_format(target)
    # The inner session makes the ranks end together, so that no rank still uses the run's folder
    # when run_folder removes it.
    if ranks.rank == 0:
        _check_out(job)
    with (
        run_folder(job.out, ranks),
        distributed_session(ranks.group or False),
        _disk_errors_explained(job),
    ):
        ranks.agree_on({"kind of device": job.device.type})
        source = _find_model_once(job.model, ranks)
        config = read_config(source)
        model = empty_model(source, config)
        check_length(config, model, job.length)
        tensors = read_directory(source)
        check_stored(model, source, tensors)
        check_skipped(model, job.skip, head=job.head, linears_only=quantized)
        check_rest(source)
        if ranks.rank == 0:
            _check_outside_model(job, source)
            copies = copies_of(config, quantized=quantized, ranks=ranks.world)
            _check_space(job, config, copies, sum(tensor.nbytes for tensor in tensors.values()))
        tokenizer = _tokenizer(source)
        calib = calibration_batches(tokenizer, job.text, tokens=job.tokens, length=job.length)
        _check_ids(model, tokenizer, calib, source)
        yield Prepared(job, ranks, source, tensors, calib)


@contextlib.contextmanager
def _disk_errors_explained(job: Job) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not is_full(error):
            raise CheckpointError(f"{error}. The states saved so far are kept") from error
        raise CheckpointError(
            f"{getattr(error, 'filename', None) or job.run} cannot be written: {error}. Free "
            "some space; the states saved so far are kept"
        ) from error


def _find_model_once(model: str, ranks: Ranks) -> Path:
    """The model's directory. One rank of each machine downloads it; then the others find it."""
    machines = ranks.gather(socket.gethostname())
    first = machines.index(machines[ranks.rank]) == ranks.rank
    source = find_model(model) if first else None
    ranks.meet()
    return find_model(model) if source is None else source


def check_length(config: dict[str, Any], model: nn.Module, length: int) -> None:
    """Check that the model has enough positions for windows of this length.

    Args:
        config: the model's ``config.json``.
        model: the model; it may be on the meta device.
        length: the number of tokens in a window.

    Raises:
        ConfigError: a window is longer than the model's number of positions.
    """
    own = text_config(config)
    most = size_of(config, "max_position_embeddings", "n_positions", "max_seq_len")
    attention = own.get("attn_config")
    # Falcon and MPT can use ALiBi, which encodes distances and has no maximum position.
    alibi = own.get("alibi") or (isinstance(attention, dict) and attention.get("alibi"))
    for name, module in model.named_modules():
        positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if positions and most == module.num_embeddings and module.padding_idx is not None:
            most -= module.padding_idx + 1  # RoBERTa's positions start at padding_idx + 1
            break
    if most is not None and length > most and not alibi:
        raise ConfigError(
            f"windows of {length:,} tokens are longer than the {most:,} positions of the model; "
            f"give --length {most}, or less"
        )


def copies_of(config: dict[str, Any], *, quantized: bool, ranks: int = 1) -> int:
    """The maximum number of copies of the weights on the disk, without the original model.

    One copy is in the checkpoint and one in the result. A quantized model is made from one more
    copy. If the model has experts, transformers writes the weights that it fuses once per rank.
    """
    return 2 + quantized + ranks * (experts_of(config) is not None)


def _check_outside_model(job: Job, source: Path) -> None:
    """Refuse to write into the model's own directory, because all of its files are copied."""
    spill = job.spill_dir
    for place in (job.out, job.run):  # out must be empty at the end, and run is removed
        if spill is not None and spill.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"--spill, {spill}, lies in {place}; name a directory outside of it")
    for what, folder in (("OUT", job.out), ("--spill", spill)):
        if folder is not None and folder.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{what}, {folder}, lies in the model's directory; name one outside of {source}"
            )


def _check_out(job: Job) -> None:
    if not job.out.name:
        raise ConfigError(f"OUT, {job.out}, has no name; give the name of a new directory")
    if job.out.exists() and not (job.out.is_dir() and not any(job.out.iterdir())):
        raise ConfigError(f"{job.out} exists and is not empty; name another directory for OUT")
    if job.run.exists() and not job.resume:
        raise ConfigError(
            f"{job.run} belongs to an interrupted run: add --resume to continue it, or remove the "
            "directory to start again"
        )
    if job.run.is_dir() and any(job.run.iterdir()) and not is_run_folder(job.run):
        raise ConfigError(
            f"{job.run}, where a run for {job.out} would keep its unfinished files, exists and was "
            "not made by a run; name another OUT"
        )


def _check_space(job: Job, config: dict[str, Any], copies: int, size: int) -> None:
    """Check that the disk has room for the weights and for the activations between blocks."""
    widths = (size_of(config, name) or 0 for name in ("hidden_size", "intermediate_size"))
    # 4 bytes each, of the original and the quantized model, in the last and in the next state.
    activations = 4 * 2 * 2 * job.tokens * sum(widths)
    needed = copies * size + activations
    existing = next(folder for folder in job.out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if job.resume:  # the interrupted run has written a part already
        free += sum(path.stat().st_size for path in job.run.rglob("*") if path.is_file())
    if free < needed:
        raise ConfigError(
            f"{existing} has {free / 1e9:.1f} GB of free disk, and up to {needed / 1e9:.1f} GB are "
            f"needed: {copies} times the weights, and activations. Free some space, or name an OUT "
            "on another disk"
        )


def _tokenizer(source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers can raise anything here
        raise ModelError(
            f"{source} has no tokenizer that transformers can load ({brief(error)}); copy its "
            "tokenizer files there"
        ) from error


def _check_ids(model: Any, tokenizer: Any, calib: list[torch.Tensor], source: Path) -> None:
    """Check that the model's embedding has a row for each calibration token.

    Raises:
        CalibrationError: a token id is too large; the message names the token.
    """
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # the model does not say which one it is
        return
    rows, largest = getattr(embedding, "num_embeddings", None), max(int(b.max()) for b in calib)
    if rows is not None and largest >= rows:
        raise CalibrationError(
            f"the tokenizer of {source} uses the id {largest:,} for "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, but the model's embedding has only "
            f"{rows:,} rows. They belong to different models; copy this model's tokenizer files "
            "there"
        )
