"""What forward assigns while a model is traced or tried is taken back afterwards."""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from magr_fx.passes.function_caches import function_caches_kept
from magr_fx.passes.torch_private import version_of

# Whose objects are left alone: they are no state of a model, or keep it in places of their own.
_FOREIGN = frozenset({"torch", "torchao", "accelerate", "numpy", "logging", "builtins"})
_NO_STATE = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
    torch.Tensor, torch.Generator, str, bytes, int, float, complex, bool, type(None),
)  # fmt: skip


class _State:
    """Every container that can be reached from a model's modules, and what is in it.

    Containers are the attributes of modules and of other objects, dicts, lists, sets and deques;
    what is in them is kept by reference.

    Attributes:
        tensors: those that are found on the way: also what is no parameter and no buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[torch.Tensor] = []
        self._known: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        pending: list[Any] = list(model.modules())
        while pending:
            pending.extend(self._keep(pending.pop()))
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        others = [t for t in self.tensors if id(t) not in own and _has_values(t)]
        self._values = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in others]

    def restore(self) -> None:
        """Have the same objects in the same containers again."""
        for container, kept in self._containers:
            if not _same(container, kept):
                container.clear()
                if isinstance(container, (dict, set)):
                    container.update(kept)
                else:
                    container.extend(kept)
        self._restore_values()
        self._restore_attributes()

    @torch.no_grad()
    def _restore_values(self) -> None:
        for tensor, version, before in self._values:
            if version_of(tensor) != version:
                tensor.copy_(before)

    def _restore_attributes(self) -> None:
        """Of slots and classes, which are in no container."""
        for owner, values in self._slots:
            for name in _slots(type(owner)):
                if name in values:
                    object.__setattr__(owner, name, values[name])
                elif hasattr(owner, name):
                    object.__delattr__(owner, name)
        for kind, attributes in self._classes:
            for name in [n for n in vars(kind) if n not in attributes and not n.startswith("__")]:
                delattr(kind, name)
            for name, value in attributes.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)

    def _keep(self, value: Any) -> list[Any]:
        """Keep what is in a value; returns that, to go on with."""
        if id(value) in self._known:
            return []
        self._known.add(id(value))
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        if isinstance(value, _NO_STATE):
            return []
        inside: list[Any] = []
        if isinstance(value, dict):
            self._containers.append((value, dict(value)))
            inside += value.values()
        elif isinstance(value, (list, set, deque)):
            self._containers.append((value, value.copy()))
            inside += value
        elif isinstance(value, (tuple, frozenset)):
            inside += value
        elif not isinstance(value, nn.Module) and _package(type(value)) in _FOREIGN:
            return []
        inside += self._keep_attributes(value)
        return inside

    def _keep_attributes(self, value: Any) -> list[Any]:
        attributes = getattr(value, "__dict__", None)
        inside: list[Any] = []
        if isinstance(attributes, dict):
            self._containers.append((attributes, dict(attributes)))
            inside += attributes.values()
        names = _slots(type(value))
        if names:
            kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
            self._slots.append((value, kept))
            inside += kept.values()
        kind = type(value)
        if isinstance(value, nn.Module) and id(kind) not in self._known:
            self._known.add(id(kind))
            if _package(kind) not in _FOREIGN:
                own = {n: v for n, v in vars(kind).items() if not n.startswith("__")}
                self._classes.append((kind, own))
                inside += own.values()
        return inside


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Take back what forward assigns anywhere in the model, also after an error.

    Attributes of modules, of their classes, and of the objects that they hold are the same objects
    again, and so is what is in their dicts, lists, sets and deques; tensors in there have their
    values. What functions of its code keep has none of a tracer's tensors, see
    :mod:`magr_fx.passes.function_caches`. Parameters and buffers are not copied: it yields all
    tensors that the model holds, for those who watch what is written to them.

    Raises:
        RuntimeError: forward made parameters, which a trace would then have instead of them.
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
    """The same, and the values of the model's buffers, whoever writes to them."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with attributes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _same(now: Any, kept: Any) -> bool:
    """Whether a container holds the same objects in the same order."""
    if len(now) != len(kept):
        return False
    pairs = zip(now, kept, strict=True)
    return all(a is b and (not isinstance(now, dict) or now[a] is kept[b]) for a, b in pairs)


def _has_values(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return (
        plain and tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_inference())
    )


def _package(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def _slots(kind: type) -> list[str]:
    """The names of the attributes that an object of this class has outside of its ``__dict__``."""
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
