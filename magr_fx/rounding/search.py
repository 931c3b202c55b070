"""Which alpha and which clip serve each row best, under the rounding that will be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from magr_fx.config import MagRConfig
from magr_fx.grams.gram import row_errors
from magr_fx.iterations.admm import AllGatherRows
from magr_fx.iterations.solution import Solution, Status
from magr_fx.machine.matmul_precision import full_float32
from magr_fx.rounding.rounding import Rounded, Rounding
from magr_fx.solver.row_scale import row_scale
from magr_fx.solver.solver import solve_magr_path

# Penalties a factor 4 apart, from where 2 bits want them to where 4 bits do, for whole rows and for
# groups (benchmarks/README.md), relative to the rows' size. 0, the row as it is, is always among
# them.
ALPHAS = (1.2e-1, 3e-2, 8e-3, 2e-3)
ALPHAS_GROUPS = (2.4e-2, 6e-3, 1.5e-3, 4e-4)
# Shares of each row's, or group's, largest magnitude that are tried with every alpha; then what is
# tried around each row's best, once up and once down.
CLIPS = (1.0, 0.8, 0.6)
FINER = (0.1, 0.05)
# For groups that can be clipped by themselves after their row has chosen.
FINER_GROUPS = (0.2, 0.1, 0.05)
LEAST_CLIP = 0.05
# What float32 sums in another order may differ by.
RELATIVE_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Choice:
    """What each row chose, or each of its groups."""

    rounded: Rounded
    alpha: Tensor  # [out, groups], float32: 0 where it was not shrunk
    clip: Tensor  # [out, groups], float32: share of the largest magnitude that was kept
    status: Tensor  # [out], int8: values of Status, the worst of the solves with those alphas
    steps: Tensor  # [out], int32: the most of them
    error: Tensor  # [out], float32: (v - a)ᵀG(v - a), summed over what has to choose together

    def rows(self, part: slice) -> Choice:
        """Those rows of it."""
        return self.mapped(lambda numbers: numbers[part])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Choice:
        """With each of its tensors, whose first dimension is the rows, changed."""
        values, parts = self.rounded
        rounded = Rounded(change(values), tuple(map(change, parts)))
        rest = (self.alpha, self.clip, self.status, self.steps, self.error)
        return Choice(rounded, *map(change, rest))


def joined(choices: Sequence[Choice]) -> Choice:
    """Those of several pieces of a weight, one below the other."""
    if len(choices) == 1:
        return choices[0]
    values, parts = zip(*(choice.rounded for choice in choices), strict=True)
    rounded = Rounded(torch.cat(values), tuple(map(torch.cat, zip(*parts, strict=True))))
    rest = ("alpha", "clip", "status", "steps", "error")
    return Choice(rounded, *(torch.cat([getattr(c, name) for c in choices]) for name in rest))


@torch.no_grad()
def choose(
    target_weight: Tensor,
    gram: Tensor,
    rounding: Rounding,
    rtn: Rounded,
    config: MagRConfig,
    *,
    dtype: torch.dtype,
    units: Sequence[int] | None = None,
    all_gather_rows: AllGatherRows | None = None,
) -> Choice:
    """Solve for the config's alpha, or for a path of them, and round; each row keeps its best.

    Args:
        target_weight: a, ``[out, in]`` float32: what the quantized rows v should do the same as.
        gram: G, ``[in, in]`` float32, regularised.
        rounding: how rows are rounded.
        rtn: what the quantizer alone makes of the weight. With ``alpha="auto"`` no row ends
            with a larger output error (v - a)ᵀG(v - a) than this has, but for float32 rounding.
            That G is the regularised one: by the gram itself a row may end above, by what
            regularises it times the squared distance from ``start`` to a at most.
        config: its alpha, group size and solver.
        dtype: of the weight that the quantizer is given.
        units: as for :class:`Search`.
        all_gather_rows: as for :func:`magr_fx.solve_magr_path`; not with ``units``.

    Raises:
        MagRError: as :func:`magr_fx.solve_magr`.
    """
    group_size = config.group_size or target_weight.shape[1]
    scale = None if config.is_published else row_scale(target_weight, units)
    search = Search(target_weight, gram, rounding, dtype=dtype, group_size=group_size, units=units)
    if config.alpha != "auto":
        solution = None
        if config.penalty:
            (solution,) = _path(
                target_weight, gram, [config.penalty], config, scale, all_gather_rows
            )
        search.add(config.penalty, solution)
        search.take_only()
        return search.choice()
    search.start(rtn)
    search.add(0.0)
    alphas = ALPHAS if config.group_size is None else ALPHAS_GROUPS
    path = _path(target_weight, gram, alphas, config, scale, all_gather_rows)
    for alpha, solution in zip(alphas, path, strict=True):
        search.add(alpha, solution)
    search.try_each(CLIPS)
    separable = not rounding.makes_codes and config.group_size is not None and units is None
    if separable:
        search.refine_groups(FINER_GROUPS)
    else:
        search.refine(FINER)
    if rounding.makes_codes:
        search.try_aim()
    else:
        search.requantize_and_revert_worse(rtn)
    return search.choice()


def _path(
    target_weight: Tensor,
    gram: Tensor,
    alphas: Sequence[float],
    config: MagRConfig,
    scale: Tensor | None,
    all_gather_rows: AllGatherRows | None,
) -> list[Solution]:
    options = config.resolved()
    return solve_magr_path(
        target_weight,
        gram,
        alphas,
        group_size=options.group_size,
        solver=options.solver,
        max_steps=options.max_steps,
        tol=options.tol,
        precision=options.precision,
        row_scale=scale,
        all_gather_rows=all_gather_rows,
        exact=False,  # rows are judged by what is left of them after rounding
    )


class Search:
    """The best candidate of each row so far, and what else there is to try.

    A candidate is a row of some alpha, clamped to a share of its largest magnitude; clamping makes
    the quantizer choose a finer step. It is worth its output error (v - a)ᵀG(v - a) after rounding
    to v. Rows are independent of each other, so each keeps its own best.

    Args:
        target_weight: a, ``[out, in]`` float32: what the quantized rows v should do the same as.
        gram: G, ``[in, in]`` float32, regularised.
        rounding: how rows are rounded.
        dtype: of the weight that the quantizer is given.
        group_size: inputs that share a step; ``in`` for whole rows.
        units: numbers of rows that share a step, such as those of whole tensors, and so have to
            choose together; None where every row has its own.
    """

    def __init__(
        self,
        target_weight: Tensor,
        gram: Tensor,
        rounding: Rounding,
        *,
        dtype: torch.dtype,
        group_size: int,
        units: Sequence[int] | None = None,
    ) -> None:
        self.target_weight, self.gram, self.rounding = target_weight, gram, rounding
        self.dtype, self.group_size, self.units = dtype, group_size, units
        rows, groups = len(target_weight), target_weight.shape[1] // group_size
        self.sources: list[_Source] = []
        self.best = torch.full((rows,), torch.inf, dtype=torch.float32, device=target_weight.device)
        # -1: the weight as it was
        self.source = torch.full((rows, groups), -1, device=target_weight.device)
        self.clip = torch.ones(rows, groups, dtype=torch.float32, device=target_weight.device)
        self.values = target_weight.new_empty(0)
        self.parts: tuple[Tensor, ...] = ()

    @full_float32()
    def start(self, rounded: Rounded) -> None:
        """The first candidate: no row ends above its error."""
        self.values = rounded.values.clone()
        self.parts = tuple(part.clone() for part in rounded.parts)
        self.best = self._errors(rounded.values)

    @full_float32()
    def take_only(self) -> None:
        """The one source as it is, without a choice."""
        rows = self.sources[0].rows
        self.values, self.parts = self.rounding(rows, rows.to(self.dtype))
        self.best = self._errors(self.values)
        self.source = torch.zeros_like(self.source)

    def add(self, alpha: float, solution: Solution | None = None) -> None:
        """One more alpha to choose from; without a solution it is the aim itself."""
        if solution is None:
            like = torch.zeros(
                len(self.target_weight), dtype=torch.int32, device=self.target_weight.device
            )
            self.sources.append(
                _Source(alpha, self.target_weight, like + int(Status.TRIVIAL), like)
            )
        else:
            rows = solution.weight.to(torch.float32)
            self.sources.append(_Source(alpha, rows, solution.status.int(), solution.steps))

    @full_float32()
    def try_each(self, clips: Sequence[float]) -> None:
        """Every source with every clip, the same for all rows."""
        tried = [(at, clip) for at in range(len(self.sources)) for clip in clips]
        rounded = self.rounding.each(
            (rows, self._clipped(rows, self.clip.new_full((), clip).expand_as(self.clip)))
            for rows, clip in ((self.sources[at].rows, clip) for at, clip in tried)
        )
        for (at, clip), candidate in zip(tried, rounded, strict=True):
            self._keep_better(candidate, at, clip)

    @full_float32()
    def refine(self, steps: Sequence[float]) -> None:
        """Clips around each row's best, with the source that the row has chosen."""
        for step in steps:
            source = self.source.clamp(min=0)
            rows = self._of_source(source)
            clips = [(self.clip + change).clamp_(LEAST_CLIP, 1.0) for change in (step, -step)]
            rounded = self.rounding.each((rows, self._clipped(rows, clip)) for clip in clips)
            for clip, candidate in zip(clips, rounded, strict=True):
                self._keep_better(candidate, source, clip)

    @full_float32()
    def try_aim(self) -> None:
        """The aim itself, rounded to the grid of each row's choice.

        A rounding that compensates makes up for the rows that it is given. Mostly it ends closer
        to the aim from a row that was shrunk, whose large entries all others make up for, than
        from the aim, whose large entries leave that to the inputs after them; not always.
        """
        source = self.source.clamp(min=0)
        clipped = self._clipped(self._of_source(source), self.clip)
        self._keep_better(self.rounding(self.target_weight, clipped), source, self.clip)

    @full_float32()
    def refine_groups(self, steps: Sequence[float]) -> None:
        """Clips, and then alphas, group by group; only where the parts are one weight.

        The groups of a row are coupled by the gram: each in turn takes the candidate's numbers
        where that lowers the error of its whole row, the other groups as they stand (a
        Gauss-Seidel sweep), so that no sweep raises the error of a row.
        """
        slope = (self.values - self.target_weight) @ self.gram
        chosen = self.source.clamp(min=0)
        rows = self._of_source(chosen)
        for step in steps:
            clip = self.clip.clone()
            for change in (step, -step):
                self._sweep(rows, chosen, (clip + change).clamp_(LEAST_CLIP, 1.0), slope)
        for at, source in enumerate(self.sources):
            self._sweep(source.rows, torch.full_like(chosen, at), self.clip.clone(), slope)
        self.best = self._errors(self.values)

    @full_float32()
    def requantize_and_revert_worse(self, rtn: Rounded) -> None:
        """Round the chosen rows all at once; where that is worse than ``rtn``, go back to it.

        A quantizer may look at more than a row's own numbers: HQQ stops iterating when the last
        row has settled. Only where the parts are one weight; ends, since rows only go back.
        """
        limit = self._errors(rtn.values)
        limit += RELATIVE_ROUNDING * limit
        while True:
            rounded = self.rounding(self.parts[0].to(torch.float32), self.parts[0])
            self.values, self.best = rounded.values, self._errors(rounded.values)
            worse, changed = self.best > limit, (self.source >= 0).any(-1)
            if not bool(worse.any() & changed.any()):
                return
            if bool((worse & ~changed).any()):  # at the start, and worse: the others disturb it
                worse = changed
            self._take(rtn, worse, -1, 1.0)

    def choice(self) -> Choice:
        """What each row has chosen."""
        source, touched = self.source.clamp(min=0), self.source >= 0
        rows = torch.arange(len(source), device=source.device).unsqueeze(-1)
        status = torch.stack([s.status for s in self.sources])[source, rows]
        steps = torch.stack([s.steps for s in self.sources])[source, rows]
        alphas = torch.tensor([s.alpha for s in self.sources], device=source.device)[source]
        alphas = torch.where(touched, alphas, 0)
        return Choice(
            Rounded(self.values, self.parts),
            alphas,
            self.clip,
            _worst(torch.where(alphas > 0, status, int(Status.TRIVIAL))),
            torch.where(alphas > 0, steps, 0).amax(-1),
            self.best,
        )

    def _keep_better(self, rounded: Rounded, source: Tensor | int, clip: Tensor | float) -> None:
        """Take the rows of a candidate that are better than the best so far."""
        errors = self._errors(rounded.values)
        better = errors < self.best
        self.best = torch.where(better, errors, self.best)
        self._take(rounded, better, source, clip)

    def _take(
        self, rounded: Rounded, chosen: Tensor, source: Tensor | int, clip: Tensor | float
    ) -> None:
        column = chosen.unsqueeze(-1)
        self.values = torch.where(column, rounded.values, self.values)
        self.parts = tuple(
            torch.where(column, new, old)
            for new, old in zip(rounded.parts, self.parts, strict=True)
        )
        self.source = torch.where(column, source, self.source)
        self.clip = torch.where(column, clip, self.clip)

    def _sweep(self, rows: Tensor, source: Tensor, clip: Tensor, slope: Tensor) -> None:
        """Take single groups of these rows, which are of ``source`` ``[out, groups]``.

        ``slope`` is (v - a)G, kept up to date.
        """
        rounded = self.rounding(rows, self._clipped(rows, clip))
        (weight,) = self.parts
        for group in range(clip.shape[1]):
            inputs = slice(group * self.group_size, (group + 1) * self.group_size)
            change = rounded.values[:, inputs] - self.values[:, inputs]
            gain = change @ self.gram[inputs, inputs]
            gain = ((gain + 2 * slope[:, inputs]) * change).sum(-1)
            better = (gain < 0).unsqueeze(-1)
            slope.addmm_(change * better, self.gram[inputs])
            new = rounded.parts[0][:, inputs]
            weight[:, inputs] = torch.where(better, new, weight[:, inputs])
            self.values[:, inputs] += change * better
            better = better.squeeze(-1)
            self.clip[:, group] = torch.where(better, clip[:, group], self.clip[:, group])
            self.source[:, group] = torch.where(better, source[:, group], self.source[:, group])

    def _clipped(self, rows: Tensor, clip: Tensor) -> Tensor:
        """The rows clamped to shares ``[out, groups]`` of what their step is made from."""
        grouped = rows.view(*self.clip.shape, self.group_size)
        largest = grouped.abs().amax(-1)
        if self.units is not None:
            parts = torch.split(largest, list(self.units))
            largest = torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in parts])
        limit = (largest * clip).unsqueeze(-1)
        return grouped.clamp(-limit, limit).view(rows.shape).to(self.dtype)

    def _errors(self, values: Tensor) -> Tensor:
        errors = row_errors(values - self.target_weight, self.gram)
        if self.units is None:
            return errors
        return torch.cat([e.sum().expand_as(e) for e in torch.split(errors, list(self.units))])

    def _of_source(self, source: Tensor) -> Tensor:
        """Each group of each row from its own source, ``[out, groups]``."""
        shape = (*source.shape, self.group_size)
        rows = self.sources[0].rows.view(shape)
        for at, candidate in enumerate(self.sources[1:], start=1):
            rows = torch.where((source == at).unsqueeze(-1), candidate.rows.view(shape), rows)
        return rows.view_as(self.target_weight)


def _worst(status: Tensor) -> Tensor:
    """Of each row's groups ``[out, groups]``, the status that says most of what went wrong."""
    order = (Status.TRIVIAL, Status.CONVERGED, Status.STEP_LIMIT, Status.FAILED)
    rank = torch.full_like(status, 0)
    for at, kind in enumerate(order):
        rank = torch.where(status == int(kind), at, rank)
    values = torch.tensor([int(kind) for kind in order], dtype=torch.int8, device=status.device)
    return values[rank.amax(-1).long()]


class _Source(NamedTuple):
    """The rows of one alpha, ``[out, in]`` float32, and how their solve ended."""

    alpha: float
    rows: Tensor
    status: Tensor  # [out], int32
    steps: Tensor  # [out], int32
