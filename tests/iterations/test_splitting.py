"""ADMM's rho and the matrix of its step, against float64."""

from __future__ import annotations

import pytest
import torch
from solver_helpers import batch, problem, setting
from torch import Tensor

from magr_fx.errors import CalibrationError
from magr_fx.iterations.solution import Status
from magr_fx.iterations.splitting import LEAST_ENERGY, RAISE, split, unit_rho
from magr_fx.solver.solver import solve_magr

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(gram: Tensor, peak: Tensor, rho: Tensor) -> Tensor:
    """diag(ρ)(G/λmax + diag ρ)⁻¹, in float64."""
    diagonal = torch.diag(rho.double())
    inverse: Tensor = torch.linalg.inv(gram.double() / peak.double() + diagonal)
    return diagonal @ inverse


def closeness(gram: Tensor, peak: Tensor, rho: Tensor) -> float:
    """The share of its largest entry by which a float32 inverse may be off: n roundings, times κ.

    κ is the condition of what is factorised, diag(ρ)^-½ (G/λmax) diag(ρ)^-½ + I.
    """
    root = rho.double().sqrt()
    scaled = gram.double() / peak.double() / root.unsqueeze(-1) / root + torch.eye(len(gram))
    return len(gram) * 2.0**-24 * float(torch.linalg.cond(scaled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [40, 5])
@pytest.mark.parametrize("strength", [0.01, 0.3, 10.0])
def test_step_is_the_inverse(strength: float, tokens: int, dtype: torch.dtype) -> None:
    _, gram = problem(tokens=tokens)
    posed = setting(gram.to(dtype), 0.1)
    unit = unit_rho(posed)
    found = split(posed, unit, torch.tensor(strength, dtype=dtype))
    assert float(found.strength) == pytest.approx(strength)
    assert torch.equal(found.rho, unit * found.strength)
    want = reference(gram, posed.peak, found.rho)
    close = 1e-11 if dtype == torch.float64 else 1e-4
    assert (found.step.double() - want).abs().max() < close * want.abs().max()
    assert found.step.dtype == dtype


def test_step_moves_rows_to_the_minimiser() -> None:
    """With d = a·step, ½dᵀGd + ½(d - a)ᵀρ(d - a) is least."""
    _, gram = problem()
    posed = setting(gram.double(), 0.1)
    found = split(posed, unit_rho(posed), torch.tensor(0.3, dtype=torch.float64))
    away = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = away @ found.step
    slope = moved @ gram.double() / posed.peak + (moved - away) * found.rho
    assert slope.abs().max() < 1e-12


def test_a_batch_is_split_as_its_problems_are() -> None:
    _, grams = batch()
    posed = setting(grams, 0.1)
    strength = torch.tensor([0.3, 0.05, 2.0])
    unit = unit_rho(posed)
    together = split(posed, unit, strength)
    for i, gram in enumerate(grams):
        one = setting(gram, 0.1)
        assert torch.allclose(unit_rho(one), unit[i], rtol=1e-6)
        alone = split(one, unit_rho(one), strength[i])
        assert torch.allclose(together.rho[i], alone.rho, rtol=1e-6)
        assert torch.allclose(together.step[i], alone.step, rtol=0, atol=1e-5)


def test_unit_rho_are_geometric_means_with_the_median() -> None:
    energy = torch.tensor([4.0, 1.0, 9.0, 0.25, 16.0])
    posed = setting(torch.diag(energy), 0.1)  # λmax = 16, the median 4
    want = (energy / 16 * (4 / 16)).sqrt()
    assert torch.allclose(unit_rho(posed), want, rtol=1e-6)
    scaled = setting(torch.diag(energy) * 1024, 0.1)
    assert torch.allclose(unit_rho(scaled), want, rtol=1e-6)


def test_dead_and_faint_inputs_cost_a_little() -> None:
    # The median is that of what is alive: of 4, 1, 9 and the faint one it is 1.
    energy = torch.tensor([4.0, 0.0, 1.0, 9.0, 0.0, 1e-9, 0.0])
    posed = setting(torch.diag(energy), 0.1)
    typical = 1 / 9
    least = typical * LEAST_ENERGY**0.5
    want = torch.tensor([4 / 9, 0, typical, 1, 0, 0, 0]).mul(typical).sqrt().clamp(min=least)
    found = unit_rho(posed)
    assert torch.allclose(found, want, rtol=1e-5)
    assert (found > 0).all()
    grams = torch.stack([posed.gram, torch.eye(7)])
    both = unit_rho(setting(grams, 0.1))
    assert torch.allclose(both[0], want, rtol=1e-5)
    assert torch.allclose(both[1], torch.ones(7))


def with_eigenvalue(low: float, size: int = 8) -> Tensor:
    """A gram whose least eigenvalue is ``low``, λmax being 1, and no diagonal entry negative."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(2)).double()
    basis, _ = torch.linalg.qr(noise)
    values = torch.linspace(0.1, 1, size, dtype=torch.float64)
    values[0] = low
    gram: Tensor = (basis * values) @ basis.T
    return gram.float()


def test_rounded_eigenvalues_below_zero_raise_rho() -> None:
    gram = with_eigenvalue(-1e-5)
    posed = setting(gram, 0.1)
    unit = unit_rho(posed)
    strength = torch.tensor(1e-6)
    found = split(posed, unit, strength)
    raised = float(found.strength) / 1e-6
    assert raised == pytest.approx(100.0, rel=1e-4)  # the first power of RAISE beyond 1e-5
    assert RAISE == 10.0
    assert torch.equal(found.rho, unit * found.strength)
    want = reference(gram, posed.peak, found.rho)
    close = closeness(gram, posed.peak, found.rho)
    assert close < 0.05
    assert (found.step.double() - want).abs().max() < close * want.abs().max()
    assert float(strength) == pytest.approx(1e-6)  # not in place


def test_only_the_problem_that_needs_it_is_raised() -> None:
    grams = torch.stack([with_eigenvalue(0.1), with_eigenvalue(-1e-5)])
    posed = setting(grams, 0.1)
    found = split(posed, unit_rho(posed), torch.full((2,), 1e-6))
    assert torch.allclose(found.strength, torch.tensor([1e-6, 1e-4]), rtol=1e-4)
    for gram, peak, rho, step in zip(grams, posed.peak, found.rho, found.step, strict=True):
        want = reference(gram, peak, rho)
        close = closeness(gram, peak, rho)
        assert (step.double() - want).abs().max() < close * want.abs().max()


@pytest.mark.parametrize("low", [-0.5, -0.03])
@pytest.mark.parametrize("strength", [1e-6, 1e-3])
def test_an_indefinite_gram_is_refused(low: float, strength: float) -> None:
    posed = setting(with_eigenvalue(low), 0.1)
    with pytest.raises(CalibrationError, match="not positive semidefinite, by more than rounding"):
        split(posed, unit_rho(posed), torch.tensor(strength))


def test_one_indefinite_gram_spoils_its_batch() -> None:
    posed = setting(torch.stack([torch.eye(4), 1.5 * torch.ones(4, 4) - torch.eye(4)]), 0.1)
    with pytest.raises(CalibrationError, match="not positive semidefinite"):
        split(posed, unit_rho(posed), torch.full((2,), 0.3))


def test_a_gram_without_a_diagonal_is_refused() -> None:
    gram = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(CalibrationError, match="not positive semidefinite"):
        solve_magr(torch.tensor([[4.0, 1.0]]), gram, alpha=0.1)


@pytest.mark.parametrize("least", [1e-23, 1e-38, 1e-44])
def test_energies_near_the_end_of_float32_have_a_least_rho(least: float) -> None:
    gram = torch.diag(torch.tensor([1.0, least, least, least]))
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.1, 0.2, 0.3]])
    solution = solve_magr(weight, gram, alpha=0.1)
    assert solution.weight.isfinite().all()
    # Only the first input has any energy: it is soft-thresholded, and the others follow.
    assert torch.allclose(solution.weight[1, 0], torch.tensor(1.9), atol=0.02)


def test_a_massive_activation_does_not_set_the_pace() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    inputs[:, 7] *= 3e3
    weight = 0.02 * torch.randn(20, 64, generator=generator)
    solution = solve_magr(weight, inputs.T @ inputs)
    assert (solution.status != Status.STEP_LIMIT).all()
    assert (solution.steps <= 60).all()
    assert (solution.weight != weight).any(-1).all()
