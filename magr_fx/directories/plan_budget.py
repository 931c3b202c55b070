"""A budget for a model directory: which weight gets which config."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import torch

from magr_fx.directories.prepare_directory import Prepared
from magr_fx.directories.skipped import rewritable
from magr_fx.errors import ModelError, brief
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.model_files.model_class import model_class
from magr_fx.model_files.model_directory import read_config
from magr_fx.passes.budgeting.budget import Budget
from magr_fx.passes.entries.plan_bits import plan_bits
from magr_fx.reporting.bit_plan import BitPlan

logger = logging.getLogger("magr_fx")


def plan_budget(work: Prepared, budget: Budget) -> tuple[Prepared, BitPlan]:
    """Load the whole model, choose the configs, and free the model.

    Args:
        work: a job whose target is a budget.
        budget: that target.

    Returns:
        The same job with an FqnToConfig as target, and how the budget was spent.

    Raises:
        ModelError: transformers cannot load the model.
        MagRError: as :func:`magr_fx.plan_bits`.
    """
    job, kind = work.job, model_class(read_config(work.source))
    try:
        model = kind.from_pretrained(work.source, dtype="auto", trust_remote_code=False)
        model = model.eval().to(job.device)
    except Exception as error:  # transformers can raise anything for a model it does not know
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"transformers cannot load {work.source} as {kind.__name__}: {brief(error)}"
        ) from error
    target = plan_bits(
        model,
        [batch.to(job.device) for batch in work.calib],
        budget,
        job.solving,
        filter_fn=rewritable(model, job.skip, head=job.head, linears_only=True),
        spill_dir=job.spill_dir,
        progress=job.progress,
    )
    plan: BitPlan = model.magr_bits
    del model
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    return replace(work, job=replace(job, target=target)), plan
