"""solution → weights: check a solution, and write it into the site's part of its parameter."""

from __future__ import annotations

import torch

from magr_fx.iterations.solution import Solution, Status
from magr_fx.passes.finding.find_linears import Site


def refusal(solution: Solution) -> str | None:
    """The reason why a solution must not be written, or None.

    It must be finite, and no row's objective may be higher than that of the original weight.
    """
    failed = int((solution.status == Status.FAILED).sum())
    if failed:
        return f"{failed} of {solution.status.numel()} rows: {Status.FAILED.sentence}"
    if not bool(solution.weight.isfinite().all()):
        return "the solution is not finite"
    worse = int((solution.objective > solution.objective_before).sum())
    if worse:
        return f"{worse} of {solution.status.numel()} rows have a higher objective than before"
    return None


@torch.no_grad()
def rewrite_weight(site: Site, weight: torch.Tensor) -> None:
    """Write ``weight`` ``[out, in]`` into the site's elements of its parameter, in place.

    The Parameter object, its dtype, device, strides and ``requires_grad`` stay; a weight that is
    stored transposed, or as a slice, is written where it is stored.
    """
    site.weight.copy_(weight)


@torch.no_grad()
def laid_out(site: Site, weight: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """A copy of ``stored`` in the parameter's layout, with ``weight`` in the site's elements."""
    parameter, view = site.parameter, site.view
    copy = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
    )
    copy.copy_(stored)
    part = copy.as_strided(view.shape, view.stride, view.offset - parameter.storage_offset())
    part.copy_(weight)
    return copy
