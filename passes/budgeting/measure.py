"""What each choice costs each weight: its output error on the calibration, on a sample of rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig

from magr_fx.config import MagRConfig, QuantizeOptions
from magr_fx.errors import ModelError, brief
from magr_fx.grams.gram import damped, row_errors, within_range
from magr_fx.machine.ranks import UNSOLVABLE, Ranks
from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.few_tokens import fill_up
from magr_fx.passes.collecting.shared_gram import SharedGram
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.handover.target import rows_are_independent
from magr_fx.passes.handover.torchao_rounding import TorchaoRounding
from magr_fx.passes.rewriting.pipeline import goal_for, resolve_config
from magr_fx.passes.rewriting.quantized_weights import choose_rows

logger = logging.getLogger("magr_fx")
# One row of so many is quantized, but at least so many rows: the errors of the others are alike.
SAMPLE, LEAST_SAMPLE = 8, 64


class Errors(NamedTuple):
    """The output errors of a weight's choices, for each token.

    Attributes:
        rows: which were quantized.
        errors: ``[choices, rows]``, the mean over the tokens of (ŵᵢx - wᵢx)².
        energy: the mean of ‖Wx‖², of these rows.
        inputs: the mean of ‖x‖².
        share: the share of all rows that these are.
        tokens: how many tokens reach the weight.
    """

    rows: Tensor
    errors: Tensor
    energy: float
    inputs: float
    share: float
    tokens: int


def measure(
    run: CalibrationRun,
    choices: Mapping[str, Sequence[AOBaseConfig]],
    config: MagRConfig,
    options: QuantizeOptions,
    ranks: Ranks,
    *,
    progress: bool | None = None,
) -> dict[str, Errors]:
    """Run the calibration on the original model, and quantize a sample of rows by each choice.

    Args:
        run: over the sites.
        choices: the configs of each weight, by its name.
        config, options: how the weights will be quantized.
        ranks: which share the work.
        progress: whether to show a bar.

    Returns:
        By the names of those weights that a token reached. A weight that cannot be solved is left
        out if it has only one choice.

    Raises:
        CalibrationError: an activation is NaN or Inf.
        ModelError: a weight with several choices cannot be solved.
    """
    found: dict[str, Errors] = {}
    steps = run.collect(check=True, progress=progress)
    with closing(steps):  # restores the model's buffers, also after an error
        for finished in steps:
            fill_up(finished)
            with ranks.failing_together():
                for at, shared in enumerate(finished):
                    if ranks.owns(at) and int(shared.tokens) > 0:
                        found |= _of_gram(shared, choices, config, options)
    return {name: errors for part in ranks.gather(found) for name, errors in part.items()}


def _of_gram(
    shared: SharedGram,
    choices: Mapping[str, Sequence[AOBaseConfig]],
    config: MagRConfig,
    options: QuantizeOptions,
) -> dict[str, Errors]:
    gram = within_range(damped(shared.collected, shared.damping(config)))
    judge, tokens = shared.collected, int(shared.tokens)
    if shared.held is not None and int(shared.held_tokens) > 0:
        judge, tokens = shared.held, int(shared.held_tokens)
    found = {}
    with torch.autocast(gram.device.type, enabled=False):
        for site in shared.sites:
            rows = _sampled(site, choices[site.name])
            weight = site.weight[rows]
            try:
                values = [
                    _quantized(weight, gram, choice, config, options)
                    for choice in choices[site.name]
                ]
                whole = weight.to(torch.float32)
                errors = torch.stack([row_errors(one - whole, judge) for one in values]) / tokens
                if not bool(errors.isfinite().all()):
                    raise ModelError("its output errors are NaN or Inf")
            except UNSOLVABLE as error:
                if len(choices[site.name]) == 1:  # there is nothing to choose
                    continue
                raise ModelError(
                    f"no bits can be planned for {site.name}: {brief(error)}. Pin it to a config "
                    "or to None, or leave it out with filter_fn"
                ) from error
            found[site.name] = Errors(
                rows.cpu(),
                errors.cpu(),
                float(row_errors(whole, judge).sum()) / tokens,
                float(judge.diagonal().sum()) / tokens,
                len(rows) / site.shape[0],
                int(shared.tokens),
            )
    return found


def _sampled(site: Site, choices: Sequence[AOBaseConfig]) -> Tensor:
    """Rows at equal distances; all, if a choice looks at all rows at once."""
    total = site.shape[0]
    count = min(total, max(LEAST_SAMPLE, total // SAMPLE))
    if not all(rows_are_independent(choice) for choice in choices):
        count = total
    return torch.arange(count, device=site.parameter.device) * total // count


def _quantized(
    weight: Tensor, gram: Tensor, choice: AOBaseConfig, config: MagRConfig, options: QuantizeOptions
) -> Tensor:
    """The values of rows quantized to the nearest, ``[rows, in]`` float32."""
    solving, target = goal_for(resolve_config(config, choice), choice, options)
    torchao = TorchaoRounding(choice, [len(weight)])
    _, chosen = choose_rows(weight, weight.to(torch.float32), gram, torchao, solving, target, None)
    return chosen.rounded.values


def costs_of(
    errors: Mapping[str, Errors], gradients: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """What each choice of each weight costs the outputs, by the weight's name.

    With errors δᵢ of a weight's outputs yᵢ, Σᵢ ½·E‖∂ℓ/∂wᵢ‖²·E[δᵢ²]/E‖x‖²: the output gradient
    and the input of a token are taken to be independent, as in K-FAC (Martens and Grosse, ICML
    2015), and only the diagonal of the outputs counts. A weight without gradients, such as one
    that runs under ``torch.no_grad``, counts by its relative error as the others do on average.

    Args:
        errors: from :func:`measure`.
        gradients: from :func:`magr_fx.passes.budgeting.output_gradients.output_gradients`.
    """
    costs, relative = {}, {}
    for name, one in errors.items():
        importance = gradients[name][one.rows]
        costs[name] = (one.errors @ importance) / (2 * one.share * (one.inputs or 1.0))
        relative[name] = one.errors.sum(-1) / (one.energy or 1.0)
    known = [n for n in costs if bool(gradients[n].isfinite().all() and gradients[n].any())]
    left = [name for name in costs if name not in known]
    if left:
        logger.warning(
            "no gradient reaches %d weights, or it overflows, such as %s: they count by their "
            "relative error",
            *(len(left), left[0]),
        )
    factor = 1.0
    if known:
        sums = [torch.stack([each[name].sum() for name in known]) for each in (costs, relative)]
        factor = float(sums[0].sum() / sums[1].sum())
    return {n: (costs[n] if n not in left else factor * relative[n]).tolist() for n in costs}
