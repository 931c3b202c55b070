"""The choice of each row: never worse than the start, and really what is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from grid_helpers import energies, float32_slack, make_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_helpers import problem
from torch import Tensor

from magr_fx.config import SEARCH_TOL, MagRConfig
from magr_fx.iterations.solution import Solution, Status
from magr_fx.rounding.gptq import compensation, gptq
from magr_fx.rounding.grid import Grid
from magr_fx.rounding.rounding import Candidate, Nearest, OnGrid, Rounded
from magr_fx.rounding.search import (
    ALPHAS,
    ALPHAS_GROUPS,
    CLIPS,
    FINER,
    FINER_GROUPS,
    WORTHWHILE,
    Choice,
    Search,
    _Clipped,
    _worst,
    all_alphas,
    best_alphas,
    choose,
)
from magr_fx.solver.row_scale import row_scale
from magr_fx.solver.solver import solve_magr, solve_magr_path

pytestmark = pytest.mark.usefixtures("one_thread")
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=25)

Quantize = Callable[[Tensor], Tensor]


def quantizer(bits: int, group_size: int | None, *, symmetric: bool) -> Quantize:
    """Round-to-nearest on a grid for each row or group."""

    def quantize(weight: Tensor) -> Tensor:
        grid = make_grid(weight, bits, group_size, symmetric=symmetric)
        return grid.values(grid.nearest(weight))

    return quantize


def per_tensor(bits: int, units: list[int]) -> Quantize:
    """One step for each of the stacked tensors."""

    def quantize(weight: Tensor) -> Tensor:
        parts = []
        for part in torch.split(weight, units):
            grid = make_grid(part.reshape(1, -1), bits)
            flat = part.reshape(1, -1)
            parts.append(grid.values(grid.nearest(flat)).view(part.shape))
        return torch.cat(parts)

    return quantize


def pursue(
    weight: Tensor,
    target_weight: Tensor,
    gram: Tensor,
    quantize: Quantize,
    group_size: int | None = None,
    units: list[int] | None = None,
) -> tuple[Choice, Tensor]:
    """alpha="auto" to the nearest; and the values that the start has."""
    start = quantize(weight)
    choice = choose(
        target_weight,
        gram,
        Nearest(quantize),
        Rounded(start, (weight,)),
        MagRConfig(alpha="auto", group_size=group_size),
        dtype=weight.dtype,
        units=units,
    )
    return choice, start


def on_grid(
    weight: Tensor, gram: Tensor, bits: int, group_size: int | None, *, symmetric: bool
) -> tuple[OnGrid, Rounded]:
    """GPTQ on the quantizer's grids, and what the quantizer alone makes of the weight."""

    def grid_of(clipped: Tensor) -> Grid:
        return make_grid(clipped, bits, group_size, symmetric=symmetric)

    grid = grid_of(weight)
    codes = grid.nearest(weight).to(torch.int8)
    start = Rounded(grid.values(codes), (codes, grid.scale, grid.zero_point))
    return OnGrid(grid_of, compensation(gram)), start


def other_aim(weight: Tensor, seed: int = 9, amount: float = 0.1) -> Tensor:
    """Near the weight, as what makes up for drifted inputs is."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight.float() + amount * noise


def distinct(numbers: Tensor) -> int:
    return len(set(numbers.flatten().tolist()))


def assert_no_row_is_worse(
    values: Tensor, start: Tensor, target_weight: Tensor, gram: Tensor
) -> None:
    limit = energies(start, target_weight, gram) * (1 + 2e-5)
    slack = float32_slack(values, target_weight, gram) + float32_slack(start, target_weight, gram)
    assert (energies(values, target_weight, gram) <= limit + slack).all()


@dataclass(frozen=True)
class Case:
    """A weight with its gram, and the grid that it is rounded to."""

    rows: int
    groups: int
    size: int
    bits: int
    grouped: bool
    symmetric: bool
    drifted: bool
    dtype: torch.dtype
    seed: int

    @property
    def group_size(self) -> int | None:
        return self.size if self.grouped else None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, what it is to become in float32, and the gram."""
        columns = self.groups * self.size
        weight, gram = problem(rows=self.rows, columns=columns, tokens=20, seed=self.seed)
        weight = weight.to(self.dtype)
        return weight, other_aim(weight, self.seed) if self.drifted else weight.float(), gram

    def check_fields(self, choice: Choice) -> None:
        check_fields(choice, self.rows, self.groups if self.grouped else 1, grouped=self.grouped)


cases = st.builds(
    Case,
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    size=st.integers(2, 8),
    bits=st.integers(2, 5),
    grouped=st.booleans(),
    symmetric=st.booleans(),
    drifted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)


# --- alpha="auto", to the nearest


@repeatable
@given(cases)
def test_no_row_is_worse_than_at_the_start(case: Case) -> None:
    weight, target_weight, gram = case.tensors()
    quantize = quantizer(case.bits, case.group_size, symmetric=case.symmetric)
    choice, start = pursue(weight, target_weight, gram, quantize, case.group_size)
    values, (chosen,) = choice.rounded
    assert_no_row_is_worse(values, start, target_weight, gram)
    # What is returned is what the quantizer makes of the returned weight.
    assert chosen.dtype == case.dtype
    assert values.dtype == torch.float32
    assert torch.equal(quantize(chosen), values)
    want, slack = energies(values, target_weight, gram), float32_slack(values, target_weight, gram)
    assert ((choice.error.double() - want).abs() <= slack + 1e-5 * want).all()
    case.check_fields(choice)


def check_fields(choice: Choice, rows: int, groups: int, *, grouped: bool) -> None:
    assert choice.status.shape == choice.steps.shape == (rows,)
    assert choice.alpha.shape == choice.clip.shape == (rows, groups)
    assert choice.status.dtype == torch.int8
    assert choice.steps.dtype == torch.int32
    assert choice.error.dtype == choice.alpha.dtype == choice.clip.dtype == torch.float32
    known = torch.tensor([0.0, *(ALPHAS_GROUPS if grouped else ALPHAS)])
    assert torch.isin(choice.alpha, known).all()
    assert ((choice.clip > 0) & (choice.clip <= 1)).all()
    unshrunk = (choice.alpha == 0).all(-1)
    assert (choice.status[unshrunk] == Status.TRIVIAL).all()
    assert (choice.steps[unshrunk] == 0).all()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_choice_helps(bits: int, group_size: int | None) -> None:
    weight, gram = problem(rows=30, columns=32, tokens=100)
    quantize = quantizer(bits, group_size, symmetric=True)
    choice, start = pursue(weight, weight, gram, quantize, group_size)
    ours, alone = (energies(v, weight, gram) for v in (choice.rounded.values, start))
    assert ours.sum() < 0.75 * alone.sum()
    assert (choice.alpha > 0).any()
    assert (choice.clip < 1).any()
    assert group_size is None or (choice.clip != choice.clip[:, :1]).any()
    shrunk = (choice.alpha > 0).any(-1)
    assert (choice.status[shrunk] != Status.TRIVIAL).any()
    assert (choice.steps[shrunk] > 0).any()


@repeatable
@given(
    rows=st.integers(1, 5),
    columns=st.integers(2, 20),
    bits=st.integers(2, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    drifted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_alpha_and_clip_reproduce_the_row(
    rows: int, columns: int, bits: int, dtype: torch.dtype, drifted: bool, seed: int
) -> None:
    weight, gram = problem(rows=rows, columns=columns, tokens=20, seed=seed)
    weight = weight.to(dtype)
    target_weight = other_aim(weight, seed) if drifted else weight.float()
    choice, _ = pursue(weight, target_weight, gram, quantizer(bits, None, symmetric=True))
    path = solve_magr_path(
        target_weight, gram, ALPHAS, tol=SEARCH_TOL, row_scale=row_scale(target_weight)
    )
    for row in range(rows):
        alpha, share = float(choice.alpha[row]), choice.clip[row]
        solved, status = target_weight[row], int(Status.TRIVIAL)
        if alpha:
            solution = path[[float(torch.tensor(a)) for a in ALPHAS].index(alpha)]
            solved, status = solution.weight[row], int(solution.status[row])
            assert int(choice.steps[row]) == int(solution.steps[row])
        limit = solved.abs().amax() * share
        again = solved.clamp(-limit, limit).to(dtype)
        chosen = choice.rounded.parts[0][row]
        as_it_was = not alpha and float(share) == 1 and torch.equal(chosen, weight[row])
        assert as_it_was or torch.equal(chosen, again)
        assert int(choice.status[row]) == status


def test_a_row_that_is_on_the_grid_stays() -> None:
    weight, gram = problem(rows=4, columns=8)
    quantize = quantizer(4, None, symmetric=False)
    grid = Grid(torch.ones(4, 1), torch.zeros(4, 1), -8, 7, torch.float32)
    weight = grid.values(grid.nearest(3 * weight))
    weight[:, 0], weight[:, 1] = -8, 7  # so that the step is 1
    assert torch.equal(quantize(weight), weight)
    choice, _ = pursue(weight, weight, gram, quantize)
    assert torch.equal(choice.rounded.parts[0], weight)
    assert (choice.error == 0).all()
    assert (choice.alpha == 0).all()
    assert (choice.clip == 1).all()
    assert (choice.status == Status.TRIVIAL).all()


def test_nothing_is_changed() -> None:
    weight, gram = problem(rows=6, columns=12)
    target_weight, quantize = other_aim(weight), quantizer(2, 4, symmetric=True)
    kept = [tensor.clone() for tensor in (weight, target_weight, gram)]
    first = Rounded(quantize(weight), (weight,))
    start = first.values.clone()
    config = MagRConfig(alpha="auto", group_size=4)
    backends: Any = torch.backends
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        modes = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
        try:
            choose(target_weight, gram, Nearest(quantize), first, config, dtype=weight.dtype)
            assert torch.get_float32_matmul_precision() == precision
            assert modes == (
                backends.cuda.matmul.fp32_precision,
                backends.mkldnn.matmul.fp32_precision,
            )
        finally:
            torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, kept, (weight, target_weight, gram)))
    assert torch.equal(first.values, start)


def test_no_graph_is_recorded() -> None:
    weight, gram = problem(rows=3, columns=8)
    parameter = torch.nn.Parameter(weight)
    choice, _ = pursue(parameter, parameter, gram, quantizer(3, None, symmetric=True))
    assert not choice.rounded.values.requires_grad
    assert not choice.rounded.parts[0].requires_grad


def test_rows_of_a_choice() -> None:
    weight, gram = problem(rows=6, columns=12)
    choice, _ = pursue(weight, weight, gram, quantizer(3, 4, symmetric=True), 4)
    part = choice.rows(slice(2, 5))
    assert torch.equal(part.rounded.values, choice.rounded.values[2:5])
    assert torch.equal(part.rounded.parts[0], choice.rounded.parts[0][2:5])
    for name in ("alpha", "clip", "status", "steps", "error"):
        assert torch.equal(getattr(part, name), getattr(choice, name)[2:5])


# --- the steps of a search, with candidates that are made by hand


def shrunk(target_weight: Tensor, share: float) -> Solution:
    """In the place of a solve: each row, limited to a share of its largest magnitude."""
    limit = share * target_weight.abs().amax(-1, keepdim=True)
    status = torch.full((len(target_weight),), int(Status.CONVERGED), dtype=torch.int8)
    nothing = torch.zeros(len(target_weight))
    steps = torch.full((len(target_weight),), 7, dtype=torch.int32)
    return Solution(target_weight.clamp(-limit, limit), status, steps, nothing, nothing, nothing)


def ready(
    weight: Tensor, gram: Tensor, quantize: Quantize, group_size: int | None = None
) -> tuple[Search, Rounded]:
    """A search that has not begun, with three alphas."""
    target_weight = weight.float()
    size = group_size or weight.shape[1]
    search = Search(target_weight, gram, Nearest(quantize), dtype=weight.dtype, group_size=size)
    start = Rounded(quantize(weight), (weight,))
    search.start(start)
    search.add(0.0)
    search.add(0.1, shrunk(target_weight, 0.9))
    search.add(0.2, shrunk(target_weight, 0.55))
    return search, start


@pytest.mark.parametrize("group_size", [None, 5])
def test_rows_choose_by_themselves(group_size: int | None) -> None:
    weight, gram = problem(rows=8, columns=20, tokens=60)

    def chosen(rows: list[int]) -> Choice:
        quantize = quantizer(3, group_size, symmetric=False)
        search, start = ready(weight[rows], gram, quantize, group_size)
        search.try_sources(CLIPS)
        search.refine(FINER)
        if group_size is not None:
            search.refine_groups(FINER_GROUPS)
        search.requantize_and_revert_worse(start)
        return search.choice()

    everything = chosen(list(range(8)))
    assert distinct(everything.alpha) > 1
    assert distinct(everything.clip) > 2
    for rows in ([0], [7, 3], [1, 2, 4, 5, 6]):
        found = chosen(rows)
        for name in ("alpha", "clip", "status", "steps"):
            assert torch.equal(getattr(found, name), getattr(everything, name)[rows])
        assert torch.equal(found.rounded.parts[0], everything.rounded.parts[0][rows])
        assert torch.allclose(found.error, everything.error[rows], rtol=1e-4)


def test_each_row_has_the_best_of_all_candidates() -> None:
    weight, gram = problem(rows=8, columns=20, tokens=60)
    quantize = quantizer(3, None, symmetric=True)
    search, start = ready(weight, gram, quantize)
    search.try_sources(CLIPS)
    choice = search.choice()
    every = [start.values]
    for source in search.sources:
        for clip in CLIPS:
            limit = clip * source.rows.abs().amax(-1, keepdim=True)
            every.append(quantize(source.rows.clamp(-limit, limit)))
    least = torch.stack([energies(values, weight, gram) for values in every]).amin(0)
    torch.testing.assert_close(choice.error.double(), least, rtol=1e-4, atol=0)
    want = energies(choice.rounded.values, weight, gram)
    torch.testing.assert_close(want, least, rtol=1e-4, atol=0)


@repeatable
@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 6),
    bits=st.integers(2, 4),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_no_step_raises_an_error(
    groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, gram = problem(rows=4, columns=groups * size, tokens=20, seed=seed)
    weight = weight.to(dtype)
    quantize = quantizer(bits, size, symmetric=symmetric)
    search, start = ready(weight, gram, quantize, size)
    before = start.values.clone()
    steps: list[Callable[[], None]] = [
        lambda: search.try_sources(CLIPS),
        lambda: search.refine(FINER),
        lambda: search.refine_groups(FINER_GROUPS[:1]),
        lambda: search.refine_groups(FINER_GROUPS[1:]),
    ]
    for step in steps:
        step()
        after = search.values.clone()
        slack = float32_slack(before, weight, gram) + float32_slack(after, weight, gram)
        was, now = (energies(values, weight, gram) for values in (before, after))
        assert (now <= was * (1 + 1e-5) + 2 * slack).all()
        assert ((search.best.double() - now).abs() <= 1e-5 * now + slack).all()
        # Groups that were taken one by one are still what the quantizer makes of them.
        made = quantize(search.parts[0])
        torch.testing.assert_close(after, made, rtol=1e-6, atol=1e-6)
        before = after


def test_one_group_takes_the_best_of_the_alphas() -> None:
    """With a single group, a sweep over the alphas is a plain comparison of whole rows."""
    weight, gram = problem(rows=12, columns=20, tokens=60)
    kept, quantize = weight.clone(), quantizer(3, None, symmetric=True)
    search, start = ready(weight, gram, quantize)
    search.refine_groups(())
    every = [start.values] + [quantize(source.rows) for source in search.sources]
    errors = torch.stack([energies(values, weight, gram) for values in every])
    found = energies(search.values, weight, gram)
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-4, atol=0)
    moved = (search.parts[0] != weight).any(-1)
    assert moved.any()
    assert not moved.all()
    assert torch.equal((search.source >= 0).squeeze(-1), moved)  # these can be put back
    assert torch.equal(weight, kept)


def test_a_group_that_took_a_shrunken_one_says_so() -> None:
    """Each group is what its own alpha and clip make of it, and the row tells of its solves."""
    weight, gram = problem(rows=16, columns=24, tokens=80)
    choice, _ = pursue(weight, weight, gram, quantizer(3, 6, symmetric=True), 6)
    scale = row_scale(weight)
    path = solve_magr_path(
        weight, gram, ALPHAS_GROUPS, group_size=6, tol=SEARCH_TOL, row_scale=scale, exact=False
    )
    solutions = {float(torch.tensor(a)): s for a, s in zip(ALPHAS_GROUPS, path, strict=True)}
    old, chosen = weight.view(16, 4, 6), choice.rounded.parts[0].view(16, 4, 6)
    mixed = 0
    for row in range(16):
        used = [solutions[alpha] for alpha in choice.alpha[row].tolist() if alpha]
        mixed += len({*choice.alpha[row].tolist()}) > 1
        for group in range(4):
            alpha = float(choice.alpha[row, group])
            own = solutions[alpha].weight.view(16, 4, 6)[row, group] if alpha else old[row, group]
            limit = own.abs().amax() * choice.clip[row, group]
            as_it_was = not alpha and torch.equal(chosen[row, group], old[row, group])
            assert as_it_was or torch.equal(chosen[row, group], own.clamp(-limit, limit))
        assert int(choice.steps[row]) == max((int(s.steps[row]) for s in used), default=0)
        trivial = all(int(s.status[row]) == Status.TRIVIAL for s in used)
        assert (int(choice.status[row]) == Status.TRIVIAL) == trivial
    assert mixed


def test_of_several_solves_the_worst_is_told() -> None:
    kinds = [Status.TRIVIAL, Status.CONVERGED, Status.STEP_LIMIT, Status.FAILED]
    for at, worst in enumerate(kinds):
        for other in kinds[: at + 1]:
            told = _worst(torch.tensor([[int(other), int(worst)], [int(worst), int(other)]]))
            assert told.tolist() == [int(worst)] * 2
            assert told.dtype == torch.int8


def test_groups_that_choose_by_themselves_help() -> None:
    weight, gram = problem(rows=20, columns=24, tokens=80)
    search, _ = ready(weight, gram, quantizer(2, 6, symmetric=True), 6)
    search.try_sources(CLIPS)
    search.refine(FINER)
    before, clip = search.best.clone(), search.clip.clone()
    assert (clip == clip[:, :1]).all()
    search.refine_groups(FINER_GROUPS)
    assert search.best.sum() < 0.98 * before.sum()
    assert (search.clip != search.clip[:, :1]).any()


# --- rows that share a step


@pytest.mark.parametrize("units", [[6], [2, 3, 1]])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_share_a_step_choose_together(units: list[int], bits: int, seed: int) -> None:
    weight, gram = problem(rows=6, columns=12, tokens=30, seed=seed)
    weight = weight * torch.tensor([1.0, 0.2, 3.0, 0.5, 1.0, 2.0]).unsqueeze(-1)
    target_weight, quantize = other_aim(weight), per_tensor(bits, units)
    choice, start = pursue(weight, target_weight, gram, quantize, units=units)
    values, (chosen,) = choice.rounded
    assert torch.equal(quantize(chosen), values)
    ours, alone = energies(values, target_weight, gram), energies(start, target_weight, gram)
    at = 0
    for count in units:
        part = slice(at, at + count)
        at += count
        assert distinct(choice.alpha[part]) == 1
        assert distinct(choice.clip[part]) == 1
        assert distinct(choice.error[part]) == 1
        assert ours[part].sum() <= alone[part].sum() * (1 + 2e-5)
        assert float(choice.error[part][0]) == pytest.approx(float(ours[part].sum()), rel=1e-4)


def test_a_shared_clip_is_of_the_shared_largest() -> None:
    """A row that is small beside the others of its tensor is not clipped by its own size."""
    weight, gram = problem(rows=5, columns=12, tokens=40)
    weight[1] *= 1e-3
    quantize, units = per_tensor(2, [4, 1]), [4, 1]
    search = Search(weight, gram, Nearest(quantize), dtype=weight.dtype, group_size=12, units=units)
    search.start(Rounded(quantize(weight), (weight,)))
    search.add(0.0)
    search.try_sources((0.6,))
    choice = search.choice()
    assert (choice.clip == 0.6).all()
    limits = 0.6 * torch.tensor([weight[:4].abs().max()] * 4 + [weight[4].abs().max()])
    want = weight.clamp(-limits.unsqueeze(-1), limits.unsqueeze(-1))
    torch.testing.assert_close(choice.rounded.parts[0], want)
    assert torch.equal(choice.rounded.parts[0][1], weight[1])


# --- a quantizer that looks at more than a row's own numbers


class Disturbed:
    """Round-to-nearest that gives every other row another step once a certain row has changed."""

    def __init__(self, weight: Tensor, flag: int, factor: float, bits: int, size: int) -> None:
        self.original, self.flag, self.factor = weight[flag].clone(), flag, factor
        self.bits, self.size = bits, size

    def __call__(self, weight: Tensor) -> Tensor:
        grid = make_grid(weight, self.bits, self.size)
        if not torch.equal(weight[self.flag], self.original):
            scale = grid.scale * self.factor
            scale[self.flag] = grid.scale[self.flag]
            grid = grid._replace(scale=scale)
        return grid.values(grid.nearest(weight))


@repeatable
@given(
    rows=st.integers(1, 5),
    flag=st.integers(0, 4),
    factor=st.sampled_from([0.3, 0.8, 1.0, 1.2, 4.0]),
    bits=st.integers(2, 4),
    grouped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_rows_that_disturb_each_other_are_settled(
    rows: int, flag: int, factor: float, bits: int, grouped: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, gram = problem(rows=rows, columns=12, tokens=30, seed=seed)
    weight = weight.to(dtype)
    target_weight = weight.float()
    quantize = Disturbed(weight, flag % rows, factor, bits, 4 if grouped else 12)
    choice, start = pursue(weight, target_weight, gram, quantize, 4 if grouped else None)
    values, (chosen,) = choice.rounded
    assert torch.equal(quantize(chosen), values)
    assert_no_row_is_worse(values, start, target_weight, gram)
    want, slack = energies(values, target_weight, gram), float32_slack(values, target_weight, gram)
    assert ((choice.error.double() - want).abs() <= slack + 1e-5 * want).all()


def test_a_row_that_chose_nothing_is_not_spoilt_by_another() -> None:
    """The first row gains, and thereby makes every other row worse than it was at the start."""
    weight, gram = problem(rows=4, columns=12, tokens=30)
    quantize = Disturbed(weight, 0, 40.0, 2, 12)
    choice, start = pursue(weight, weight, gram, quantize)
    assert_no_row_is_worse(choice.rounded.values, start, weight, gram)
    assert torch.equal(choice.rounded.parts[0], weight)
    assert (choice.alpha == 0).all()
    assert (choice.clip == 1).all()
    alone, _ = pursue(weight[:1], weight[:1], gram, quantize)
    assert not torch.equal(alone.rounded.parts[0], weight[:1])  # it would have gained


# --- GPTQ on the quantizer's grids


@repeatable
@given(cases)
def test_gptqs_rows_are_never_worse_than_at_the_start(case: Case) -> None:
    weight, target_weight, gram = case.tensors()
    rounding, start = on_grid(weight, gram, case.bits, case.group_size, symmetric=case.symmetric)
    config = MagRConfig(alpha="auto", group_size=case.group_size)
    choice = choose(target_weight, gram, rounding, start, config, dtype=case.dtype)
    values, (codes, scale, zero) = choice.rounded
    assert_no_row_is_worse(values, start.values, target_weight, gram)
    assert codes.dtype == torch.int8
    assert scale.dtype == case.dtype
    grid = Grid(scale, zero, -(2 ** (case.bits - 1)), 2 ** (case.bits - 1) - 1, case.dtype)
    assert ((codes >= grid.low) & (codes <= grid.high)).all()
    assert torch.equal(grid.values(codes), values)
    case.check_fields(choice)


@pytest.mark.parametrize("group_size", [None, 8])
def test_gptq_beats_the_nearest_search(group_size: int | None) -> None:
    # few tokens: inputs that can make up for one another
    weight, gram = problem(rows=30, columns=32, tokens=40)
    nearest, _ = pursue(weight, weight, gram, quantizer(3, group_size, symmetric=True), group_size)
    rounding, start = on_grid(weight, gram, 3, group_size, symmetric=True)
    config = MagRConfig(alpha="auto", group_size=group_size)
    choice = choose(weight, gram, rounding, start, config, dtype=weight.dtype)
    alone = gptq(weight, make_grid(weight, 3, group_size), compensation(gram))
    plain = energies(make_grid(weight, 3, group_size).values(alone), weight, gram)
    assert choice.error.sum() < nearest.error.sum()
    assert choice.error.sum() < 0.9 * plain.sum()


# --- a fixed alpha makes no choice


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("solver", ["admm", "pgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_alpha_is_a_solve_and_a_rounding(
    solver: str, group_size: int | None, dtype: torch.dtype
) -> None:
    weight, gram = problem(rows=6, columns=12)
    weight = weight.to(dtype)
    target_weight, quantize = other_aim(weight), quantizer(2, group_size, symmetric=True)
    config = MagRConfig(alpha=0.05, group_size=group_size, solver=solver)
    start = Rounded(torch.full_like(target_weight, torch.nan), (weight,))  # it plays no part
    choice = choose(target_weight, gram, Nearest(quantize), start, config, dtype=dtype)
    scale = row_scale(target_weight)
    solution = solve_magr(
        target_weight, gram, alpha=0.05, group_size=group_size, solver=solver, row_scale=scale
    )
    assert torch.equal(choice.rounded.parts[0], solution.weight.to(dtype))
    assert torch.equal(choice.rounded.values, quantize(solution.weight.to(dtype)))
    assert torch.equal(choice.status, solution.status)
    assert torch.equal(choice.steps, solution.steps)
    assert (choice.alpha == torch.tensor(0.05)).all()
    assert (choice.clip == 1).all()
    want = energies(choice.rounded.values, target_weight, gram)
    torch.testing.assert_close(choice.error.double(), want, rtol=1e-4, atol=0)


def test_the_published_alpha_follows_the_groups() -> None:
    weight, gram = problem(rows=3, columns=12)
    for group_size, alpha in ((None, 1e-3), (4, 1e-4)):
        quantize = quantizer(2, group_size, symmetric=True)
        config = MagRConfig.published(group_size)
        start = Rounded(quantize(weight), (weight,))
        choice = choose(weight, gram, Nearest(quantize), start, config, dtype=weight.dtype)
        want = solve_magr(weight, gram, alpha=alpha, group_size=group_size, solver="pgd")
        assert torch.equal(choice.rounded.parts[0], want.weight)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gptq_with_alpha_0_is_gptq_alone(group_size: int | None, dtype: torch.dtype) -> None:
    weight, gram = problem(rows=6, columns=12)
    weight = weight.to(dtype)
    rounding, start = on_grid(weight, gram, 3, group_size, symmetric=False)
    config = MagRConfig(alpha=0, group_size=group_size)
    choice = choose(weight.float(), gram, rounding, start, config, dtype=dtype)
    grid = make_grid(weight, 3, group_size, symmetric=False)
    codes = gptq(weight, grid, compensation(gram))
    assert torch.equal(choice.rounded.values, grid.values(codes))
    for found, want in zip(choice.rounded.parts, (codes, grid.scale, grid.zero_point), strict=True):
        assert torch.equal(found, want)
    assert (choice.alpha == 0).all()
    assert (choice.clip == 1).all()
    assert (choice.status == Status.TRIVIAL).all()
    assert (choice.steps == 0).all()


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_gptq_of_several_candidates_is_that_of_each(
    at_once: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(rows=6, columns=12)
    monkeypatch.setattr("magr_fx.rounding.rounding.CPU_ROWS", 6 * at_once + 5)
    rounding, _ = on_grid(weight, gram, 3, group_size, symmetric=False)
    clips = (1.0, 0.8, 0.6, 0.5, 0.4)
    candidates = [Candidate(weight * clip, weight.clamp(-clip, clip)) for clip in clips]
    found = list(rounding.each(iter(candidates)))
    assert len(found) == len(candidates)
    for one, candidate in zip(found, candidates, strict=True):
        want = rounding(candidate.rows, candidate.clipped)
        assert torch.equal(one.values, want.values)
        for part, wanted in zip(one.parts, want.parts, strict=True):
            assert torch.equal(part, wanted)


def test_gptq_rounds_the_row_that_was_not_clipped() -> None:
    """The clip makes the grid; what is rounded to it keeps its largest weights."""
    weight, gram = problem(rows=6, columns=12)
    rounding, _ = on_grid(weight, gram, 3, None, symmetric=True)
    clipped = weight.clamp(-0.5, 0.5)
    rounded = rounding(weight, clipped)
    grid = make_grid(clipped, 3)
    codes = gptq(weight, grid, compensation(gram))
    assert torch.equal(rounded.parts[0], codes)
    assert torch.equal(rounded.values, grid.values(codes))
    assert not torch.equal(codes, gptq(clipped, grid, compensation(gram)))


# --- the alphas that are worth trying


def errors_by_alpha(
    weight: Tensor, gram: Tensor, grid_of: Callable[[Tensor], Grid], group_size: int | None
) -> Tensor:
    """The least error of each row with each alpha over the clips 1 and 0.8, ``[alphas, out]``."""
    alphas = all_alphas(MagRConfig(alpha="auto", group_size=group_size))
    path = solve_magr_path(
        weight,
        gram,
        alphas[1:],
        group_size=group_size,
        tol=SEARCH_TOL,
        row_scale=row_scale(weight),
        exact=False,
    )
    found = []
    for rows in (weight, *(solution.weight for solution in path)):
        grouped = rows.view(len(rows), -1, group_size or rows.shape[1])
        limit = grouped.abs().amax(-1, keepdim=True)
        tried = []
        for clip in (1.0, 0.8):
            grid = grid_of(grouped.clamp(-clip * limit, clip * limit).view_as(rows))
            values = grid.values(gptq(rows, grid, compensation(gram)))
            tried.append(energies(values, weight, gram))
        found.append(torch.stack(tried).amin(0))
    return torch.stack(found)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_best_alphas_are_those_of_a_greedy_choice(bits: int, group_size: int | None) -> None:
    weight, gram = problem(rows=24, columns=32, tokens=100)
    rounding, _ = on_grid(weight, gram, bits, group_size, symmetric=False)
    config = MagRConfig(alpha="auto", group_size=group_size)
    alphas = all_alphas(config)
    found = best_alphas(weight, gram, rounding, config, dtype=weight.dtype)
    errors = errors_by_alpha(weight, gram, rounding.grid_of, group_size)
    relative = errors / errors.amin(0)
    chosen = [alphas.index(alpha) for alpha in found]
    assert chosen == sorted(set(chosen))
    assert int(relative.mean(-1).argmin()) in chosen
    total = relative[chosen].amin(0).mean()
    for at in range(len(alphas)):  # no other is worthwhile
        more = relative[[*chosen, at]].amin(0).mean()
        assert more * (1 + WORTHWHILE) >= total * (1 - 1e-4)
    if len(chosen) > 1:  # and each of them is, but for the first
        without = [relative[[a for a in chosen if a != at]].amin(0).mean() for at in chosen]
        assert sum(one > total for one in without) >= len(chosen) - 1


def test_few_alphas_are_worth_it_at_8_bits_and_shrinking_at_2() -> None:
    weight, gram = problem(rows=64, columns=32, tokens=100)
    weight[:, 0] *= 8  # an outlier in each row
    config = MagRConfig(alpha="auto")
    found = {}
    for bits in (2, 8):
        rounding, _ = on_grid(weight, gram, bits, None, symmetric=False)
        found[bits] = best_alphas(weight, gram, rounding, config, dtype=weight.dtype)
    assert max(found[2]) > 0
    assert max(found[8]) <= max(found[2])
    assert len(found[8]) < len(all_alphas(config))


@pytest.mark.parametrize("alphas", [[0.0], [3e-2], [0.0, 8e-3]])
def test_only_the_given_alphas_are_tried(alphas: list[float]) -> None:
    weight, gram = problem(rows=20, columns=24, tokens=60)
    rounding, start = on_grid(weight, gram, 3, None, symmetric=False)
    config = MagRConfig(alpha="auto")
    choice = choose(weight, gram, rounding, start, config, dtype=weight.dtype, alphas=alphas)
    given = torch.tensor([0.0, *alphas])
    assert torch.isin(choice.alpha, given).all()
    assert_no_row_is_worse(choice.rounded.values, start.values, weight, gram)
    everything = choose(weight, gram, rounding, start, config, dtype=weight.dtype)
    assert choice.error.sum() > everything.error.sum()


# --- grids that lean to one side


def whole_grid(bits: int, group_size: int | None) -> Callable[[Tensor], Grid]:
    """An asymmetric grid with a whole zero point, as torchao's."""

    def grid_of(rows: Tensor) -> Grid:
        return make_grid(rows, bits, group_size, symmetric=False)

    return grid_of


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("side", [1, -1])
def test_a_row_that_leans_has_all_levels(bits: int, side: int) -> None:
    """Clipped to [-t, t·shorter], or the other way round, the grid ends at both."""
    shorter = 1 - 2.0 ** (1 - bits)
    weight = torch.linspace(-1, 1, 64).view(1, 64)
    rounding = Nearest(lambda w: w, shorter)
    search = Search(weight, torch.eye(64), rounding, dtype=weight.dtype, group_size=64)
    one = torch.ones(1, 1)
    rows = search._clipped(_Clipped(weight, 0, one, side * one))
    ends = sorted([-side * shorter, side * 1.0])
    assert [float(rows.min()), float(rows.max())] == pytest.approx(ends, abs=1e-6)
    grid = whole_grid(bits, None)(rows)
    codes = grid.nearest(rows)
    assert distinct(codes) == 2**bits
    values = grid.values(codes)
    assert [float(values.min()), float(values.max())] == pytest.approx(ends, rel=1e-5)
    even = whole_grid(bits, None)(weight)
    levels = even.values(torch.arange(even.low, even.high + 1, dtype=torch.float32).view(1, -1))
    assert float(levels.abs().max()) > 1.1  # one lies beyond the row


@pytest.mark.parametrize("group_size", [None, 8])
def test_each_group_leans_to_where_less_is_lost(group_size: int | None) -> None:
    weight, gram = problem(rows=12, columns=32, tokens=100)
    size = group_size or 32
    rounding = Nearest(quantizer(2, group_size, symmetric=False), 0.5)
    search = Search(weight, gram, rounding, dtype=weight.dtype, group_size=size)
    clip = torch.full_like(search.clip, 0.8)
    even, lean = search._leans(weight, clip)
    assert not even.any()
    grouped = weight.double().view(12, -1, size)
    limit = 0.8 * grouped.abs().amax(-1, keepdim=True)
    energy = gram.double().diagonal().view(-1, size)
    high = ((grouped - grouped.clamp(-limit, limit / 2)).square() * energy).sum(-1)
    low = ((grouped - grouped.clamp(-limit / 2, limit)).square() * energy).sum(-1)
    assert torch.equal(lean, torch.where(low <= high, 1.0, -1.0))
    assert distinct(lean) == 2


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("with_gptq", [False, True])
def test_leaning_lowers_the_error_at_2_bits(group_size: int | None, with_gptq: bool) -> None:
    weight, gram = problem(rows=60, columns=32, tokens=100)
    grid_of = whole_grid(2, group_size)
    start = quantizer(2, group_size, symmetric=False)(weight)
    config = MagRConfig(alpha="auto", group_size=group_size)
    found = []
    for shorter in (None, 0.5):
        rounding: Any = Nearest(quantizer(2, group_size, symmetric=False), shorter)
        first = Rounded(start, (weight,))
        if with_gptq:
            rounding = OnGrid(grid_of, compensation(gram), shorter=shorter)
            _, first = on_grid(weight, gram, 2, group_size, symmetric=False)
        choice = choose(weight, gram, rounding, first, config, dtype=weight.dtype)
        assert_no_row_is_worse(choice.rounded.values, first.values, weight, gram)
        assert ((choice.clip > 0) & (choice.clip <= 1)).all()
        found.append(float(energies(choice.rounded.values, weight, gram).sum()))
    assert found[1] < 0.99 * found[0]


def test_tensors_with_one_step_do_not_lean() -> None:
    weight, gram = problem(rows=6, columns=12)
    rounding = Nearest(per_tensor(2, [2, 4]), 0.5)
    search = Search(weight, gram, rounding, dtype=weight.dtype, group_size=12, units=[2, 4])
    assert len(search._leans(weight, search.clip)) == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_rows_without_a_finite_error_do_not_choose(bad: float) -> None:
    weight, gram = problem(rows=24, columns=32, tokens=100)
    config = MagRConfig(alpha="auto")
    quantize = quantizer(3, None, symmetric=False)

    def spoilt(rows: Tensor) -> Tensor:
        values = quantize(rows).clone()
        values[24::25] = bad  # the last row of every candidate
        return values

    more = torch.cat([weight, weight[:1]])
    wanted = best_alphas(weight, gram, Nearest(quantize), config, dtype=weight.dtype)
    found = best_alphas(more, gram, Nearest(spoilt), config, dtype=weight.dtype)
    assert found == wanted
    nothing = Nearest(lambda rows: torch.full_like(rows, bad))
    assert len(best_alphas(weight, gram, nothing, config, dtype=weight.dtype)) == 1


def test_rows_too_large_for_their_errors_do_not_choose() -> None:
    weight, gram = problem(rows=24, columns=32, tokens=100)
    config = MagRConfig(alpha="auto")
    huge = torch.cat([weight, 1e20 * weight[:1]])
    lists = []
    for rows in (weight, huge):
        rounding, _ = on_grid(rows, gram, 3, None, symmetric=False)
        lists.append(best_alphas(rows, gram, rounding, config, dtype=weight.dtype))
    assert len(lists[1]) == len(set(lists[1])) > 0
    assert set(lists[1]) >= set(lists[0])
