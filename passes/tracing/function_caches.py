"""Caches that functions keep outside the model: no tracer's tensor may stay in them.

Functions of the model's code may store what they compute, such as a table of positions: in
functools caches, globals, closures, default arguments, or function attributes. While torch.export
runs the model, its tensors are fake: they have no values. A fake tensor that stays in such a cache
would be used in later calls of the model.
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

# Packages whose functions are not searched: they store nothing of a model, or handle tracing.
_FOREIGN = frozenset(
    {"torch", "torchao", "accelerate", "numpy", "logging", "builtins", "functools", "typing"}
)
_MAX_FUNCTIONS = 20_000
_MAX_DEPTH = 5  # levels of nested containers that are searched
_MEMOISED = type(functools.lru_cache(len))
_UNSET = object()
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


class _Place:
    """What the model's code may write to in the globals of one file, or in one function.

    It is restored as a whole or not at all. So a flag that says that a table is built is restored
    together with the table.
    """

    def __init__(self) -> None:
        self.variables: dict[str, tuple[dict[str, Any], Any]] = {}
        self.cells: list[tuple[types.CellType, Any]] = []
        self.containers: dict[int, tuple[Any, Any]] = {}

    def keep(self, value: Any, deep: int = 0) -> None:
        """Save the contents of a container, and of the containers in it."""
        if deep > _MAX_DEPTH or id(value) in self.containers:
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
    """What functions store: those of the model's classes, and every function that these name."""

    def __init__(self, model: nn.Module) -> None:
        self.memoised: list[tuple[Any, int]] = []  # functools caches, with their misses so far
        self.places: dict[int, _Place] = {}
        self._known: set[int] = set()
        self._alive: list[Any] = []  # so that no other object gets a known id
        self._pending: list[Any] = []
        for module in model.modules():
            self._pending.append(type(module))
            self._pending += [f for value in vars(module).values() for f in _with_methods(value)]
        while self._pending and len(self._known) < _MAX_FUNCTIONS:
            self._visit(self._pending.pop())

    def _visit(self, value: Any) -> None:
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
            self._visit_function(value)

    def _add(self, value: Any, *inside: Any) -> None:
        self._known.add(id(value))
        self._alive.append(value)
        self._pending += inside

    def _visit_function(self, function: types.FunctionType) -> None:
        names = names_of(function.__code__)
        file, own = self._place(function.__globals__), self._place(function)
        for name in names:  # also names of attributes, and of globals without a value yet
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
        """Clear functools caches that have grown; restore places that hold a tracer's tensors."""
        for cache, misses in self.memoised:
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        for place in self.places.values():
            if place.has_fakes():
                place.restore()


@contextlib.contextmanager
def function_caches_kept(model: nn.Module) -> Iterator[None]:
    """Leave no tracer's tensor in what the functions of the model's code store.

    The entries of a functools cache cannot be restored. A cache that grew is cleared, and its
    values are computed again. Globals, closures and the like are restored if they hold such a
    tensor.
    """
    caches = _Caches(model)
    try:
        yield
    finally:
        caches.restore()


# The methods of these classes are called: a derived class may refuse a call, or do more.
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


def contents(container: Any) -> Any:
    """What a container really holds, as a dict or a list.

    The methods of a derived class may return something else. transformers' ACT2FN, for example,
    creates a new module of the class that it holds.
    """
    kind = _kind_of(container)
    if issubclass(kind, dict):
        return {key: dict.__getitem__(container, key) for key in kind.__iter__(container)}
    return list(kind.__iter__(container))


def refill(container: Any, kept: Any) -> None:
    """Put the saved objects back into a container, in their order, unless they are there."""
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
    """The value, which may be a function; for an object also its class, which has methods."""
    is_object = _inside(value) is not None and not isinstance(value, (*CONTAINERS, tuple))
    return [value, type(value)] if is_object else [value]


def _inside(value: Any) -> list[Any] | None:
    """What a container or an object holds; None for a value without state of its own."""
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
    if deep > _MAX_DEPTH or id(value) in known:
        return False
    inside = _inside(value)
    if inside is None:
        return False
    known.add(id(value))
    return any(_has_fakes(one, known, deep + 1) for one in inside)


def names_of(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function's code, and in its inner functions."""
    inner = (names_of(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


def _is_foreign(value: Any) -> bool:
    """Whether it belongs to a library that is not searched: of transformers, all but models."""
    module = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", "")
    package = str(module).partition(".")[0]
    return package in _FOREIGN or (
        package == "transformers" and not str(module).startswith("transformers.models.")
    )
