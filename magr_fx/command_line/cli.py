"""The commands of ``magr-fx``: their options, and how they report errors."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from magr_fx.command_line.cli_types import FILE, FOLDER, LENGTH, TOKENS, Positive
from magr_fx.command_line.torchrun import Launched
from magr_fx.config import ALPHA_WORDS, SOLVERS, MagRConfig
from magr_fx.errors import ConfigError, MagRError
from magr_fx.machine.quiet import errors_only
from magr_fx.reporting.block_log import blocks_to

Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="magr-fx")
def magr_fx() -> None:
    """Shrink every channel's largest weight before torchao quantizes it.

    MODEL is a directory with the safetensors of a causal language model or an encoder, or its name
    on the Hub.
    An error in the input is reported in one line, with exit code 2, before anything is changed.
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _alpha(
    _context: click.Context, _option: click.Parameter, given: str | None
) -> float | str | None:
    if given is None or given in ALPHA_WORDS:
        return given
    try:
        return float(given)
    except ValueError:
        raise click.UsageError(
            f"--alpha must be a number, {' or '.join(ALPHA_WORDS)}; got {given!r}"
        ) from None


_TOKENS = (
    click.option("--tokens", default=16_384, show_default=True,
                 type=TOKENS, help="How many tokens to calibrate on."),
    click.option("--length", default=512, show_default=True, type=LENGTH,
                 help="How many tokens are in a window."),
    click.option("--skip", multiple=True, metavar="PATTERN",
                 help="Do not rewrite modules whose names match, such as '*.down_proj', nor the "
                 "modules inside them; repeatable."),
)  # fmt: skip
_WORK = (
    click.argument("model"),
    click.argument("out", type=FOLDER),
    click.option("--calib", required=True, type=FILE, help="A text file to calibrate on."),
    *_TOKENS,
    click.option("--alpha", metavar="auto|published|NUMBER", callback=_alpha,
                 help="The penalty weight; with a target, by default the best one for each row."),
    click.option("--solver", default="admm", show_default=True, type=click.Choice(SOLVERS)),
    click.option("--max-steps", type=int, help="The maximum number of steps of the solver."),
    click.option("--damping", type=float,
                 help="The share of the gram's mean diagonal to add to its diagonal."),
    click.option("--propagate/--no-propagate", default=None,
                 help="Calibrate each layer on the outputs of the quantized layers before it "
                 "(default: with a target)."),
    click.option("--resume", is_flag=True,
                 help="Continue an interrupted run for OUT, if there is one."),
    click.option("--log-json", type=FILE, help="Append a line of JSON for each finished block."),
    click.option("--spill", type=FOLDER,
                 help="Keep the activations between blocks in this directory, not in memory."),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N",
                 help="The device that runs and solves the blocks; auto is cuda if there is one. "
                 "Under torchrun, cuda is a different device for each rank."),
    click.option("--timeout", default=60.0, show_default=True, metavar="MINUTES",
                 type=Positive(),
                 help="Under torchrun: the longest time that a rank waits for another. It must be "
                 "longer than a block, the download, and the writing of OUT take."),
    click.option("--progress/--no-progress", default=None,
                 help="Show progress bars (default: on a terminal)."),
)  # fmt: skip


@magr_fx.command()
@_options(
    *_WORK,
    click.option("--target", help="The config that will quantize OUT: int3-per-channel, ..."),
    click.option("--head", is_flag=True, help="Also rewrite the head (default: it is not)."),
)
def transform(target: str | None, head: bool, **given: Any) -> None:
    """Rewrite MODEL's weights, and write them into OUT, a directory with the same files.

    Only one block of the model is in memory at a time.
    """

    def make(job: Any) -> Any:
        from magr_fx.directories.convert_directory import transform_directory

        return transform_directory(job)

    _run_job(make, partial(_job, target, given, head=head), given)


@magr_fx.command()
@_options(
    *_WORK,
    click.option("--target", required=True,
                 help="The torchao config: int3-per-channel, ..., or auto: the best one for each "
                 "weight within --bits or --size."),
    click.option("--bits", type=Positive(),
                 help="With --target auto: the average for each number of the quantized weights."),
    click.option("--size", metavar="60MB",
                 help="With --target auto: of the whole model, in place of --bits."),
    click.option("--group", type=click.IntRange(1), show_default="64",
                 help="With --target auto: inputs that share a scale."),
    click.option("--rounding", default="nearest", show_default=True,
                 type=click.Choice(["nearest", "gptq"])),
    click.option("--refine", type=click.IntRange(0), default=0, show_default=True,
                 help="Passes of coordinate descent after GPTQ."),
    click.option("--format", "stored", default="torchao", show_default=True,
                 type=click.Choice(["torchao", "compressed-tensors"]),
                 help="compressed-tensors stores the target's bits for each weight, torchao a "
                 "byte."),
)  # fmt: skip
def quantize(
    target: str,
    bits: float | None,
    size: str | None,
    group: int | None,
    rounding: str,
    refine: int,
    stored: str,
    **given: Any,
) -> None:
    """Rewrite and quantize MODEL, and write it into OUT, which transformers loads.

    Only one block of the model is in memory at a time, or one shard while it is saved; with
    --target auto the whole model, while the bits are planned.
    """
    if refine and rounding != "gptq":
        raise click.UsageError("--refine works with --rounding gptq only")
    if target == "auto" and (bits is None) == (size is None):
        raise click.UsageError("--target auto needs either --bits or --size")
    if target != "auto" and any(option is not None for option in (bits, size, group)):
        raise click.UsageError("--bits, --size and --group work with --target auto only")

    def make(job: Any) -> Any:
        from magr_fx.directories.convert_directory import quantize_directory

        return quantize_directory(job, rounding)

    def job(launched: Launched) -> Any:
        made = _job(None if target == "auto" else target, given, launched, refine=refine,
                    stored=stored)  # fmt: skip
        if target != "auto":
            return made
        from magr_fx.passes.budgeting.budget import Budget, default_choices

        # transformers loads no mix of layouts with zero points from compressed-tensors.
        choices = default_choices(group or 64, symmetric=stored == "compressed-tensors")
        return replace(made, target=Budget(bits, size, choices))

    _run_job(make, job, given)


@magr_fx.command()
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Print the report of RUN: an OUT, or the OUT.unfinished of an interrupted run."""
    with _errors_in_one_line(None):
        from magr_fx.directories.convert_directory import report_of

        click.echo(report_of(run))


@magr_fx.command()
@_options(
    click.argument("model"),
    *_TOKENS,
    click.option("--target", help="The torchao config to quantize with: int3-per-channel, ..."),
    click.option("--head", is_flag=True, help="Also rewrite the head (default: it is not)."),
    click.option("--rounding", default="nearest", show_default=True,
                 type=click.Choice(["nearest", "gptq"])),
    click.option("--tflops", type=Positive(),
                 help="The machine's TFLOP/s in matrix products (default: measured here)."),
)  # fmt: skip
def plan(model: str, target: str | None, rounding: str, tflops: float | None, **given: Any) -> None:
    """Print what a run on MODEL would rewrite, and what it would cost, without reading weights."""
    with _errors_in_one_line(None):
        from magr_fx.command_line.named_targets import named_target
        from magr_fx.command_line.plan_directory import describe, plan_directory

        config = None if target is None else named_target(target)
        rate = None if tflops is None else tflops * 1e12
        found, disk = plan_directory(model, config, gptq=rounding == "gptq", **given)
        click.echo(describe(found, disk, rate))


@magr_fx.command()
@_options(
    click.argument("quantized"),
    click.option("--against", required=True, metavar="ORIGINAL",
                 help="The model before it was quantized."),
    click.option("--text", required=True, type=FILE, help="A text file to compare the models on."),
    click.option("--tokens", default=8192, show_default=True, type=TOKENS,
                 help="How many tokens to compare on."),
    click.option("--length", default=512, show_default=True, type=LENGTH,
                 help="How many tokens are in a window."),
    click.option("--json", "json_file", type=FILE, help="Also write all figures to this file."),
    click.option("--plot", type=FILE, help="Also plot the figures to this .png, .pdf or .svg."),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N",
                 help="The device that runs both models; auto is cuda if there is one."),
    click.option("--timeout", default=60.0, show_default=True, metavar="MINUTES",
                 type=Positive(),
                 help="Under torchrun: the longest time that a rank waits for another."),
    click.option("--progress/--no-progress", default=None,
                 help="Show a progress bar (default: on a terminal)."),
)  # fmt: skip
def evaluate(
    quantized: str, against: str, json_file: Path | None, plot: Path | None, **given: Any
) -> None:
    """Print how far QUANTIZED is from the ORIGINAL: divergence, perplexity, sizes.

    Each of them is a directory, a name on the Hub, or a GGUF file, and is loaded by transformers.
    Under torchrun the ranks share the text.
    """
    launched = Launched()
    with (
        _errors_in_one_line(None, given["progress"], launched),
        launched.default_group(given.pop("timeout")),
    ):
        from magr_fx.command_line.evaluate import evaluate as evaluated
        from magr_fx.command_line.named_device import named_device

        given["device"] = named_device(
            given["device"], local_rank=launched.local_rank, several=launched.world > 1
        )
        _check_outputs(json_file, plot)
        found = evaluated(quantized, against, **given)
        if launched.rank == 0:
            click.echo(found)
            if json_file is not None:
                found.to_json(json_file)
            if plot is not None:
                found.plot(plot)


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Find out before the work whether its results can be written.

    Raises:
        ConfigError: they cannot; the message names the option.
    """
    for option, file in (("--json", json_file), ("--plot", plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{option} {file}: {file.absolute().parent} is not a directory")
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot {plot}: name a file that ends in .png, .pdf or .svg")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'magr-fx[plot]'")


def _job(
    target: str | None,
    given: dict[str, Any],
    launched: Launched,
    *,
    head: bool = False,
    refine: int = 0,
    stored: str = "torchao",
) -> Any:
    from magr_fx.command_line.named_device import named_device
    from magr_fx.command_line.named_targets import named_target
    from magr_fx.directories.prepare_directory import Job

    return Job(
        model=given["model"],
        out=given["out"],
        text=given["calib"],
        target=None if target is None else named_target(target),
        tokens=given["tokens"],
        length=given["length"],
        config=MagRConfig(
            alpha=given["alpha"],
            solver=given["solver"],
            max_steps=given["max_steps"],
            damping=given["damping"],
        ),
        skip=given["skip"],
        head=head,
        resume=given["resume"],
        device=named_device(
            given["device"], local_rank=launched.local_rank, several=launched.world > 1
        ),
        format=stored,
        refine=refine,
        propagate=given["propagate"],
        spill_dir=given["spill"],
        progress=given["progress"],
    )


def _run_job(
    make: Callable[[Any], Any], job_of: Callable[[Launched], Any], given: dict[str, Any]
) -> None:
    """Run a job on all ranks that were started for it; rank 0 prints the result."""
    launched = Launched()
    speaks = launched.rank == 0
    with (
        _errors_in_one_line(given["out"], given["progress"], launched),
        launched.default_group(given["timeout"]),
    ):
        from magr_fx.directories.run_folder import run_id
        from magr_fx.machine.ranks import distributed_session

        with distributed_session():
            job = job_of(launched)
            if job.device.type == "cuda":  # torch.distributed uses the current device
                torch.cuda.set_device(job.device)
            log = given["log_json"] if speaks else None
            _check_log(log, job)
            named = partial(run_id, job.out)
            with blocks_to(log, job.out, run_id=named, resumed=job.resume):
                done = make(job)
        if speaks:
            click.echo(done.totals())
            click.echo(f"{job.out} is written; magr-fx report {job.out} lists each weight")


def _check_log(log: Path | None, job: Any) -> None:
    """Check that ``--log-json`` is not one of the files that the run reads or writes.

    Raises:
        ConfigError: it is the calibration text, or lies in MODEL, OUT or OUT.unfinished.
    """
    for what, path in (
        ("--calib", job.text),
        ("MODEL", Path(job.model)),
        ("OUT", job.out),
        ("OUT.unfinished", job.run),
    ):
        if log is not None and log.resolve().is_relative_to(path.resolve()):
            at = "is" if what == "--calib" else "lies in"
            raise ConfigError(f"--log-json {log} {at} {what}, {path}; name another file")


@contextlib.contextmanager
def _errors_in_one_line(
    out: Path | None, progress: bool | None = None, launched: Launched | None = None
) -> Iterator[None]:
    """Report errors in one line, and hide the bars and notes of other libraries.

    The line says how to resume if ``out`` has an unfinished run with a saved state.
    """
    launched = launched or Launched(alone=True)
    with contextlib.ExitStack() as restored:
        restored.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if transformers_logging.is_progress_bar_enabled():
            restored.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()  # disables the Hub client's bars too
            shown = sys.stderr.isatty() if progress is None else progress
            if shown and launched.rank == 0 and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
                enable_progress_bars()  # because a download is long
        # accelerate notes in every run that weights are offloaded. huggingface_hub notes each new
        # attempt to download; if all attempts fail, that is reported as the error.
        restored.enter_context(errors_only("accelerate", "huggingface_hub"))
        restored.enter_context(_warnings_shown(launched.rank == 0))
        try:
            yield
        except KeyboardInterrupt:
            if launched.rank == 0:
                click.echo(f"magr-fx: interrupted{_resume_hint(out)}", err=True)
            raise click.exceptions.Exit(130) from None
        except MagRError as error:
            message = " ".join(str(error).split())
            launched.print_once(f"magr-fx: error: {message}{_resume_hint(out)}")
            raise click.exceptions.Exit(2) from error
        except OSError as error:  # wrong paths, missing permissions, a full disk
            launched.print_once(
                f"magr-fx: error: {' '.join(str(error).split())}{_resume_hint(out)}"
            )
            raise click.exceptions.Exit(2) from error


def _resume_hint(out: Path | None) -> str:
    from magr_fx.directories.run_folder import is_resumable, is_run_folder, run_of

    if out is None or not (is_run_folder(run_of(out)) and is_resumable(out)):
        return ""
    return "; the same command with --resume continues from the last saved state"


@contextlib.contextmanager
def _warnings_shown(shown: bool) -> Iterator[None]:
    """Print the library's warnings, each in one line, and no other log records."""
    handler = _WarningLines(logging.WARNING) if shown else logging.NullHandler()
    handler.addFilter(lambda record: record.levelno == logging.WARNING)
    logger = logging.getLogger("magr_fx")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


class _WarningLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"magr-fx: warning: {record.getMessage()}", file=sys.stderr)
