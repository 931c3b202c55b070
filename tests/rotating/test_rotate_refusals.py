"""What must not be rotated, and what a rotation leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_rotate import IDS, WIDTH, Block, Model, Rms, layer_norm, reasons, rotated
from tiny_models import text_calib, tiny_qwen2
from torch import Tensor, nn
from toys import changed, state

from magr_fx import ConfigError, ModelError, rotate_transform
from magr_fx.passes.rotating import rotate_model
from magr_fx.passes.rotating.overlapping import overlapping
from magr_fx.passes.rotating.rotate_weights import rotate_weights


def assert_kept(model: nn.Module, before: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        one, two = model(*inputs), before(*inputs)
    assert torch.allclose(one, two, rtol=1e-9, atol=1e-11)


def test_a_weight_that_no_token_reaches_may_read_the_stream() -> None:
    class TwoHeads(Model):
        def __init__(self) -> None:
            super().__init__(Rms)
            self.other = nn.Linear(WIDTH, 3)

        def forward(self, ids: Tensor, other: bool = False) -> Tensor:
            hidden = self.norm(self.blocks(self.table(ids) + self.positions))
            logits: Tensor = (self.other if other else self.head)(hidden)
            return logits

    model = TwoHeads().double()
    before = copy.deepcopy(model)
    rotate_transform(model, IDS)
    assert rotated(model) == {}
    assert set(reasons(model).values()) >= {
        "the calibration does not use other.weight, which may read it"
    }
    assert_kept(model, before, IDS[0], True)
    both = TwoHeads().double()
    rotate_transform(both, [{"ids": IDS[0]}, {"ids": IDS[1], "other": True}])
    assert WIDTH in rotated(both).values()
    assert_kept(both, before, IDS[0])
    assert_kept(both, before, IDS[0], True)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Slotted:
    __slots__ = ("hidden", "logits")

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits, self.hidden = logits, hidden


class Nested:
    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.inner = {"all": [Output(logits, hidden)], "itself": self}


@pytest.mark.parametrize("kind", [Output, Slotted, Nested])
def test_a_stream_that_is_returned_in_an_object_is_left_alone(kind: Any) -> None:
    class Returns(Model):
        def forward(self, ids: Tensor) -> Any:
            hidden = self.blocks(self.table(ids) + self.positions)
            return kind(self.head(self.norm(hidden)), hidden)

    model = Returns(Rms).double()
    rotate_transform(model, IDS)
    assert "it is an output of the model" in reasons(model).values()
    assert WIDTH not in rotated(model).values()


def test_without_outputs_nothing_can_be_checked() -> None:
    class Silent(Model):
        def forward(self, ids: Tensor) -> Any:
            super().forward(ids)
            return "done"

    model = Silent(Rms).double()
    before = state(model)
    with pytest.raises(ModelError, match="returns no tensor"):
        rotate_transform(model, IDS)
    assert changed(model, before) == []


# What stands between a LayerNorm, which adds a shift, and the weights that read it.
BEHIND: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a factor": (lambda y: 2.0 * y, False),
    "minus": (lambda y: -y, False),
    "a mask": (lambda y: y * (torch.arange(y.shape[1]) > 2).double()[:, None], False),
    "a sum": (lambda y: y.sum(1, keepdim=True).expand_as(y), False),
    "a mean": (lambda y: y.mean(1, keepdim=True).expand_as(y), False),
    "a running sum": (lambda y: y.cumsum(1), False),
    "blocks": (lambda y: y.reshape(*y.shape[:2], 2, -1).flip(2).reshape(y.shape), False),
    "another order": (lambda y: y.flip(1), True),
    "tokens joined": (lambda y: y.reshape(-1, WIDTH).view(y.shape), True),
    "some tokens": (lambda y: y[:, torch.tensor([0, 0, 1, 2, 4, 5])], True),
    "a cast": (lambda y: y.to(torch.float64).contiguous(), True),
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("norm", [layer_norm, Rms])
def test_what_happens_behind_a_norm_is_not_forgotten(
    name: str, norm: Callable[[], nn.Module]
) -> None:
    behind, moves = BEHIND[name]

    class Behind(Model):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.norm(self.blocks(self.table(ids) + self.positions))
            logits: Tensor = self.head(behind(hidden))
            return logits

    model = Behind(norm).double()
    before = copy.deepcopy(model)
    rotate_transform(model, IDS)
    for ids in IDS:
        assert_kept(model, before, ids)
    if moves or (norm is Rms and name != "blocks"):
        assert WIDTH in rotated(model).values()
    else:
        assert WIDTH not in rotated(model).values()


class Shared(nn.Module):
    """Weights with a second role, and what is changed in place."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.enter = nn.Linear(8, WIDTH)
        self.norm: Any = layer_norm()
        self.one, self.two = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
        if case == "a bias of two weights":
            self.two.bias = self.one.bias
        if case == "one memory":
            self.two.weight = nn.Parameter(self.one.weight.detach().view(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        y = self.norm(hidden)
        if self.case == "a norm's weight is added":
            y = self.norm(hidden + self.norm.weight)
        if self.case == "a norm's shift is a bias":
            hidden = nn.functional.linear(hidden, self.enter.weight @ self.enter.weight.T)
            y = self.norm(hidden + self.norm.bias)
        if self.case == "scaled in place":
            scaled = torch.rms_norm(hidden, [WIDTH])
            scaled.mul_(self.norm.weight)
            y = scaled + self.norm.bias
        if self.case == "whole numbers":
            y = self.norm(hidden.to(torch.int64).to(x.dtype))
        out: Tensor = self.one(y) * 2 + self.two(y)
        return out


@pytest.mark.parametrize("case", [
    "a bias of two weights", "one memory", "a norm's weight is added", "a norm's shift is a bias",
    "scaled in place", "whole numbers",
])  # fmt: skip
def test_weights_with_a_second_role_stay(case: str) -> None:
    model = Shared(case).double()
    if case == "one memory":
        model.two.weight = nn.Parameter(model.one.weight.detach().view(5, WIDTH))
    before = copy.deepcopy(model)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    rotate_transform(model, [x])
    assert rotated(model) == {}
    assert_kept(model, before, x)
    plain = Shared("").double()
    rotate_transform(plain, [x])
    assert rotated(plain) == {"one.weight": WIDTH}
    assert_kept(plain, Shared("").double(), x)


class ReadsNorm(Model):
    """A norm's 1 + w has a second reader."""

    def __init__(self, reader: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda: Rms(plus_one=True))
        self.reader = reader

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.blocks(self.table(ids) + self.positions)
        norm: Any = self.norm
        shifted = 1.0 + norm.weight
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        logits: Tensor = self.head(self.reader(normed * shifted, shifted))
        return logits


SECOND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda y, w: y + w.expand_as(y),
    "multiplied": lambda y, w: y * torch.tanh(w).mean(),
    "cast": lambda y, w: y * w.to(torch.float32).sum().to(y.dtype),
    "matmul": lambda y, w: y + (y @ w)[..., None],
    "none": lambda y, w: y,
}


@pytest.mark.parametrize("second", SECOND)
def test_a_norms_shifted_weight_with_a_second_reader_stays(second: str) -> None:
    model = ReadsNorm(SECOND[second]).double()
    before = copy.deepcopy(model)
    rotate_transform(model, IDS)
    assert (WIDTH in rotated(model).values()) == (second == "none")
    assert_kept(model, before, IDS[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_a_weight_that_is_read_in_a_coarse_dtype_stays(dtype: torch.dtype) -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.leave.weight.to(dtype).to(x.dtype)
            return torch.nn.functional.linear(self.enter(x), weight)

    model = Coarse().double()
    before = copy.deepcopy(model)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    rotate_transform(model, [x])
    assert rotated(model) == {}
    assert_kept(model, before, x)


def test_an_expanded_parameter_stays() -> None:
    model = Model(Rms).double()
    model.positions = nn.Parameter(torch.randn(1, WIDTH).double().expand(6, WIDTH))
    before = copy.deepcopy(model)
    rotate_transform(model, IDS)
    assert WIDTH not in rotated(model).values()
    assert_kept(model, before, IDS[0])


def test_what_can_be_restored_is_restored() -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1).expand(3))

    def fails() -> None:
        with rotate_model._restored_on_error([bad, good]):
            good.data.zero_()
            raise KeyError

    with pytest.raises(ModelError, match="could not be restored"):
        fails()
    assert bool((good == 1).all())


def test_an_embedding_read_the_other_way_keeps_its_rows() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.enter = nn.Embedding(WIDTH, 6), nn.Linear(6, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            out = torch.mm(self.enter(self.table(ids)).flatten(0, 1), self.table.weight)
            return out

    model = Transposed().double()
    before = copy.deepcopy(model)
    ids = IDS[0] % WIDTH
    rotate_transform(model, [ids])
    assert "an embedding looks its rows up" in reasons(model).values()
    assert_kept(model, before, ids)


def test_overlapping_parameters_are_found() -> None:
    whole = torch.arange(12.0)
    model = nn.Module()
    model.a, model.b = nn.Parameter(whole[:6].view(2, 3)), nn.Parameter(whole[6:])
    assert overlapping(model) == []
    model.register_buffer("c", whole[10:])
    assert [one is model.b for one in overlapping(model)] == [True]
    model.e = nn.Parameter(torch.ones(6).as_strided((2, 3), (2, 1)))
    assert {id(one) for one in overlapping(model)} == {id(model.b), id(model.e)}
    del model.e
    model.d = model.a
    assert [one is model.b for one in overlapping(model)] == [True]


def test_random_numbers_are_the_same_in_both_runs() -> None:
    class Noisy(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + torch.randn(20, dtype=torch.float64)

    model = Noisy(Rms).double()
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    rotate_transform(model, IDS)
    assert WIDTH in rotated(model).values()
    assert torch.equal(torch.get_rng_state(), wanted)


def test_the_autocast_of_the_caller_sees_the_new_weights() -> None:
    model, before = Model(Rms), Model(Rms)
    with torch.autocast("cpu", torch.bfloat16):
        logits = before(IDS[0])
        model(IDS[0])
        rotate_transform(model, IDS)
        after = model(IDS[0])
    assert WIDTH in rotated(model).values()
    assert (after - logits).norm() <= 0.05 * logits.norm()
    assert (model(IDS[0]) - before(IDS[0])).norm() <= 1e-5 * logits.norm()


def test_an_input_is_not_changed() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(Rms)

        def forward(self, ids: Tensor, notes: dict[str, list[int]]) -> Tensor:
            notes["calls"].append(1)
            out: Tensor = self.inner(ids)
            return out

    model, notes = Counts().double(), {"calls": [0]}
    rotate_transform(model, [(IDS[0], notes)])
    assert notes == {"calls": [0]}


def test_every_trace_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__(Rms)
            self.more = nn.Parameter(torch.zeros(20))

        def forward(self, ids: Tensor, twice: bool = False) -> Tensor:
            logits = super().forward(ids)
            return logits + self.more if twice else logits

    model = Two().double()
    before = state(model)

    def wrong(streams: Any, biases: Any) -> None:
        rotate_weights(streams, biases)
        with torch.no_grad():
            model.more.add_(1.0)  # which the second trace alone adds

    monkeypatch.setattr(rotate_model, "rotate_weights", wrong)
    with pytest.raises(ModelError, match="calibration batch 1"):
        rotate_transform(model, [{"ids": IDS[0]}, {"ids": IDS[1], "twice": True}])
    assert changed(model, before) == ["more"]


def test_a_head_is_tied_again_where_that_helps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (False, True):
        model: Any = tiny_qwen2()
        if wrong:
            monkeypatch.setattr(rotate_model, "trace_or_read", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rotate_transform(model, text_calib(), untie=True)
        else:
            # the stream is returned, so that it is not rotated
            for batch in [{"input_ids": ids, "output_hidden_states": True} for ids in text_calib()]:
                rotate_transform(model, [batch], untie=True)
            assert 32 not in rotated(model).values()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings is True


def test_a_model_that_reads_whether_it_is_tied_stays_tied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Reads(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, ids: Tensor) -> Any:
            logits = self.inner(ids).logits
            return logits * 0.5 if self.config.tie_word_embeddings else logits

    model: Any = Reads(tiny_qwen2())
    wanted = model(text_calib()[0])
    with caplog.at_level("WARNING"):
        rotate_transform(model, text_calib(), untie=True)
    assert "the head stays tied" in caplog.text
    assert model.inner.lm_head.weight is model.inner.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    torch.testing.assert_close(model(text_calib()[0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.5])
def test_seeds_out_of_range_are_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be an int from 0"):
        rotate_transform(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)], seed=seed)


def test_on_a_default_device_without_memory() -> None:
    model = nn.Sequential(Block(Rms()), Rms(), nn.Linear(WIDTH, 4)).double()
    batch = torch.randn(2, 6, WIDTH).double()
    before = copy.deepcopy(model)
    with torch.device("meta"):
        rotate_transform(model, [batch])
    assert rotated(model)
    assert_kept(model, before, batch)
