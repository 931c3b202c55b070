"""Undo what ``forward`` assigns while a model is traced or run on trial."""

from __future__ import annotations

import array
import contextlib
import functools
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from magr_fx.passes.graphs.torch_private import version_of
from magr_fx.passes.tracing.function_caches import (
    CONTAINERS,
    contents,
    function_caches_kept,
    names_of,
    refill,
)

# Packages whose objects are not saved: they are no state of a model, or manage it themselves.
_FOREIGN = frozenset({"torch", "torchao", "accelerate", "numpy", "logging", "builtins"})
_NO_STATE = (
    types.BuiltinFunctionType, types.ModuleType, str, bytes, int, float, complex, bool, type(None),
)  # fmt: skip
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_INSTALLED = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_ARRAYS = (np.ndarray, bytearray, array.array)
_STANDARD = sys.stdlib_module_names - {"__main__"}
_ABSENT = object()


class _State:
    """All state that can be reached from a model's modules, saved so that it can be restored.

    It consists of the attributes of modules, of other objects, and of the classes of both; of
    dicts, lists, sets, deques and arrays; and of what functions hold: closures, default arguments,
    and the globals that they name. So the objects that hooks write to are saved too. In installed
    packages, globals are saved only in the files that define the model's modules.

    Attributes:
        tensors: all tensors that were found, also those that are no parameters and no buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[torch.Tensor] = []
        self._known: dict[int, Any] = {}  # by id; held so that no other object gets the id
        self._undo: list[Callable[[], Any]] = []
        self._sources = {type(module).__module__ for module in model.modules()}
        pending: list[Any] = list(model.modules())
        while pending:
            pending.extend(self._keep(pending.pop()))
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        others = [t for t in self.tensors if id(t) not in own and _has_values(t)]
        self._values = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in others]

    def restore(self) -> None:
        """Put the saved objects back in their places."""
        for undo in self._undo:
            undo()
        self._restore_values()

    @torch.no_grad()
    def _restore_values(self) -> None:
        for tensor, version, before in self._values:
            if version_of(tensor) != version:
                tensor.copy_(before)

    def _keep(self, value: Any) -> list[Any]:
        """Save what a value holds; returns the objects in it, which are to be saved next."""
        if id(value) in self._known:
            return []
        self._known[id(value)] = value
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, type):
            return self._keep_class(value)
        elif isinstance(value, types.FunctionType):
            return self._keep_function(value)
        elif isinstance(value, (*_GENERATORS, *_ARRAYS)):
            generates = isinstance(value, _GENERATORS)
            self._undo.append(_generator_undo(value) if generates else _array_undo(value))
        elif not isinstance(value, _NO_STATE):
            inside = [*self._held(value), *_fixed_parts(value)]
            if inside or isinstance(value, nn.Module) or _package(type(value)) not in _FOREIGN:
                return inside + self._keep_attributes(value)
        return []

    def _held(self, value: Any) -> list[Any]:
        """Save the contents of a container; returns them."""
        if not isinstance(value, CONTAINERS):
            return []
        kept = contents(value)
        self._undo.append(functools.partial(refill, value, kept))
        return list(kept.values()) if isinstance(kept, dict) else kept

    def _keep_attributes(self, value: Any) -> list[Any]:
        attributes = getattr(value, "__dict__", None)
        inside: list[Any] = [type(value)]
        if isinstance(attributes, dict):
            inside += self._held(attributes)
        names = _slots(type(value))
        if names:
            kept = {name: getattr(value, name, _ABSENT) for name in names}
            self._undo.append(functools.partial(_reset_slots, value, kept))
            inside += kept.values()
        return inside

    def _keep_class(self, kind: type) -> list[Any]:
        if _is_foreign(kind.__module__):
            return []
        own = {n: v for n, v in vars(kind).items() if not n.startswith("__")}
        self._undo.append(functools.partial(_reset_class, kind, own))
        return [*own.values(), vars(kind).get("__call__"), *kind.__bases__]

    def _keep_function(self, function: types.FunctionType) -> list[Any]:
        if _is_foreign(function.__module__):
            return []
        inside = [function.__defaults__, function.__kwdefaults__]
        if function.__module__ in self._sources or not _is_installed(function.__code__):
            every = function.__globals__
            named = {name: every.get(name, _ABSENT) for name in names_of(function.__code__)}
            self._undo.append(functools.partial(_reset_globals, every, named))
            inside += named.values()
        for cell in function.__closure__ or ():
            content = _content(cell)
            self._undo.append(functools.partial(_reset_cell, cell, content))
            inside.append(content)
        return inside + self._held(function.__dict__)


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Undo what ``forward`` assigns anywhere in the model, also after an error.

    Attributes of modules, of their classes, and of the objects that they hold are the same objects
    again. So are the contents of their dicts, lists, sets and deques. Tensors in these have their
    old values. No tracer's tensor stays in what functions store, see :mod:`function_caches`.
    The values of parameters and buffers are not restored. The context yields all tensors that the
    model holds, so that the caller can watch writes to them.

    Raises:
        RuntimeError: forward created parameters; the trace would have these, not the model's own.
    """
    state = _State(model)
    parameters = [id(parameter) for parameter in model.parameters()]
    try:
        with function_caches_kept(model):
            yield state.tensors
        if [id(parameter) for parameter in model.parameters()] != parameters:
            raise RuntimeError("forward creates parameters; run the model on one input first")
    finally:
        state.restore()


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """As :func:`attributes_kept`; the values of the model's buffers are restored too."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with attributes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _fixed_parts(value: Any) -> list[Any]:
    """The parts of a value whose parts cannot be exchanged, such as a tuple or a method."""
    if isinstance(value, (tuple, frozenset)):
        return list(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    return [value.fget] if isinstance(value, property) else []


def _reset_slots(owner: Any, kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        if value is not _ABSENT:
            object.__setattr__(owner, name, value)
        elif hasattr(owner, name):
            object.__delattr__(owner, name)


def _reset_class(kind: type, own: dict[str, Any]) -> None:
    for name in [n for n in vars(kind) if n not in own and not n.startswith("__")]:
        delattr(kind, name)
    for name, value in own.items():
        if vars(kind).get(name, _ABSENT) is not value:
            setattr(kind, name, value)


def _reset_globals(namespace: dict[str, Any], named: dict[str, Any]) -> None:
    for name, value in named.items():
        if value is _ABSENT:
            namespace.pop(name, None)
        elif namespace.get(name, _ABSENT) is not value:
            namespace[name] = value


def _reset_cell(cell: types.CellType, content: Any) -> None:
    if content is not _ABSENT:
        cell.cell_contents = content
    elif _content(cell) is not _ABSENT:
        del cell.cell_contents


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return _ABSENT


def _generator_undo(generator: Any) -> Callable[[], Any]:
    """A function that makes a generator draw the same numbers again."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    bits: Any = generator.bit_generator
    return functools.partial(setattr, bits, "state", bits.state)


def _array_undo(values: Any) -> Callable[[], Any]:
    """A function that restores an array's values, but none of a memmap or a read-only array."""
    if isinstance(values, np.ndarray):
        if isinstance(values, np.memmap) or not values.flags.writeable:
            return lambda: None
        return functools.partial(np.copyto, values, values.copy())
    return functools.partial(values.__setitem__, slice(None), values[:])


def _is_installed(code: types.CodeType) -> bool:
    """Whether the code belongs to an installed package, not to the caller."""
    return code.co_filename.startswith(_INSTALLED)


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether it is a plain tensor with values; parameters of other models are not saved."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return plain and not (tensor.is_meta or tensor.is_inference())


def _package(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def _is_foreign(module: str | None) -> bool:
    """Whether what this module defines holds no state of a model."""
    package = str(module).partition(".")[0]
    return package in _FOREIGN or package == "magr_fx" or package in _STANDARD


def _slots(kind: type) -> list[str]:
    """The names in the ``__slots__`` of this class and its bases, as an object has them."""
    if _package(kind) in _FOREIGN:
        return []
    found: list[str] = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    hidden = [
        f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n
        for n in found
    ]
    return [name for name in hidden if name not in ("__dict__", "__weakref__")]
