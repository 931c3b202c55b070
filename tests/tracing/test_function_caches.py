"""What functions of a model's code keep between calls has no tensor of a tracer in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import memoised_tables
import pytest
import torch
from memoised_tables import made
from targets import SYMMETRIC, intx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from toys import WIDTH, vectors

from magr_fx import MagRConfig, TraceError, magr_quantize, magr_transform
from magr_fx.passes.tracing.function_caches import function_caches_kept

QUICK = MagRConfig(alpha=1e-2)

TABLES: dict[Any, Any] = {}
NESTED: dict[str, dict[int, list[Tensor]]] = {"sizes": {}}
ROWS: list[Tensor] = []
TABLE: Tensor | None = None
IS_MADE = False


@functools.cache
def memoised(size: int) -> Tensor:
    return made(size)


def by_another(size: int) -> Tensor:
    return by_a_third(size) * 1


def by_a_third(size: int) -> Tensor:
    return [memoised(n) for n in [size]][0]  # noqa: RUF015 - a function in a function


def in_a_dict(size: int) -> Tensor:
    if size not in TABLES:
        TABLES[size] = made(size)
    return TABLES[size]  # type: ignore[no-any-return]


def in_nested(size: int) -> Tensor:
    return NESTED["sizes"].setdefault(size, [made(size)])[0]


def in_a_list(size: int) -> Tensor:
    if not ROWS:
        ROWS.append(made(size))
    return ROWS[0]


def in_a_global(size: int) -> Tensor:
    global TABLE, IS_MADE
    if not IS_MADE:
        TABLE, IS_MADE = made(size), True
    assert TABLE is not None
    return TABLE


def in_a_new_global(size: int) -> Tensor:
    global NEW  # noqa: PLW0603
    if "NEW" not in globals():
        NEW = made(size)  # type: ignore[name-defined]
    return NEW  # type: ignore[name-defined,no-any-return]


def in_a_default(size: int, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return kept.setdefault(size, made(size)) if size not in kept else kept[size]


def in_its_attribute(size: int) -> Tensor:
    if not hasattr(in_its_attribute, "table"):
        in_its_attribute.table = made(size)  # type: ignore[attr-defined]
    return in_its_attribute.table  # type: ignore[attr-defined,no-any-return]


def _closures() -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]]:
    kept: dict[int, Tensor] = {}
    table: Tensor | None = None

    def in_a_closure(size: int) -> Tensor:
        if size not in kept:
            kept[size] = made(size)
        return kept[size]

    def in_a_nonlocal(size: int) -> Tensor:
        nonlocal table
        if table is None:
            table = made(size)
        return table

    return in_a_closure, in_a_nonlocal


in_a_closure, in_a_nonlocal = _closures()


def wrapped(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    @functools.wraps(function)
    def call(size: int) -> Tensor:
        return function(size)

    return call


@wrapped
@functools.cache
def behind_a_decorator(size: int) -> Tensor:
    return made(size)


class Helper:
    """No module; in a global, it holds tables of its own."""

    def __init__(self) -> None:
        self.tables: dict[int, Tensor] = {}

    def kept(self, size: int) -> Tensor:
        return self.tables.setdefault(size, made(size))

    @functools.lru_cache  # noqa: B019
    def memoised(self, size: int) -> Tensor:
        return made(size)


HELPER = Helper()


def by_an_attribute(size: int) -> Tensor:
    return memoised_tables.memoised(size) * memoised_tables.in_a_dict(size) / made(size)


def in_another_file(size: int) -> Tensor:
    if memoised_tables.last is None:
        memoised_tables.last = made(size)
    return memoised_tables.last


def by_an_object(size: int) -> Tensor:
    return HELPER.kept(size) * HELPER.memoised(size) / made(size)


FUNCTIONS: list[Callable[[int], Tensor]] = [
    memoised, by_another, in_a_dict, in_nested, in_a_list, in_a_global, in_a_new_global,
    in_a_default, in_its_attribute, in_a_closure, in_a_nonlocal, behind_a_decorator,
    by_an_attribute, in_another_file, by_an_object,
]  # fmt: skip


class Reading(nn.Module):
    """Scales what it is given by a table that one of the functions keeps."""

    def __init__(self, table: Callable[[int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.table, self.helper, self.refuses = table, Helper(), False

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x) * self.table(WIDTH)
        if self.refuses and bool(hidden.sum() > 1e9):
            return hidden
        return self.last(hidden.relu())


class OfMethods(Reading):
    """The same, with methods that keep their results."""

    def __init__(self) -> None:
        super().__init__(made)

    def forward(self, x: Tensor) -> Any:
        scale = self.memoised(WIDTH) * self.of_class(WIDTH) * self.of_none(WIDTH)
        scale = scale * self.helper.memoised(WIDTH) / made(WIDTH) ** 3
        return self.last((self.first(x) * scale).relu())

    @functools.lru_cache  # noqa: B019
    def memoised(self, size: int) -> Tensor:
        return made(size)

    @classmethod
    @functools.cache
    def of_class(cls, size: int) -> Tensor:
        return made(size)

    @staticmethod
    @functools.cache
    def of_none(size: int) -> Tensor:
        return made(size)


MODELS: dict[str, Callable[[], Reading]] = {
    **{f.__name__: (lambda f=f: Reading(f)) for f in FUNCTIONS},  # type: ignore[misc]
    "methods": OfMethods,
    "an instance's own": lambda: Reading(functools.lru_cache(made)),
    "a partial": lambda: Reading(functools.partial(in_a_dict)),
}


def is_right(model: Reading) -> None:
    """Whether the model computes by itself, with its weights, what it is to compute."""
    (x, *_) = vectors()
    with torch.no_grad():
        hidden = functional.linear(x, model.first.weight, model.first.bias) * made(WIDTH)
        expected = functional.linear(hidden.relu(), model.last.weight, model.last.bias)
        result = model(x)
    assert type(result) is Tensor
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("trace", ["export", "make_fx"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow_if("in_nested-make_fx", "in_a_global-export", "in_a_global-make_fx")
def test_the_model_goes_on_with_tensors(kind: str, trace: str) -> None:
    model = MODELS[kind]()
    magr_transform(model, vectors(), QUICK, trace=trace)
    is_right(model)
    magr_transform(model, vectors(), QUICK, trace=trace)  # with what is kept by now
    is_right(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow_if("in_a_global")
def test_also_after_an_error(kind: str) -> None:
    model = MODELS[kind]()
    model.refuses = True
    if kind != "methods":
        with pytest.raises(TraceError):
            magr_transform(model, vectors(), QUICK, trace="export")
    is_right(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow_if("in_a_global")
def test_also_when_it_is_quantized(kind: str) -> None:
    model = MODELS[kind]()
    magr_quantize(model, vectors(), intx(4, SYMMETRIC, None))
    is_right(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow_if("memoised", "in_nested", "in_a_list", "in_a_global", "methods")
def test_also_after_pt2e(kind: str) -> None:
    model = MODELS[kind]()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    magr_quantize(model, vectors(), quantizer, QUICK)
    is_right(model)


def test_what_was_kept_before_is_still_there() -> None:
    TABLES.clear()
    mine = TABLES.setdefault("mine", torch.ones(3))
    NESTED["sizes"].clear()
    fake_free = NESTED["sizes"]
    for read in (in_a_dict, in_nested):
        magr_transform(Reading(read), vectors(), QUICK, trace="export")
    assert TABLES["mine"] is mine
    assert NESTED["sizes"] is fake_free
    assert not any(isinstance(table, FakeTensor) for table in TABLES.values())


def test_a_cache_without_a_tracer_s_tensors_stays() -> None:
    """It is a cache of the caller's: what it has is not lost for what it took on the way."""
    TABLES.clear()
    with function_caches_kept(Reading(in_a_dict)):
        table = in_a_dict(WIDTH)
    assert {WIDTH: table} == TABLES
    memoised.cache_clear()
    memoised(3)
    with function_caches_kept(Reading(memoised)):
        kept = memoised(3)  # is there already
    assert memoised(3) is kept
