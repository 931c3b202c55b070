"""What functions keep between calls, beside the model: a tracer's tensors must not stay there.

A function of the model's code may keep what it has computed, a table of positions for one, in
functools' caches, in a global, in what it closes over, in a default, or as an attribute of its own.
While torch.export runs the model, tensors have no values; kept, they come out of the model later.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from magr_fx.passes.graphs.torch_private import is_fake

# Whose functions are not looked into: they keep nothing of a model's, or know of tracing.
_FOREIGN = frozenset(
    {"torch", "torchao", "accelerate", "numpy", "logging", "builtins", "functools", "typing"}
)
_MOST_FUNCTIONS = 20_000
_DEEP = 5  # containers in containers
_MEMOISED = type(functools.lru_cache(len))
_UNSET = object()
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


class _Place:
    """The globals of one file, or what belongs to one function: what of it the code may write to.

    It is taken back as a whole, or not at all: a flag that says that a table is made goes with it.
    """

    def __init__(self) -> None:
        self.variables: dict[str, tuple[dict[str, Any], Any]] = {}
        self.cells: list[tuple[types.CellType, Any]] = []
        self.containers: dict[int, tuple[Any, Any]] = {}

    def keep(self, value: Any, deep: int = 0) -> None:
        """Keep what is in a container, and in those in it."""
        if deep > _DEEP or id(value) in self.containers:
            return
        inside = _inside(value)
        if inside is None:
            return
        container = value if isinstance(value, (*CONTAINERS, tuple)) else vars(value)
        if isinstance(container, tuple):
            self.containers[id(value)] = value, None
        else:
            self.containers[id(value)] = container, contents(container)
        for one in inside:
            self.keep(one, deep + 1)

    def has_fakes(self) -> bool:
        known: set[int] = set()
        values = [namespace.get(name) for name, (namespace, _) in self.variables.items()]
        values += [cell.cell_contents for cell, _ in self.cells if _is_set(cell)]
        values += [container for container, _ in self.containers.values()]
        return any(_has_fakes(value, known) for value in values)

    def restore(self) -> None:
        for container, kept in self.containers.values():
            if kept is not None:
                refill(container, kept)
        for name, (namespace, value) in self.variables.items():
            if value is not _UNSET:
                namespace[name] = value
            else:
                namespace.pop(name, None)
        for cell, value in self.cells:
            if value is not _UNSET:
                cell.cell_contents = value
            elif _is_set(cell):
                del cell.cell_contents


class _Caches:
    """What the functions of a model's code keep: of its classes, and all that these name."""

    def __init__(self, model: nn.Module) -> None:
        self.memoised: list[tuple[Any, int]] = []  # functools' caches, and how often they missed
        self.places: dict[int, _Place] = {}
        self._known: set[int] = set()
        self._alive: list[Any] = []  # what is made only to be looked at, whose id is known
        self._pending: list[Any] = []
        for module in model.modules():
            self._pending.append(type(module))
            self._pending += [f for value in vars(module).values() for f in _with_methods(value)]
        while self._pending and len(self._known) < _MOST_FUNCTIONS:
            self._look_at(self._pending.pop())

    def _look_at(self, value: Any) -> None:
        if id(value) in self._known or isinstance(value, (torch.Tensor, nn.Module)):
            return
        if isinstance(value, _MEMOISED):
            self.memoised.append((value, value.cache_info().misses))
            self._add(value, value.__wrapped__)
        elif isinstance(value, type):
            if not _is_foreign(value):
                members = [v for kind in value.__mro__ if not _is_foreign(kind) for v in
                           vars(kind).values()]  # fmt: skip
                self._add(value, *members)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self._add(value, value.__func__)
        elif isinstance(value, property):
            self._add(value, value.fget)
        elif isinstance(value, (functools.partial, functools.cached_property)):
            self._add(value, value.func)
        elif isinstance(value, types.FunctionType) and not _is_foreign(value):
            self._add(value)
            self._look_into(value)

    def _add(self, value: Any, *inside: Any) -> None:
        self._known.add(id(value))
        self._alive.append(value)
        self._pending += inside

    def _look_into(self, function: types.FunctionType) -> None:
        names = names_of(function.__code__)
        file, own = self._place(function.__globals__), self._place(function)
        for name in names:  # those of attributes too, and of globals that are set later
            value = self._keep_variable(name, function.__globals__, file)
            if isinstance(value, types.ModuleType) and not _is_foreign(value):
                for attribute in names & vars(value).keys():
                    self._keep_variable(attribute, vars(value), self._place(vars(value)))
        for cell in function.__closure__ or ():
            own.cells.append((cell, cell.cell_contents if _is_set(cell) else _UNSET))
            self._keep(own.cells[-1][1], own)
        keywords = function.__kwdefaults__ or {}
        for value in (*(function.__defaults__ or ()), *keywords.values()):
            self._keep(value, own)
        own.keep(vars(function))
        self._pending += vars(function).values()

    def _keep_variable(self, name: str, namespace: dict[str, Any], place: _Place) -> Any:
        value = namespace.get(name, _UNSET)
        place.variables[name] = namespace, value
        self._keep(value, place)
        return value

    def _keep(self, value: Any, place: _Place) -> None:
        place.keep(value)
        self._pending += _with_methods(value)

    def _place(self, owner: Any) -> _Place:
        return self.places.setdefault(id(owner), _Place())

    def restore(self) -> None:
        """Empty functools' caches that have grown, and take back where a tracer's tensors are."""
        for cache, misses in self.memoised:
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        for place in self.places.values():
            if place.has_fakes():
                place.restore()


@contextlib.contextmanager
def function_caches_kept(model: nn.Module) -> Iterator[None]:
    """Leave no tensor of a tracer in what the functions of the model's code keep.

    functools' caches cannot be put back: one that grew is emptied, so that what was in it is
    computed once more. Globals and the like are as they were if such a tensor is in them.
    """
    caches = _Caches(model)
    try:
        yield
    finally:
        caches.restore()


# Whose own methods are called, not those of classes derived from them, which may refuse or do more.
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


def contents(container: Any) -> Any:
    """What a container really holds, as a dict or a list.

    A derived class may give something else when it is asked: transformers' ACT2FN, for one, makes a
    new module of the class that it holds.
    """
    kind = _kind_of(container)
    if issubclass(kind, dict):
        return {key: dict.__getitem__(container, key) for key in kind.__iter__(container)}
    return list(kind.__iter__(container))


def refill(container: Any, kept: Any) -> None:
    """Have the same objects in a container in the same order, if they are not."""
    kind, now = _kind_of(container), contents(container)
    if issubclass(kind, dict):
        if not (_same(now, kept) and _same(now.values(), kept.values())):
            kind.clear(container)
            for key, value in kept.items():
                kind.__setitem__(container, key, value)
    elif not _same(now, kept):
        kind.clear(container)
        (kind.update if issubclass(kind, set) else kind.extend)(container, kept)


def _kind_of(container: Any) -> Any:
    return next(kind for kind in CONTAINERS if isinstance(container, kind))


def _same(now: Iterable[Any], kept: Iterable[Any]) -> bool:
    return [id(one) for one in now] == [id(one) for one in kept]


def _with_methods(value: Any) -> list[Any]:
    """A value that may be a function, and the class of an object, whose methods are functions."""
    is_object = _inside(value) is not None and not isinstance(value, (*CONTAINERS, tuple))
    return [value, type(value)] if is_object else [value]


def _inside(value: Any) -> list[Any] | None:
    """What a container or an object holds; None for what is no state of its own."""
    if isinstance(value, CONTAINERS):
        held = contents(value)
        return list(held.values()) if isinstance(held, dict) else held
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, (*_PLAIN, nn.Module, torch.Tensor, types.FunctionType, _MEMOISED)):
        return None
    if _is_foreign(type(value)) or not isinstance(getattr(value, "__dict__", None), dict):
        return None
    return list(vars(value).values())


def _has_fakes(value: Any, known: set[int], deep: int = 0) -> bool:
    if isinstance(value, torch.Tensor):
        return is_fake(value)
    if deep > _DEEP or id(value) in known:
        return False
    inside = _inside(value)
    if inside is None:
        return False
    known.add(id(value))
    return any(_has_fakes(one, known, deep + 1) for one in inside)


def names_of(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function's code, and in that of functions in it."""
    inner = (names_of(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


def _is_foreign(value: Any) -> bool:
    """Whether it is a library's that is not looked into; of transformers, all but its models."""
    module = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", "")
    package = str(module).partition(".")[0]
    return package in _FOREIGN or (
        package == "transformers" and not str(module).startswith("transformers.models.")
    )
