"""Whatever forward assigns, anywhere in the model, is as it was; so are caches in a batch."""

from __future__ import annotations

import array
import copy
import functools
import io
import pickle
import random
import types
from collections import OrderedDict, defaultdict, deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from graph_helpers import Formula
from targets import SYMMETRIC, intx
from tiny_models import text_calib, tiny_llama
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from toys import WIDTH, report_of, vectors
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from magr_fx import MagRConfig, TraceError, magr_quantize, magr_transform

QUICK = MagRConfig(alpha=1e-2)


class Slotted:
    __slots__ = ("kept",)
    kept: Any


class Assigning(nn.Module):
    """Keeps what it computes in every kind of place that a forward can write to."""

    calls = 0

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.refuses = refuses
        self.cache: dict[Any, Any] = {}
        self.seen: list[Tensor] = []
        self.last: deque[Tensor] = deque(maxlen=2)
        self.nested = SimpleNamespace(maps=[{"a": []}])
        self.slotted = Slotted()
        self.shapes: set[int] = set()
        self.plain = torch.zeros(3)  # no buffer
        self.pair: tuple[list[Tensor], int] = ([], 1)
        self.gone = "to be deleted"

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mask"):
            self.mask = torch.ones(WIDTH)
        type(self).calls += 1
        hidden = self.first(x * self.mask)
        self.attn_map = hidden
        self.first.told_by_parent = hidden
        self.cache["last"] = hidden
        self.cache["inner"] = {"x": [hidden]}
        self.seen.append(hidden)
        self.last.append(hidden)
        self.nested.maps[0]["a"].append(hidden)
        self.nested.other = hidden
        self.slotted.kept = hidden
        self.shapes.add(7)
        self.pair[0].append(hidden)
        self.register_buffer("late", hidden)
        self.drop = nn.Dropout(0.1).eval()
        if hasattr(self, "gone"):
            del self.gone
        if self.refuses and bool(hidden.sum() > 1e9):
            return hidden  # type: ignore[no-any-return]
        return self.second(self.drop(hidden).relu())  # type: ignore[no-any-return]


def state_of(model: Assigning) -> Any:
    """What it holds, by identity, apart from weights."""
    held = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return {
        "attributes": {name: id(value) for name, value in held.items()},
        "registries": [
            list(r) for m in model.modules() for r in (m._parameters, m._buffers, m._modules)
        ],
        "child": sorted(vars(model.first)),
        "contents": repr(
            (model.cache, model.seen, model.last, model.nested, model.shapes, model.pair)
        ),
        "slot": hasattr(model.slotted, "kept"),
        "class": Assigning.calls,
        "plain": model.plain.tolist(),
    }


def fakes(value: Any, known: set[int]) -> bool:
    """Whether a tensor of a tracer can be reached."""
    if id(value) in known:
        return False
    known.add(id(value))
    if isinstance(value, Tensor):
        return isinstance(value, FakeTensor)
    inside = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, (list, tuple, set, deque)):
        inside += value
    return any(fakes(one, known) for one in inside)


def works(model: nn.Module) -> None:
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    with torch.no_grad():
        assert type(model(vectors()[0])) is Tensor
    assert not fakes(model, set())


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("trace", ["export", "make_fx", "auto"])
def test_what_forward_assigns_is_taken_back(trace: str, quantize: bool) -> None:
    model = Assigning(refuses=trace == "auto")
    before = state_of(model)
    if quantize:
        magr_quantize(model, vectors(), intx(3, SYMMETRIC, None), trace=trace)
    else:
        magr_transform(model, vectors(), QUICK, trace=trace)
    assert report_of(model).tracer == ("make_fx" if trace == "auto" else trace)
    del model.magr_report
    after = state_of(model)
    if quantize:  # torchao gives a linear another extra_repr
        before.pop("child"), after.pop("child")
    assert after == before
    assert not fakes(model, set())
    if not quantize:  # torchao's extra_repr cannot be pickled
        pickle.dumps(model)
        works(model)


def test_it_is_also_after_an_error() -> None:
    model = Assigning(refuses=True)
    before = state_of(model)
    with pytest.raises(TraceError, match=r"data-dependent"):
        magr_transform(model, vectors(), QUICK, trace="export")
    assert state_of(model) == before
    works(model)


TABLE: dict[str, Any] = {}
LAST: Any = None


def remember(x: Tensor, every: list[Tensor] = []) -> None:  # noqa: B006
    """Keeps what it is given wherever a function can, without an attribute of a model."""
    global LAST  # noqa: PLW0603
    LAST = x
    TABLE["x"] = x
    every.append(x)
    remember.last = x  # type: ignore[attr-defined]


class Shared(nn.Module):
    table: ClassVar[dict[str, Any]] = {}
    calls = 0


class Elsewhere:
    """No module, and holds all it has in its class."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def take(cls, x: Tensor) -> None:
        cls.seen.append(x)


class Scattering(Shared):
    """Writes to what it does not hold itself, and to what has values but is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)
        self.elsewhere = Elsewhere()
        self.keep: Any = functools.partial(lambda to, x: to.append(x), [])
        self.values, self.raw, self.codes = np.zeros(2), bytearray(2), array.array("i", [0])
        self.draws = np.random.default_rng(0), random.Random(0), torch.Generator()
        self.old = np.random.RandomState(0)

    def forward(self, x: Tensor) -> Tensor:
        Shared.table["x"] = x
        Shared.calls += 1
        self.elsewhere.take(x)
        remember(x)
        self.keep(x)
        self.values[0], self.raw[0], self.codes[0] = 1, 1, 1
        self.draws[0].random(), self.draws[1].random(), self.old.rand()
        random.random(), np.random.rand()
        return self.linear(x)  # type: ignore[no-any-return]


def scattered(model: Scattering) -> Any:
    numpy, python, torchs = model.draws
    return repr(
        (
            *(Shared.table, Shared.calls, Elsewhere.seen, TABLE, LAST, remember.__defaults__),
            *(vars(remember), model.keep.args, model.values, model.raw, model.codes),
            *(numpy.bit_generator.state, python.getstate(), torchs.get_state().tolist()),
            *(model.old.get_state(), random.getstate(), np.random.get_state()),
        )
    )


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("trace", ["export", "make_fx"])
def test_nor_is_anything_left_outside_of_the_model(trace: str, quantize: bool) -> None:
    model = Scattering()
    before = scattered(model)
    if quantize:
        magr_quantize(model, vectors(), intx(3, SYMMETRIC, None), trace=trace)
    else:
        magr_transform(model, vectors(), QUICK, trace=trace)
    assert scattered(model) == before


@pytest.mark.parametrize("trace", ["export", "make_fx"])
@pytest.mark.parametrize("refuses", [False, True])
def test_hooks_write_nothing(trace: str, refuses: bool) -> None:
    """Into what they enclose, and what is theirs: so people capture activations."""
    model, captured, calls = Assigning(refuses), dict[str, Tensor](), 0
    recorder = Elsewhere()
    recorder.own = []  # type: ignore[attr-defined]

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def bound(self: Any, _: Any, args: Any) -> None:
        self.own.append(args)

    model.first.register_forward_hook(lambda m, x, y: captured.__setitem__("first", y))
    model.second.register_forward_pre_hook(types.MethodType(bound, recorder))
    model.second.register_forward_hook(count)
    with pytest.raises(TraceError) if refuses and trace == "export" else nullcontext():
        magr_transform(model, vectors(), QUICK, trace=trace)
    assert (captured, calls, recorder.own) == ({}, 0, [])  # type: ignore[attr-defined]
    with torch.no_grad():
        model(vectors()[0])
    assert (type(captured["first"]), calls) == (Tensor, 1)


class Frozen(dict[str, Any]):
    """Takes new entries, and lets none go."""

    def clear(self) -> None:
        raise TypeError("it cannot be emptied")

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("it cannot be updated")


def test_containers_with_methods_of_their_own_are_restored_all_the_same() -> None:
    model = Counting()
    told = Frozen(a=1)
    model.linear.told = told  # type: ignore[assignment]
    model.linear.register_forward_pre_hook(lambda m, _: m.told.__setitem__("b", 2))
    magr_transform(model, vectors(), QUICK)
    assert told == {"a": 1}


class Counting(nn.Module):
    """Counts in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(WIDTH, 8), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x)  # type: ignore[no-any-return]


class Making(OrderedDict[str, Any]):
    """Gives a new object of the class that it holds, as transformers' ACT2FN does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class Nothing(defaultdict[str, Any]):
    """Shows nothing of what it holds."""

    def __iter__(self) -> Any:
        return iter(())

    def values(self) -> Any:
        return ()


TABLES: dict[str, Any] = {
    "makes": Making(silu=nn.SiLU, relu=nn.ReLU),
    "shows nothing": Nothing(list, a=nn.SiLU),
}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("kind", sorted(TABLES))
@pytest.mark.parametrize("trace", ["export", "make_fx"])
def test_what_a_container_holds_is_not_what_it_gives(kind: str, trace: str, writes: bool) -> None:
    table = TABLES[kind]

    def forward(m: Any, x: Tensor) -> Any:
        if writes:
            TABLES[kind].update(new=x)
        return m.b(nn.functional.silu(m.a(x)))

    held = list(dict.items(table))
    model = Formula(forward, a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    magr_transform(model, [torch.randn(20, WIDTH)], MagRConfig(alpha=1e-2), trace=trace)
    assert list(dict.items(table)) == held


@pytest.mark.slow
def test_the_tables_of_transformers_are_what_they_were() -> None:
    from transformers.activations import ACT2FN

    held = list(dict.items(ACT2FN))
    magr_transform(tiny_llama(), text_calib(), MagRConfig(alpha=1e-2))
    assert list(dict.items(ACT2FN)) == held
    assert isinstance(ACT2FN["silu"], nn.Module)


@pytest.mark.parametrize("trace", ["export", "make_fx"])
def test_values_of_tensors_that_are_not_registered_stay(trace: str) -> None:
    model = Counting()
    held = model.count
    magr_transform(model, vectors(), QUICK, trace=trace)
    assert model.count is held
    assert held.item() == 0


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("trace", ["auto", "make_fx"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.slow_if(
    "DynamicCache-auto-True",
    "StaticCache-auto-False",
    "StaticCache-auto-True",
    "StaticCache-make_fx-True",
)
def test_a_cache_in_a_batch_does_not_grow(kind: Any, trace: str, quantize: bool) -> None:
    model, ids = llama(), torch.arange(1, 25).view(2, 12)
    options = {"max_cache_len": 32} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    length = int(cache.get_seq_length())
    values = [layer.keys.clone() for layer in cache.layers]
    batch = {"input_ids": ids[:, :5], "past_key_values": cache, "use_cache": True}
    if quantize:
        magr_quantize(model, [batch], intx(4, SYMMETRIC, None), trace=trace)
    else:
        magr_transform(model, [batch], QUICK, trace=trace)
    assert int(cache.get_seq_length()) == length
    assert all(torch.equal(a.keys, b) for a, b in zip(cache.layers, values, strict=True))
