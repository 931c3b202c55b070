"""The search for the best alpha and clip of each row, under the rounding that will be used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magr_fx.config import MagRConfig
from magr_fx.grams.gram import row_errors
from magr_fx.iterations.admm import AllGatherRows
from magr_fx.iterations.solution import Solution, Status
from magr_fx.machine.matmul_precision import full_float32
from magr_fx.rounding.rounding import Candidate, Rounded, Rounding
from magr_fx.solver.row_scale import row_scale
from magr_fx.solver.solver import solve_magr_path

# The alphas that are tried, for whole rows and for groups, relative to the rows' scale. They are a
# factor 4 apart, from the best ones at 2 bits to the best ones at 4 bits (benchmarks/README.md).
# 0 is tried as well: the unchanged row.
ALPHAS = (1.2e-1, 3e-2, 8e-3, 2e-3)
ALPHAS_GROUPS = (2.4e-2, 6e-3, 1.5e-3, 4e-4)
# Clips, as shares of the largest magnitude of a row or group. CLIPS are tried with every alpha.
# Then each step of FINER is added to, and subtracted from, the best clip of each row so far.
CLIPS = (1.0, 0.8, 0.6)
FINER = (0.1, 0.05)
# The same steps for groups that are clipped independently after their row has been chosen.
FINER_GROUPS = (0.2, 0.1, 0.05)
LEAST_CLIP = 0.05
# Which alphas a weight needs is seen on a sample of its rows, with fewer clips. An alpha has to
# lower the error by this share.
WORTHWHILE = 0.005
SAMPLE_CLIPS = (1.0, 0.8)
HOPELESS = 1e3  # the error of a row relative to its least one counts as this at most
# The relative difference between float32 sums in different orders.
RELATIVE_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Choice:
    """The alpha, clip and quantized values that were chosen for each row, or each of its groups."""

    rounded: Rounded
    alpha: Tensor  # [out, groups], float32: 0 where it was not shrunk
    clip: Tensor  # [out, groups], float32: the limit as a share of the largest magnitude
    status: Tensor  # [out], int8: values of Status, the worst of the solves with those alphas
    steps: Tensor  # [out], int32: the most steps of those solves
    error: Tensor  # [out], float32: (v - a)ᵀG(v - a), summed over the rows of a unit

    def rows(self, part: slice) -> Choice:
        """The choice for some of the rows."""
        return self.mapped(lambda numbers: numbers[part])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Choice:
        """This choice with ``change`` applied to each tensor, whose first dimension is the rows."""
        values, parts = self.rounded
        rounded = Rounded(change(values), tuple(map(change, parts)))
        rest = (self.alpha, self.clip, self.status, self.steps, self.error)
        return Choice(rounded, *map(change, rest))


def joined(choices: Sequence[Choice]) -> Choice:
    """The choice for a weight from those for its pieces, in the order of the rows."""
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
    alphas: Sequence[float] | None = None,
    units: Sequence[int] | None = None,
    all_gather_rows: AllGatherRows | None = None,
) -> Choice:
    """Solve for the config's alpha, or for several alphas, and round; each row keeps its best.

    Args:
        target_weight: a, ``[out, in]`` float32: the rows whose outputs the quantized rows v should
            reproduce.
        gram: G, ``[in, in]`` float32, with damping.
        rounding: how rows are rounded.
        rtn: the result of the quantizer alone. With ``alpha="auto"`` no row ends with a larger
            output error (v - a)ᵀG(v - a) than this has, up to float32 rounding. This G includes
            the damping. With the gram itself the error of a row can be larger, at most by the
            damping times the squared distance from ``rtn`` to a.
        config: its alpha, group size and solver options are used.
        dtype: the dtype of the weight that the quantizer gets.
        alphas: which to try with ``alpha="auto"``, such as those of :func:`best_alphas`; None tries
            0 and all others.
        units: as for :class:`Search`.
        all_gather_rows: as for :func:`magr_fx.solve_magr_path`; not with ``units``.

    Raises:
        MagRError: as for :func:`magr_fx.solve_magr`.
    """
    group_size = config.group_size or target_weight.shape[1]
    search = Search(target_weight, gram, rounding, dtype=dtype, group_size=group_size, units=units)
    if config.alpha != "auto":
        search.add_path(config, [config.penalty], all_gather_rows)
        search.take_only()
        return search.choice()
    search.start(rtn)
    search.add_path(config, all_alphas(config) if alphas is None else alphas, all_gather_rows)
    search.try_sources(CLIPS)
    separable = not rounding.makes_codes and config.group_size is not None and units is None
    if separable:
        search.refine_groups(FINER_GROUPS)
    else:
        search.refine(FINER)
    if rounding.makes_codes:
        search.try_target_weight()
    else:
        search.requantize_and_revert_worse(rtn)
    return search.choice()


def all_alphas(config: MagRConfig) -> tuple[float, ...]:
    """Every alpha that ``alpha="auto"`` may choose: 0 first, then from the largest down."""
    return (0.0, *(ALPHAS if config.group_size is None else ALPHAS_GROUPS))


@torch.no_grad()
def best_alphas(
    sample: Tensor, gram: Tensor, rounding: Rounding, config: MagRConfig, *, dtype: torch.dtype
) -> list[float]:
    """The alphas that are worth trying on a weight, by a sample of its rows.

    The first is best for the sample as a whole. Others follow as long as one lowers the sum of the
    rows' relative errors, each row with its best alpha so far, by more than :data:`WORTHWHILE`.

    Args:
        sample: a of some rows, ``[rows, in]`` float32.
        gram: as for :func:`choose`.
        rounding: how these rows are rounded.
        config: with ``alpha="auto"``.
        dtype: of the weight.
    """
    alphas = all_alphas(config)
    group_size = config.group_size or sample.shape[1]
    search = Search(sample, gram, rounding, dtype=dtype, group_size=group_size)
    search.add_path(config, alphas)
    errors = search.errors_of_sources(SAMPLE_CLIPS)
    errors = torch.where(errors.isfinite(), errors, torch.inf)
    least = errors.amin(0)
    errors /= least.clamp(min=torch.finfo(torch.float32).tiny)
    errors = errors.nan_to_num(HOPELESS).clamp_(max=HOPELESS)  # inf/inf is NaN
    errors[:, ~least.isfinite()] = 1  # such rows do not choose
    chosen = [int(errors.mean(-1).argmin())]
    while True:
        best = errors[chosen].amin(0)
        means = torch.minimum(errors, best).mean(-1)
        further = int(means.argmin())
        if means[further] * (1 + WORTHWHILE) >= best.mean():
            return [alphas[at] for at in sorted(chosen)]
        chosen.append(further)


class Search:
    """The best candidate of each row so far, and methods that try more candidates.

    A candidate is the solution of a row for some alpha (its source), clamped to a share of its
    largest magnitude. Clamping makes the quantizer choose a smaller step. Candidates are compared
    by their output error (v - a)ᵀG(v - a) after rounding to v. Rows are independent, so each keeps
    its own best.

    Args:
        target_weight: a, ``[out, in]`` float32: the rows whose outputs the quantized rows v should
            reproduce.
        gram: G, ``[in, in]`` float32, with damping.
        rounding: how rows are rounded.
        dtype: the dtype of the weight that the quantizer gets.
        group_size: inputs that share a step; ``in`` for whole rows.
        units: the numbers of consecutive rows that share a step, such as those of whole tensors;
            these rows get one alpha and one clip. None if every row has its own step.
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
        # The index of the source; -1 is the first candidate, see start
        self.source = torch.full((rows, groups), -1, device=target_weight.device)
        self.clip = torch.ones(rows, groups, dtype=torch.float32, device=target_weight.device)
        # 1 if the side below 0 is clipped to less than the side above, -1 the other way round
        self.lean = torch.zeros_like(self.clip)
        self.values = target_weight.new_empty(0)
        self.parts: tuple[Tensor, ...] = ()

    @full_float32()
    def start(self, rounded: Rounded) -> None:
        """Set the first candidate; no row ends with a larger error than this."""
        self.values = rounded.values.clone()
        self.parts = tuple(part.clone() for part in rounded.parts)
        self.best = self._errors(rounded.values)

    @full_float32()
    def take_only(self) -> None:
        """Take the only source, without a clip and without a comparison."""
        rows = self.sources[0].rows
        self.values, self.parts = self.rounding(rows, rows.to(self.dtype))
        self.best = self._errors(self.values)
        self.source = torch.zeros_like(self.source)

    def add_path(
        self,
        config: MagRConfig,
        alphas: Sequence[float],
        all_gather_rows: AllGatherRows | None = None,
    ) -> None:
        """Add the solution for each alpha as a source; for alpha 0 it is ``target_weight``."""
        options = config.resolved()
        positive = [alpha for alpha in alphas if alpha > 0]
        path = iter(
            solve_magr_path(
                self.target_weight,
                self.gram,
                positive,
                group_size=options.group_size,
                solver=options.solver,
                max_steps=options.max_steps,
                tol=options.tol,
                precision=options.precision,
                row_scale=None
                if config.is_published
                else row_scale(self.target_weight, self.units),
                all_gather_rows=all_gather_rows,
                exact=False,  # the rows are compared after rounding anyway
            )
            if positive
            else ()
        )
        for alpha in alphas:
            self.add(alpha, next(path) if alpha > 0 else None)

    def add(self, alpha: float, solution: Solution | None = None) -> None:
        """Add the rows of one alpha as a source; without a solution these are ``target_weight``."""
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
    def try_sources(self, clips: Sequence[float]) -> None:
        """Try every source with every clip, the same for all rows, and on the rounding's grids."""
        for candidate in self._of_sources(clips):
            self._keep_better(candidate)

    @full_float32()
    def errors_of_sources(self, clips: Sequence[float]) -> Tensor:
        """The least error of every row with each source, ``[sources, out]``, tried likewise."""
        least = torch.full_like(self.best, torch.inf).expand(len(self.sources), -1).clone()
        for candidate in self._of_sources(clips):
            errors = self._errors(candidate.rounded.values)
            torch.minimum(least[candidate.source], errors, out=least[candidate.source])
        return least

    @full_float32()
    def refine(self, steps: Sequence[float]) -> None:
        """Try clips around the best one of each row, with the source of its best candidate."""
        for step in steps:
            source = self.source.clamp(min=0)
            rows = self._of_source(source)
            clips = [(self.clip + change).clamp_(LEAST_CLIP, 1.0) for change in (step, -step)]
            for candidate in self._round(_Clipped(rows, source, c, self.lean) for c in clips):
                self._keep_better(candidate)

    @full_float32()
    def try_target_weight(self) -> None:
        """Try ``target_weight`` itself, rounded to the grid of each row's best candidate.

        GPTQ compensates errors relative to the rows that it gets. It mostly ends closer to
        ``target_weight`` if it gets a shrunk row: there all other inputs compensate the change of
        a large entry. In ``target_weight`` itself only the inputs after a large entry compensate
        its error. But that is sometimes better.
        """
        rounded = self.rounding.on_grid_of(self.parts, self.target_weight, self.dtype)
        self._keep_better(_Candidate(rounded, self.source, self.clip, self.lean))

    @full_float32()
    def refine_groups(self, steps: Sequence[float]) -> None:
        """Try clips, and then alphas, group by group; only if the rounding makes a weight.

        The gram couples the groups of a row. Each group in turn takes the candidate's numbers if
        that lowers the error of the whole row, with the other groups fixed (a Gauss-Seidel sweep).
        So no sweep raises the error of a row.
        """
        slope = (self.values - self.target_weight) @ self.gram
        chosen = self.source.clamp(min=0)
        rows = self._of_source(chosen)
        for step in steps:
            clip = self.clip.clone()
            for change in (step, -step):
                changed = (clip + change).clamp_(LEAST_CLIP, 1.0)
                self._sweep(_Clipped(rows, chosen, changed, self.lean.clone()), slope)
        for at, source in enumerate(self.sources):
            whole = torch.full_like(chosen, at)
            for lean in self._leans(source.rows, self.clip):
                self._sweep(_Clipped(source.rows, whole, self.clip.clone(), lean), slope)
        self.best = self._errors(self.values)

    @full_float32()
    def requantize_and_revert_worse(self, rtn: Rounded) -> None:
        """Round the chosen rows together; rows that are then worse than ``rtn`` revert to it.

        In some quantizers the result of a row depends on the other rows: HQQ stops iterating when
        the last row has converged. Only for roundings that make a weight. The loop ends, because
        every pass reverts at least one row.
        """
        limit = self._errors(rtn.values)
        limit += RELATIVE_ROUNDING * limit
        while True:
            rounded = self.rounding(self.parts[0].to(torch.float32), self.parts[0])
            self.values, self.best = rounded.values, self._errors(rounded.values)
            worse, changed = self.best > limit, (self.source >= 0).any(-1)
            if not bool(worse.any() & changed.any()):
                return
            if bool((worse & ~changed).any()):  # other rows disturb it: revert them all
                worse = changed
            self._take(_Candidate(rtn, -1, 1.0, 0.0), worse)

    def choice(self) -> Choice:
        """The best candidate of each row."""
        source, touched = self.source.clamp(min=0), self.source >= 0
        rows = torch.arange(len(source), device=source.device).unsqueeze(-1)
        status = torch.stack([s.status for s in self.sources])[source, rows]
        steps = torch.stack([s.steps for s in self.sources])[source, rows]
        tried = [s.alpha for s in self.sources]
        alphas = torch.tensor(tried, dtype=torch.float32, device=source.device)[source]
        alphas = torch.where(touched, alphas, 0)
        return Choice(
            Rounded(self.values, self.parts),
            alphas,
            self.clip,
            _worst(torch.where(alphas > 0, status, int(Status.TRIVIAL))),
            torch.where(alphas > 0, steps, 0).amax(-1),
            self.best,
        )

    def _of_sources(self, clips: Sequence[float]) -> Iterator[_Candidate]:
        """Every source with every clip, on both sides alike and leaning, and on fitted grids."""
        return self._round(
            _Clipped(source.rows, at, share, lean, fitted)
            for at, source in enumerate(self.sources)
            for fitted in ((False, True) if self.rounding.fits else (False,))
            for share in (self.clip.new_full(self.clip.shape, clip) for clip in clips)
            if not fitted or bool(share[0, 0] == 1)
            for lean in self._leans(source.rows, share)
        )

    def _leans(self, rows: Tensor, clip: Tensor) -> list[Tensor]:
        """0, and if the rounding asks for it the side of each group where less is lost."""
        even = torch.zeros_like(clip)
        if self.rounding.shorter is None or self.units is not None:
            return [even]
        lost = []
        for lean in (1.0, -1.0):
            clipped = self._clipped(_Clipped(rows, 0, clip, torch.full_like(clip, lean)))
            change = (rows - clipped).square_().mul_(self.gram.diagonal())
            lost.append(change.view(*clip.shape, -1).sum(-1))
        return [even, torch.where(lost[0] <= lost[1], 1.0, -1.0).to(clip)]

    def _round(self, candidates: Iterable[_Clipped]) -> Iterator[_Candidate]:
        waiting: deque[_Clipped] = deque()

        def remembered() -> Iterator[Candidate]:
            for one in candidates:
                waiting.append(one._replace(rows=self.values))  # frees the rows
                yield Candidate(one.rows, self._clipped(one), one.fitted)

        for rounded in self.rounding.each(remembered()):
            one = waiting.popleft()
            yield _Candidate(rounded, one.source, one.clip, one.lean)

    def _keep_better(self, candidate: _Candidate) -> None:
        """Take the rows of a candidate that have a smaller error than the best so far."""
        errors = self._errors(candidate.rounded.values)
        better = errors < self.best
        self.best = torch.where(better, errors, self.best)
        self._take(candidate, better)

    def _take(self, candidate: _Candidate, chosen: Tensor) -> None:
        column = chosen.unsqueeze(-1)
        rounded, source, clip, lean = candidate
        self.values = torch.where(column, rounded.values, self.values)
        self.parts = tuple(
            torch.where(column, new, old)
            for new, old in zip(rounded.parts, self.parts, strict=True)
        )
        self.source = torch.where(column, source, self.source)
        self.clip = torch.where(column, clip, self.clip)
        self.lean = torch.where(column, lean, self.lean)

    def _sweep(self, candidate: _Clipped, slope: Tensor) -> None:
        """Take those groups of a candidate that lower the error of their row.

        Its source is ``[out, groups]``. ``slope`` is (v - a)G, and is updated.
        """
        rounded = self.rounding(candidate.rows, self._clipped(candidate))
        (weight,) = self.parts
        for group in range(self.clip.shape[1]):
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
            for kept, other in (
                (self.source, candidate.source),
                (self.clip, candidate.clip),
                (self.lean, candidate.lean),
            ):
                kept[:, group] = torch.where(better, other[:, group], kept[:, group])

    def _clipped(self, candidate: _Clipped) -> Tensor:
        """The rows clamped to shares ``[out, groups]`` of the magnitude that sets their step."""
        rows, _, clip, lean, _ = candidate
        grouped = rows.view(*self.clip.shape, self.group_size)
        largest = grouped.abs().amax(-1)
        if self.units is not None:
            parts = torch.split(largest, list(self.units))
            largest = torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in parts])
        high = largest * clip
        low = -high
        if self.rounding.shorter is not None:
            short = self.rounding.shorter * high
            low, high = torch.where(lean > 0, -short, low), torch.where(lean < 0, short, high)
        clamped = grouped.clamp(low.unsqueeze(-1), high.unsqueeze(-1))
        return clamped.view(rows.shape).to(self.dtype)

    def _errors(self, values: Tensor) -> Tensor:
        errors = row_errors(values - self.target_weight, self.gram)
        if self.units is None:
            return errors
        return torch.cat([e.sum().expand_as(e) for e in torch.split(errors, list(self.units))])

    def _of_source(self, source: Tensor) -> Tensor:
        """The rows ``[out, in]`` with each group from its own source ``[out, groups]``."""
        shape = (*source.shape, self.group_size)
        rows = self.sources[0].rows.view(shape)
        for at, candidate in enumerate(self.sources[1:], start=1):
            rows = torch.where((source == at).unsqueeze(-1), candidate.rows.view(shape), rows)
        return rows.view_as(self.target_weight)


def _worst(status: Tensor) -> Tensor:
    """The worst status among the groups ``[out, groups]`` of each row."""
    order = (Status.TRIVIAL, Status.CONVERGED, Status.STEP_LIMIT, Status.FAILED)
    rank = torch.full_like(status, 0)
    for at, kind in enumerate(order):
        rank = torch.where(status == int(kind), at, rank)
    values = torch.tensor([int(kind) for kind in order], dtype=torch.int8, device=status.device)
    return values[rank.amax(-1).long()]


class _Source(NamedTuple):
    """The solution for one alpha, ``[out, in]`` float32, and how the solve of each row ended."""

    alpha: float
    rows: Tensor
    status: Tensor  # [out], int32
    steps: Tensor  # [out], int32


class _Clipped(NamedTuple):
    """Rows to round, from a source, with a clip."""

    rows: Tensor  # [out, in], float32
    source: Any  # its index, or those of the groups, [out, groups]
    clip: Tensor  # [out, groups]
    lean: Tensor  # [out, groups], as in Search
    fitted: bool = False  # on a grid that is fitted to the rows


class _Candidate(NamedTuple):
    """Rounded rows, with their sources and clips: ``[out, groups]``, or one for all."""

    rounded: Rounded
    source: Any
    clip: Any
    lean: Any
