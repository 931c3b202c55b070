"""Which tokens are kept aside: one rule with and without a mask, and only those are multiplied."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, analyse, assert_gram, gram_of
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_counter import OperationCounter
from tiny_models import activations, tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from magr_fx.passes.collecting.collect_grams import CalibrationRun
from magr_fx.passes.collecting.shared_gram import SharedGram, held_out
from magr_fx.passes.graphs.trace import calibration_mode

WIDTH = 8
HOLDOUTS = st.sampled_from([0.0, 0.1, 0.29, 0.3, 1 / 3, 0.57, 0.9, 0.99, 1 - 2**-53])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.a(x)
        return result


SITES = analyse(Masked(), [activations(2, 3, WIDTH)]).found.sites


def collected(analysis: Analysis, holdout: float, *, propagate: bool = False) -> list[SharedGram]:
    run = CalibrationRun(
        analysis.traced, analysis.found.sites, propagate=propagate, holdout=holdout
    )
    kept = []
    with calibration_mode(analysis.model):
        for finished in run.collect(progress=False):
            for shared in finished:
                kept.append(
                    SharedGram(
                        shared.sites,
                        gram=shared.gram,
                        drift=shared.drift,
                        held=shared.held,
                        tokens=shared.tokens,
                        held_tokens=shared.held_tokens,
                    )
                )
    return kept


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.floats(0, 1, exclude_max=True))
def test_the_share_is_rounded_down_and_never_all(count: int, holdout: float) -> None:
    held = held_out(count, holdout)
    assert 0 <= held <= max(count - 1, 0)
    exact = int(Fraction(holdout) * count)
    assert abs(held - exact) <= 1
    assert held == min(int(holdout * count), max(count - 1, 0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300), HOLDOUTS)
def test_a_mask_leaves_what_the_tokens_alone_would(keep: list[bool], holdout: float) -> None:
    """The same tokens on either side; with all of them the same bits."""
    mask = torch.tensor(keep)
    x = activations(len(keep), WIDTH)
    x[~mask] = torch.nan
    masked, alone = SharedGram(SITES), SharedGram(SITES)
    masked.add(x, mask.nonzero().squeeze(1), original=x + 1, holdout=holdout)
    alone.add(x[mask], None, original=x[mask] + 1, holdout=holdout)
    assert (masked.tokens, masked.held_tokens) == (alone.tokens, alone.held_tokens)
    for key in ("gram", "drift", "held"):
        one, other = getattr(masked, key), getattr(alone, key)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("holdout", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_ones_is_no_mask(holdout: float, propagate: bool, dtype: torch.dtype) -> None:
    shapes = [(1, 1), (1, 10), (2, 5), (3, 67), (1, 333)]
    inputs = [activations(*shape, WIDTH, seed=at) for at, shape in enumerate(shapes)]
    model = Masked()
    bare = collected(analyse(model, inputs), holdout, propagate=propagate)
    ones = [(x, torch.ones(x.shape[:2], dtype=dtype)) for x in inputs]
    masked = collected(analyse(model, ones), holdout, propagate=propagate)
    for one, other in zip(bare, masked, strict=True):
        assert (one.tokens, one.held_tokens) == (other.tokens, other.held_tokens)
        for key in ("gram", "drift", "held"):
            a, b = getattr(one, key), getattr(other, key)
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_ragged_masks(holdout: float) -> None:
    lengths = ([9, 3, 1], [5], [2, 2])
    model, calib, rows = Masked(), [], []
    for seed, batch in enumerate(lengths):
        mask = torch.arange(max(batch)) < torch.tensor(batch)[:, None]
        x = activations(*mask.shape, WIDTH, seed=seed)
        calib.append((x, mask.long()))
        rows.append(x[mask])
    (shared,) = collected(analyse(model, calib), holdout)
    cut = [len(x) - int(holdout * len(x)) for x in rows]
    used = [x[:at] for x, at in zip(rows, cut, strict=True)]
    held = [x[at:] for x, at in zip(rows, cut, strict=True)]
    assert_gram(shared.gram, gram_of(*used))
    assert shared.tokens == sum(cut)
    if holdout:
        assert_gram(shared.held, gram_of(*held))
    else:
        assert shared.held is None


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_only_rows_that_belong_are_multiplied(holdout: float) -> None:
    x = activations(4, 64, WIDTH)
    mask = torch.arange(64) < torch.tensor([64, 16, 8, 8])[:, None]
    kept = x[mask][None]  # 96 tokens of 256

    def products(calib: list[Any]) -> float:
        analysis = analyse(Masked(), calib)
        run = CalibrationRun(analysis.traced, analysis.found.sites, holdout=holdout)
        with calibration_mode(analysis.model), OperationCounter() as counter:
            for _ in run.collect(progress=False):
                pass
        return float(counter.flops)

    assert products([(x, mask.long())]) == products([kept]) == 2.0 * 96 * WIDTH**2


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations whose results the host waits for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count += name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::item")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.slow_unless("False")
def test_a_mask_is_read_once_for_each_batch(masked: bool) -> None:
    """However many layers read it."""
    counts = []
    mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    for layers in (1, 3):
        ids = [{"input_ids": token_ids(3, 7, seed)} for seed in range(2)]
        calib = [{**item, "attention_mask": mask.long()} for item in ids] if masked else ids
        analysis = analyse(tiny_llama(num_hidden_layers=layers), calib)
        run = CalibrationRun(analysis.traced, analysis.found.sites, holdout=0.2)
        seen = Syncs()
        with calibration_mode(analysis.model), seen:
            for _ in run.collect(progress=False):
                pass
        counts.append(seen.count)
    assert counts[0] == counts[1]
    assert (counts[0] > 0) == masked
