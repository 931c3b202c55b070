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
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
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

from magr_fx.api import magr_transform, quantize_apart
from magr_fx.calibration_text import text_batches
from magr_fx.config import MagRConfig
from magr_fx.disk import is_full
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
from magr_fx.report_files import has_report, read_report, write_report
from magr_fx.tensor_files import TensorFiles
from magr_fx.write_directory import RewrittenWeights, Shards, copy_rest, publish, stored_as
from magr_fx.write_quantized import write_quantized, write_quantized_config

UNFINISHED = ".unfinished"
CHECKPOINT = "checkpoint"
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
    if _is_made(job):
        return _made(job)
    with _prepared(job, quantized=False) as prepared:
        model = _load(prepared)
        chosen = _chosen(model, job, linears_only=False)
        shards = _rewritten_to(model, prepared, chosen)
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
        copy_rest(prepared.source, shards.folder)
        return _finish(prepared, shards.folder, model.magr_report)


def quantize_directory(job: Job, rounding: str = "nearest") -> MagRReport:
    """:func:`magr_fx.magr_quantize` from directory to directory, a block in memory at a time.

    Quantized are the linears that transformers' ``TorchAoConfig`` quantizes, all but the head,
    where torchao can: what is left alone, and why, is in the report.

    Raises:
        MagRError: as :func:`transform_directory`.
    """
    if _is_made(job):
        return _made(job)
    with _prepared(job, quantized=True) as prepared:
        model = _load(prepared)
        chosen = _chosen(model, job, linears_only=True)
        linears, left = _linears(model, prepared), _left_out(model, job)
        tensors: MutableMapping[str, torch.Tensor] = {}
        shards = None
        if rounding == "gptq":
            tensors = TensorFiles(_emptied(job.run / "rounded"))
        else:
            shards = _rewritten_to(model, prepared, chosen)
        able = quantize_apart(
            model,
            prepared.calib,
            job.target,
            job.config,
            tensors,
            rounding=rounding,
            filter_fn=chosen,
            checkpoint_dir=job.run / CHECKPOINT,
            **job.options,
        )
        stored, weights = prepared.tensors, offloaded_weights(model)
        if shards is not None:
            shards.finish()
            stored = read_directory(shards.folder)

        def value(name: str) -> torch.Tensor:
            return tensors[name] if name in tensors else quantized_copy(weights[name], job.target)

        unable = {name for names in linears.values() for name in names} - {*able}
        if unable:
            left = [*(left or HfQuantizer.get_modules_to_not_convert(model))]
            left += sorted(name.removesuffix(".weight") for name in unable)
        wanted = {
            key: kept
            for key, names in linears.items()
            if (kept := [n for n in names if n not in unable])
        }
        report: MagRReport = model.magr_report
        folder = _emptied(job.run / "quantized")
        parts = functools.partial(revert_weight_conversion, model)
        progress = job.options.get("progress")
        done = write_quantized(stored, wanted, value, parts, folder, progress=progress)
        report.mark_quantized(done)
        report.target = describe(job.target)
        config = TorchAoConfig(job.target, modules_to_not_convert=left)
        write_quantized_config(prepared.source, folder, json.loads(config.to_json_string()))
        copy_rest(prepared.source, folder, keep=(CONFIG,))
        return _finish(prepared, folder, report)


def report_of(folder: Path) -> MagRReport:
    """The report of a directory that is finished, or of what is done in one that is not.

    Args:
        folder: an ``out``, or the ``OUT.unfinished`` of a run that was cut short.

    Raises:
        MagRError: there is no report there, or it cannot be read.
    """
    if folder.name and is_resumable(folder) and not has_report(folder):
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
def _prepared(job: Job, *, quantized: bool) -> Iterator[_Prepared]:
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
            copies = copies_of(config, quantized=quantized)
            size = sum(tensor.nbytes for tensor in tensors.values())
            _check_space(job, config, copies, size)
            tokenizer = _tokenizer(source)
            calib = text_batches(tokenizer, job.text, tokens=job.tokens, length=job.length)
            yield _Prepared(job, source, tensors, calib)
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and not is_full(error):
                raise CheckpointError(f"{error}. What was saved is still there") from error
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


def copies_of(config: dict[str, Any], *, quantized: bool) -> int:
    """How many copies of the weights the disk needs room for, beside the model, at most.

    What is saved to go on from and the result; of a quantized model what it is made of as well; and
    what transformers fuses it writes anew.
    """
    return 2 + quantized + (experts_of(config) is not None)


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


def _rewritten_to(model: Any, prepared: _Prepared, chosen: FilterFn) -> Shards:
    """Let a model that is offloaded have its weights written to shards as soon as they change.

    Raises:
        ModelError: one of those that are chosen cannot be written as it is stored.
    """
    shards = Shards(prepared.tensors, _emptied(prepared.job.run / "rewritten"))
    parts = functools.partial(revert_weight_conversion, model)
    weights = RewrittenWeights(offloaded_weights(model), shards, parts)
    for name, module in model.named_modules():
        for key, like in module._parameters.items():
            full = f"{name}.{key}" if name else key
            matrix = like is not None and like.dim() > 1 and full in weights.index
            if matrix and chosen(module, name):
                weights.check(full, like)
    keep_in(model, weights)
    return shards


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


def _linears(model: Any, prepared: _Prepared) -> dict[str, list[str]]:
    """The weights that transformers quantizes: their names in the files, and in the model.

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
    return names


def _finish(prepared: _Prepared, folder: Path, report: MagRReport) -> MagRReport:
    write_report(report, folder)
    publish(folder, prepared.job.out)
    shutil.rmtree(prepared.job.run, ignore_errors=True)
    return report


def _is_made(job: Job) -> bool:
    """Whether a run that is to go on was cut short after its result was whole."""
    return job.resume and job.run.exists() and has_report(job.out)


def _made(job: Job) -> MagRReport:
    shutil.rmtree(job.run, ignore_errors=True)
    return read_report(job.out)


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
