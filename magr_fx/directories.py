"""A Hugging Face directory → the same with rewritten or quantized weights.

Weights are read, rewritten and saved a block at a time, and quantized a shard at a time. What is
written is an ordinary directory of transformers; until it is whole it has another name.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import functools
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torchao.core.config import AOBaseConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from magr_fx.api import magr_transform, round_apart
from magr_fx.calibration_text import text_batches
from magr_fx.config import MagRConfig
from magr_fx.errors import CheckpointError, ConfigError, ModelError
from magr_fx.model_directory import (
    CONFIG,
    StoredTensor,
    experts_of,
    find_model,
    read_config,
    read_directory,
)
from magr_fx.passes.checkpoint import checkpoint_report
from magr_fx.passes.find_linears import FilterFn
from magr_fx.passes.offloaded import keep_in, offloaded_weights
from magr_fx.passes.quantizable import quantized_copy
from magr_fx.passes.to_torchao import describe
from magr_fx.report import MagRReport
from magr_fx.report_files import read_report, write_report
from magr_fx.tensor_files import TensorFiles
from magr_fx.write_directory import RewrittenWeights, Shards, copy_rest, publish, stored_as
from magr_fx.write_quantized import write_quantized, write_quantized_config

UNFINISHED = ".unfinished"
CHECKPOINT = "checkpoint"
# Copies of the weights on the disk, beside the model itself, at most: what is saved to go on from,
# and the shards of OUT; of a quantized model also these; what transformers fuses it writes too.
COPIES, COPIES_QUANTIZED, COPIES_FUSED = 2, 3, 1
# Bytes that Python, torch and transformers take before there is any model, about.
PROCESS = 500_000_000


@dataclass(frozen=True)
class Job:
    """What to make of which model.

    Attributes:
        model: a directory with the safetensors of a causal language model, or a name on the Hub.
        out: the directory to make; it may be there if it is empty.
        text: a text file to calibrate on.
        target: the torchao config that quantizes the model.
        tokens, length: how much of the text, and in windows of how many tokens.
        config: how to solve.
        skip: patterns (``*`` and ``?``) of the names of modules to leave alone.
        head: whether to rewrite what transformers does not quantize by default: the head.
        resume: whether to go on with a run for ``out`` that was cut short.
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
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """Where the job keeps what is not finished: ``OUT.unfinished``."""
        return self.out.with_name(self.out.name + UNFINISHED)


def transform_directory(job: Job) -> MagRReport:
    """:func:`magr_fx.magr_transform` from directory to directory, a block in memory at a time.

    Raises:
        MagRError: something is missing, damaged or too small, or what magr_transform raises;
            ``out`` is as it was then.
    """
    with _prepared(job, COPIES) as prepared:
        model = _load(prepared)
        return _finish(prepared, _rewrite(model, prepared), model.magr_report)


def quantize_directory(job: Job) -> MagRReport:
    """:func:`transform_directory` for a target, then torchao, a weight at a time.

    Quantized are the linears that transformers' ``TorchAoConfig`` quantizes, all but the head.

    Raises:
        MagRError: as :func:`transform_directory`.
    """
    with _prepared(job, COPIES_QUANTIZED) as prepared:
        model = _load(prepared)
        linears = _linears(model, prepared)
        rewritten, report = _rewrite(model, prepared, linears_only=True), model.magr_report
        weights = offloaded_weights(model)

        def value(name: str) -> torch.Tensor:
            return quantized_copy(weights[name], job.target)

        now = replace(prepared, tensors=read_directory(rewritten))
        return _finish(prepared, _save_quantized(model, now, linears, value, report), report)


def quantize_directory_gptq(job: Job) -> MagRReport:
    """:func:`magr_fx.magr_quantize` with GPTQ, a block in memory at a time.

    Raises:
        MagRError: as :func:`transform_directory`.
    """
    with _prepared(job, COPIES_QUANTIZED) as prepared:
        model = _load(prepared)
        linears = _linears(model, prepared)
        rounded = TensorFiles(_emptied(job.run / "rounded"))
        report = round_apart(
            model,
            prepared.calib,
            job.target,
            job.config,
            rounded,
            filter_fn=_chosen(model, job, linears_only=True),
            checkpoint_dir=job.run / CHECKPOINT,
            **job.options,
        )
        weights = offloaded_weights(model)

        def value(name: str) -> torch.Tensor:
            if name in rounded:
                return rounded[name]
            return quantized_copy(weights[name], job.target)

        return _finish(prepared, _save_quantized(model, prepared, linears, value, report), report)


def report_of(folder: Path) -> MagRReport:
    """The report of a directory that is finished, or of what is done in one that is not.

    Args:
        folder: an ``out``, or the ``OUT.unfinished`` of a run that was cut short.

    Raises:
        MagRError: there is no report there, or it cannot be read.
    """
    if folder.name and is_resumable(folder):
        folder = folder.with_name(folder.name + UNFINISHED)
    if any((folder / CHECKPOINT).glob("state-*.pt")):
        return checkpoint_report(folder / CHECKPOINT)
    return read_report(folder)


def is_resumable(out: Path) -> bool:
    """Whether a run for ``out`` was cut short that can be taken up again."""
    return any((out.with_name(out.name + UNFINISHED) / CHECKPOINT).glob("state-*.pt"))


@dataclass(frozen=True)
class _Prepared:
    job: Job
    source: Path
    tensors: dict[str, StoredTensor]
    calib: list[Any]


@contextlib.contextmanager
def _prepared(job: Job, copies: int) -> Iterator[_Prepared]:
    """Check all that can be checked first; then the run's directory is ours, until the end.

    It stays, if the work is cut short, where there is something in it to go on from.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("models are read with accelerate: pip install 'magr-fx[cli]'")
    _check_out(job)
    with _alone(job.run):
        try:
            source = find_model(job.model)
            _check_apart(job, source)
            config = read_config(source)
            check_length(config, job.length)
            tensors = read_directory(source)
            copies += COPIES_FUSED * (experts_of(config) is not None)
            size = sum(tensor.nbytes for tensor in tensors.values())
            _check_space(job, config, copies, size)
            tokenizer = _tokenizer(source)
            calib = text_batches(tokenizer, job.text, tokens=job.tokens, length=job.length)
            yield _Prepared(job, source, tensors, calib)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{getattr(error, 'filename', None) or job.run} cannot be written: {error}. Free "
                "some space; what was saved is still there"
            ) from error
        finally:
            if not is_resumable(job.out):
                shutil.rmtree(job.run, ignore_errors=True)


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
            f"{source} has no tokenizer that transformers can load ({_brief(error)}); copy its "
            "tokenizer files there"
        ) from error


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Have the run's directory to oneself; the lock goes with the process, however that ends."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{run} cannot be made: {error.strerror or error}; name an OUT where you may write"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process works on {run}; wait for it, or name another OUT"
            ) from error
        yield


def _load(prepared: _Prepared) -> Any:
    """The model, all of it offloaded to where it is stored."""
    offload = _emptied(prepared.job.run / "offload")  # of what a run that was cut short wrote
    try:
        return AutoModelForCausalLM.from_pretrained(
            prepared.source,
            dtype="auto",
            device_map={"": "disk"},
            offload_folder=str(offload),
        )
    except Exception as error:  # whatever transformers raises of a model that it does not know
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(
            f"transformers cannot load {prepared.source} as a causal language model: "
            f"{_brief(error)}"
        ) from error


def _rewrite(model: Any, prepared: _Prepared, *, linears_only: bool = False) -> Path:
    """Rewrite a model that is offloaded; each weight is saved as soon as it is finished."""
    job = prepared.job
    chosen = _chosen(model, job, linears_only=linears_only)
    folder = _emptied(job.run / "rewritten")
    shards = Shards(prepared.tensors, folder)
    parts = functools.partial(revert_weight_conversion, model)
    weights = RewrittenWeights(offloaded_weights(model), shards, parts)
    for name, module in model.named_modules():
        for key, like in module._parameters.items():
            if like is not None and chosen(module, name):
                weights.check(f"{name}.{key}", like)
    keep_in(model, weights)
    magr_transform(
        model,
        prepared.calib,
        job.config,
        target=job.target,
        filter_fn=chosen,
        checkpoint_dir=job.run / CHECKPOINT,
        **job.options,
    )
    shards.finish()
    copy_rest(prepared.source, folder)
    return folder


def _chosen(model: Any, job: Job, *, linears_only: bool) -> FilterFn:
    """What the job rewrites.

    Raises:
        ConfigError: nothing.
    """
    chosen = rewritable(model, job.skip, head=job.head, linears_only=linears_only)
    modules = [(name, module) for name, module in model.named_modules() if module._parameters]
    if not any(chosen(module, name) for name, module in modules):
        raise ConfigError(
            "nothing is left to rewrite: "
            + ("quantize takes nn.Linear only, and " if linears_only else "")
            + f"--skip leaves out {', '.join(job.skip) or 'nothing'}"
        )
    return chosen


@dataclass(frozen=True)
class _Linears:
    """What transformers quantizes: its config, and the weights' names, by those in the files."""

    config: TorchAoConfig
    names: dict[str, list[str]]


def _linears(model: Any, prepared: _Prepared) -> _Linears:
    """What transformers quantizes of a model that is offloaded.

    Raises:
        ModelError: one of these is not stored as it is in the model.
    """
    job = prepared.job
    config = TorchAoConfig(job.target, modules_to_not_convert=_left_out(model, job))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model)  # finds out what is left alone
    index = offloaded_weights(model).index
    names: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if quantizer.param_needs_quantization(model, name):
            key = stored_as(name, index, prepared.tensors)
            if key is None:
                raise ModelError(
                    f"transformers makes {name} of several stored tensors; load the model with "
                    "it, save it with save_pretrained(folder, save_original_format=False), and "
                    "give that directory, or leave it out with --skip"
                )
            names.setdefault(key, []).append(name)
    return _Linears(config, names)


def _save_quantized(
    model: Any,
    prepared: _Prepared,
    linears: _Linears,
    value: Callable[[str], torch.Tensor],
    report: MagRReport,
) -> Path:
    """Save a quantized model, and note in the report what of it is."""
    folder = _emptied(prepared.job.run / "quantized")
    parts = functools.partial(revert_weight_conversion, model)
    progress = prepared.job.options.get("progress")
    done = write_quantized(prepared.tensors, linears.names, value, parts, folder, progress=progress)
    report.mark_quantized(done)
    report.target = describe(prepared.job.target)
    write_quantized_config(prepared.source, folder, json.loads(linears.config.to_json_string()))
    copy_rest(prepared.source, folder, keep=(CONFIG,))
    return folder


def _finish(prepared: _Prepared, folder: Path, report: MagRReport) -> MagRReport:
    write_report(report, folder)
    publish(folder, prepared.job.out)
    shutil.rmtree(prepared.job.run)
    return report


def rewritable(
    model: Any, skip: tuple[str, ...] = (), *, head: bool = False, linears_only: bool = False
) -> FilterFn:
    """What to rewrite: all but what transformers does not quantize, and what is to be skipped."""
    kept = [] if head else HfQuantizer.get_modules_to_not_convert(model)

    def chosen(module: nn.Module, name: str) -> bool:
        wanted = isinstance(module, nn.Linear) or not linears_only
        return wanted and should_convert_module(name, kept) and not _is_skipped(name, skip)

    return chosen


def _left_out(model: nn.Module, job: Job) -> list[str] | None:
    """What TorchAoConfig is to be told to leave alone; None is what it does by itself."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = [name for name in linears if _is_skipped(name, job.skip)]
    return [*HfQuantizer.get_modules_to_not_convert(model), *skipped] if skipped else None


def _is_skipped(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
