"""Convert a Hugging Face model directory into one with rewritten or quantized weights.

Weights are read, rewritten and saved one block at a time, and quantized one shard at a time. The
result is an ordinary directory of transformers. It is made in ``OUT.unfinished``, and is moved to
OUT when it is complete.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig

from magr_fx.api import magr_transform, quantize_apart
from magr_fx.config import QuantizeOptions
from magr_fx.directories.plan_budget import plan_budget
from magr_fx.directories.prepare_directory import Job, Prepared, prepared
from magr_fx.directories.run_folder import CHECKPOINT, is_resumable, is_run_folder, run_of
from magr_fx.directories.skipped import is_skipped, rewritable
from magr_fx.directories.write_directory import (
    RewrittenWeights,
    Shards,
    StoredWeights,
    copy_rest,
    publish,
    stored_as,
)
from magr_fx.directories.write_quantized import write_quantized, write_quantized_config
from magr_fx.errors import CheckpointError, MagRError, ModelError, brief
from magr_fx.machine.ranks import distributed_session
from magr_fx.machine.safetensors_header import StoredTensor
from magr_fx.machine.tensor_files import DiscardedTensors, TensorFiles
from magr_fx.model_files.model_class import model_class
from magr_fx.model_files.model_directory import CONFIG, read_config, read_directory
from magr_fx.passes.budgeting.budget import Budget
from magr_fx.passes.finding.find_linears import FilterFn
from magr_fx.passes.handover.mixed_target import MixedTarget, config_for
from magr_fx.passes.handover.target import Target, describe
from magr_fx.passes.handover.to_compressed_tensors import (
    Packing,
    linears_besides,
    quantization_config,
)
from magr_fx.passes.handover.torchao_rounding import quantized_copy
from magr_fx.passes.known_layers.transformers_private import (
    AutoHfQuantizer,
    HfQuantizer,
    revert_weight_conversion,
    tied_names,
)
from magr_fx.passes.offloading.offloaded import keep_in, offloaded_weights, run_on
from magr_fx.passes.rewriting.checkpoint import checkpoint_report
from magr_fx.passes.rewriting.pipeline import for_quantizing, resolve_config
from magr_fx.passes.rewriting.request import Folders, Request
from magr_fx.reporting.report import MagRReport
from magr_fx.reporting.report_files import has_report, read_report, write_report

REWRITTEN, QUANTIZED = "rewritten", "quantized"  # folders in OUT.unfinished
# The memory in bytes that Python, torch and transformers take without a model, approximately.
PROCESS = 500_000_000


def transform_directory(job: Job) -> MagRReport:
    """Apply :func:`magr_fx.magr_transform` to a model directory, one block in memory at a time.

    If torch.distributed has a default group, its ranks share the work, and rank 0 writes. All
    ranks must see the directory that contains ``out``.

    Args:
        job: the model, the text, the options, and the directory to write.

    Raises:
        MagRError: an input is missing, damaged or too small, or magr_transform failed. ``out`` is
            unchanged then.
    """
    return _convert(job, _transformed, quantized=False)


def quantize_directory(job: Job, rounding: str = "nearest") -> MagRReport:
    """Apply :func:`magr_fx.magr_quantize` to a model directory, one block in memory at a time.

    It quantizes the linears that transformers' ``TorchAoConfig`` quantizes, which are all but the
    head, as far as torchao can quantize them. The report lists the other weights with the reason.
    Ranks share the work as in :func:`transform_directory`.

    Args:
        job: the model, the text, the options, and the directory to write; it needs a ``target``.
        rounding: ``"nearest"`` or ``"gptq"``.

    Raises:
        MagRError: as :func:`transform_directory`.
    """
    return _convert(job, functools.partial(_quantized, rounding=rounding), quantized=True)


def _convert(
    job: Job, make: Callable[[Any, Prepared], tuple[Path, MagRReport]], *, quantized: bool
) -> MagRReport:
    """Let ``make`` fill a directory, and move that directory to ``out``.

    An interrupted run whose ``out`` is already complete is only cleaned up.

    Args:
        job: the job.
        make: takes the offloaded model, and returns the report and the directory that rank 0 has
            filled.
        quantized: whether the result is a quantized model.
    """
    with distributed_session() as ranks:
        if ranks.gather(ranks.rank == 0 and _is_complete(job))[0]:
            if ranks.rank == 0:
                shutil.rmtree(job.run, ignore_errors=True)
            return read_report(job.out)
        with prepared(job, ranks, quantized=quantized) as work:
            folder, report = make(_load(work), work)
            if work.writes:
                write_report(report, folder)
                publish(folder, job.out)
                shutil.rmtree(job.run, ignore_errors=True)
            return report


def _is_complete(job: Job) -> bool:
    """Whether a run to be resumed was interrupted after it had moved its result to ``out``."""
    return job.resume and is_run_folder(job.run) and has_report(job.out)


def _transformed(model: Any, work: Prepared) -> tuple[Path, MagRReport]:
    job = work.job
    chosen = rewritable(model, job.skip, head=job.head)
    shards = _write_rewritten(model, work, chosen)
    magr_transform(
        model,
        work.calib,
        job.config,
        target=job.target,
        filter_fn=chosen,
        propagate=job.propagate,
        checkpoint_dir=job.run / CHECKPOINT,
        spill_dir=job.spill_dir,
        progress=job.progress,
    )
    if shards is not None:
        shards.finish()
        copy_rest(work.source, shards.folder)
    return job.run / REWRITTEN, model.magr_report


def _quantized(model: Any, work: Prepared, rounding: str) -> tuple[Path, MagRReport]:
    """Solve and round on all ranks; then rank 0 writes the shards of the quantized model."""
    plan = None
    if isinstance(work.job.target, Budget):
        work, plan = plan_budget(work, work.job.target)
    job = work.job
    chosen = rewritable(model, job.skip, head=job.head, linears_only=True)
    linears = _linears(model, work)
    tensors: MutableMapping[str, torch.Tensor] = {}
    shards = None
    options = QuantizeOptions(rounding, refine=job.refine, propagate=job.propagate is not False)
    config = resolve_config(job.solving, job.target, required=True, several=True)
    config, target = for_quantizing(config, job.target, options)
    if isinstance(target, MixedTarget):
        target = target.for_model(model)
    if not target.makes_tensors:
        shards = _write_rewritten(model, work, chosen)
    else:
        tensors = TensorFiles(_emptied(job.run / "rounded")) if work.writes else DiscardedTensors()
    request = Request(
        config,
        target,
        filter_fn=chosen,
        folders=Folders(job.run / CHECKPOINT, job.spill_dir),
        progress=job.progress,
        quantize=True,
    )
    quantizable = quantize_apart(model, work.calib, request, tensors)
    done: set[str] = set()
    if work.writes:
        if shards is not None:
            shards.finish()
        stored = work.tensors if shards is None else read_directory(shards.folder)
        done = _write_quantized(model, work, target, linears, {*quantizable}, stored, tensors)
    report: MagRReport = model.magr_report
    report.mark_quantized(work.ranks.gather(done)[0])
    report.target, report.bits = describe(job.target), plan
    return job.run / QUANTIZED, report


def _write_quantized(
    model: Any,
    work: Prepared,
    target: Target | MixedTarget,
    linears: dict[str, list[str]],
    quantizable: set[str],
    stored: dict[str, StoredTensor],
    tensors: Mapping[str, torch.Tensor],
) -> set[str]:
    """Write the quantized model, and return the names of its quantized weights.

    Args:
        model: the offloaded model.
        work: the prepared job.
        target: the configs of the weights.
        linears: the weights that transformers would quantize: name in the files → model's names.
        quantizable: the model's names of the weights that torchao can quantize.
        stored: where each tensor is stored.
        tensors: the weights that are quantized already; the others are quantized here.
    """
    job, weights, left = work.job, offloaded_weights(model), _not_converted(model, work.job)

    config_of = functools.partial(config_for, target)

    def value(name: str) -> torch.Tensor:
        return tensors[name] if name in tensors else quantized_copy(weights[name], config_of(name))

    unquantizable = {name for names in linears.values() for name in names} - quantizable
    if unquantizable:
        left = [*(left or HfQuantizer.get_modules_to_not_convert(model))]
        left += sorted(name.removesuffix(".weight") for name in unquantizable)
    wanted = {
        key: kept
        for key, names in linears.items()
        if (kept := [n for n in names if n not in unquantizable])
    }
    folder = _emptied(job.run / QUANTIZED)
    parts = functools.partial(revert_weight_conversion, model)
    write = functools.partial(write_quantized, stored, wanted, value, parts, folder)
    if job.format == "compressed-tensors":
        packing = Packing(config_of)
        done = write(flatten=packing, progress=job.progress)
        described = quantization_config(packing.layouts, linears_besides(model, packing.layouts))
    else:
        done = write(progress=job.progress)
        config = TorchAoConfig(job.target, modules_to_not_convert=left)
        described = json.loads(config.to_json_string())
    write_quantized_config(work.source, folder, described)
    copy_rest(work.source, folder, keep=(CONFIG,))
    return done


def report_of(folder: Path) -> MagRReport:
    """The report of a finished run, or of the finished part of an interrupted run.

    Args:
        folder: an ``out``, or the ``OUT.unfinished`` of an interrupted run.

    Raises:
        MagRError: the folder has no report, or the report cannot be read.
    """
    if folder.name and is_resumable(folder) and not has_report(folder):
        folder = run_of(folder)
    if any((folder / CHECKPOINT).glob("state-*.pt")):
        try:
            return checkpoint_report(folder / CHECKPOINT)
        except MagRError:
            raise
        except Exception as error:  # torch.load can raise anything for a file of another format
            raise CheckpointError(
                f"{folder / CHECKPOINT} holds no valid state of a run: {brief(error)}"
            ) from error
    return read_report(folder)


def _load(work: Prepared) -> Any:
    """The model, with all of its weights left in the files that store them."""
    # Emptied of an interrupted run's files. Each rank needs its own folder, as transformers writes
    # the weights there that it fuses.
    rank = work.ranks.rank
    offload = _emptied(work.job.run / (f"offload-rank{rank}" if rank else "offload"))
    kind = model_class(read_config(work.source))
    try:
        model = kind.from_pretrained(
            work.source,
            dtype="auto",
            device_map={"": "disk"},
            offload_folder=str(offload),
            trust_remote_code=False,
        )
    except Exception as error:  # transformers can raise anything for a model it does not know
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(
            f"transformers cannot load {work.source} as {kind.__name__}: {brief(error)}"
        ) from error
    weights = offloaded_weights(model)
    for name, partner in tied_names(model).items():
        if name in weights.index and partner not in weights.index:  # only one of the two is stored
            weights.index[partner] = weights.index[name]
            weights.all_keys.append(partner)
    run_on(model, work.job.device)
    return model


def _write_rewritten(model: Any, work: Prepared, chosen: FilterFn) -> Shards | None:
    """Make an offloaded model write each weight to the new shards as soon as it is rewritten.

    Only rank 0 writes, and returns the shards. The other ranks discard rewritten weights, and keep
    reading the stored ones. That is correct, as a weight is rewritten only after everything that
    reads it has run.

    Raises:
        ModelError: a chosen weight cannot be written in the form in which it is stored.
    """
    stored = offloaded_weights(model)
    if not work.writes:
        keep_in(model, StoredWeights(stored))
        return None
    shards = Shards(work.tensors, _emptied(work.job.run / REWRITTEN))
    parts = functools.partial(revert_weight_conversion, model)
    weights = RewrittenWeights(stored, shards, parts)
    for name, module in model.named_modules():
        for key, like in module._parameters.items():
            full = f"{name}.{key}" if name else key
            matrix = like is not None and like.dim() > 1 and full in weights.index
            if matrix and chosen(module, name):
                weights.check(full, like)
    keep_in(model, weights)
    return shards


def _linears(model: Any, work: Prepared) -> dict[str, list[str]]:
    """The weights that transformers quantizes: each one's name in the files → its model's names.

    Raises:
        ModelError: transformers makes such a weight of several stored tensors.
    """
    job = work.job
    config = TorchAoConfig(job.target, modules_to_not_convert=_not_converted(model, job))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model)  # decides which modules are not quantized
    index = offloaded_weights(model).index
    names: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if quantizer.param_needs_quantization(model, name):
            key = stored_as(name, index, work.tensors)
            if key is None:
                raise ModelError(
                    f"transformers makes {name} of several stored tensors. Load the model with "
                    "it, save it with save_pretrained(folder, save_original_format=False), and "
                    "give that directory, or leave this weight out with --skip"
                )
            names.setdefault(key, []).append(name)
    return names


def _not_converted(model: nn.Module, job: Job) -> list[str] | None:
    """The modules that TorchAoConfig must not quantize; None is its own default."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = [name for name in linears if is_skipped(name, job.skip)]
    return [*HfQuantizer.get_modules_to_not_convert(model), *skipped] if skipped else None


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
