"""Models whose weights accelerate offloads to CPU memory or to disk.

:mod:`resident` explains how such a model is worked on. Meanwhile accelerate's hooks, which load
the weights of each module when it runs, are removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from magr_fx.errors import ModelError
from magr_fx.machine.addresses import address
from magr_fx.machine.safetensors_header import read_header
from magr_fx.passes.known_layers.transformers_private import tied_names
from magr_fx.passes.offloading.fetch_ahead import FetchAhead
from magr_fx.passes.offloading.resident import (
    Place,
    PlaceholderParameter,
    Resident,
    all_resident,
    with_placeholders,
)


def is_offloaded(model: object) -> bool:
    """Whether accelerate offloads some of the model's weights."""
    return isinstance(model, nn.Module) and any(map(offloading_hook, model.modules()))


def execution_device(model: nn.Module) -> torch.device | None:
    """The device on which accelerate would run an offloaded model's first part; None for the CPU.

    Raises:
        ModelError: torch cannot use that device on this machine.
    """
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None and hook.execution_device is not None:
            try:
                device = torch.empty(0, device=hook.execution_device).device
            except (RuntimeError, AssertionError) as error:
                raise ModelError(
                    "the model is offloaded by accelerate, to run on the device "
                    f"{hook.execution_device}, which torch cannot use here ({error}); offload it "
                    'with execution_device="cpu"'
                ) from error
            return None if device.type == "cpu" else device
    return None


@contextlib.contextmanager
def offloaded_weights_loaded(
    model: nn.Module, device: torch.device | None = None
) -> Iterator[Resident]:
    """Inside the context, replace every offloaded weight by a placeholder that can be loaded.

    accelerate's hooks are removed meanwhile. Afterwards the model has its hooks and its own
    Parameter objects again.

    Args:
        model: any model; one that is not offloaded stays as it is.
        device: where weights are needed, also those that are not offloaded; None is the CPU.

    Yields:
        What loads weights: see :class:`Resident`.

    Raises:
        ModelError: the weights cannot be read, or hold NaN or Inf. The model is unchanged then.
    """
    if not is_offloaded(model):
        yield all_resident
        return
    with contextlib.ExitStack() as restored:
        ahead = None if device is None else restored.enter_context(FetchAhead(device))
        places = _find(model, ahead)
        for module, key, buffer in list(_buffers(model)):
            restored.callback(module._buffers.__setitem__, key, module._buffers[key])
            module._buffers[key] = buffer
        for module in model.modules():
            # Models that read a child's weights themselves look for its hook.
            hook = module.__dict__.pop("_hf_hook", None)
            if hook is not None:
                restored.callback(setattr, module, "_hf_hook", hook)
            unhooked: Any = getattr(module, "_old_forward", None)
            if unhooked is not None:
                restored.callback(setattr, module, "forward", module.forward)
                module.forward = unhooked
        yield restored.enter_context(with_placeholders(model, places, device))


@dataclass(frozen=True, eq=False)
class _Weight:
    """An offloaded weight: where its values are stored, and its placeholder."""

    name: str
    kept: list[tuple[Any, str]]  # accelerate's mappings, and the keys in them
    placeholder: PlaceholderParameter
    ahead: FetchAhead | None  # None: the weight is needed on the CPU

    def load(self) -> torch.Tensor:
        fetched = None if self.ahead is None else self.ahead.take(self)
        return self._read() if fetched is None else fetched

    def _read(self) -> torch.Tensor:
        values, key = self.kept[0]
        value: torch.Tensor = values[key]
        return value

    def store(self, weight: torch.Tensor) -> None:
        weight, stored = weight.cpu(), list[tuple[Any, str]]()
        for values, key in self.kept:
            try:
                _store(values, key, weight)
            except BaseException:
                if stored:  # a weight with several names: restore it under all of them
                    former = values[key].clone()
                    for other in stored:
                        _store(*other, former)
                raise
            stored.append((values, key))

    def prefetch(self) -> None:
        if self.ahead is not None:
            self.ahead.begin(self, self._read)
            return
        values, key = self.kept[0]
        entry = {} if isinstance(values, dict) else values.index.get(key, {})
        file = entry.get("safetensors_file")
        if file is not None and hasattr(os, "posix_fadvise"):  # not on macOS
            stored = read_header(Path(file))[entry.get("weight_name", key)]
            with stored.file.open("rb") as opened:
                span = (stored.start, stored.nbytes)
                os.posix_fadvise(opened.fileno(), *span, os.POSIX_FADV_WILLNEED)


@runtime_checkable
class Storing(Protocol):
    """A mapping of weights that stores new values itself; see :func:`keep_in`."""

    def store(self, name: str, weight: torch.Tensor) -> None: ...


def _find(model: nn.Module, ahead: FetchAhead | None) -> list[Place]:
    """The places of the offloaded weights; names that share one tensor share one weight."""
    weights: dict[Any, _Weight] = {}
    places: list[Place] = []
    tied = tied_names(model)  # accelerate stores a copy for each name
    for hook, module, prefix, path in _hooked(model):
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            values, kept_as = _unprefixed(hook.weights_map, path + key)
            name = prefix + path + key
            _check_kept(name, values, kept_as)
            partner = tied.get(name, name)
            identity = partner if partner in tied.values() else _identity(values, kept_as)
            if identity not in weights:
                weights[identity] = _Weight(name, [], PlaceholderParameter(parameter), ahead)
            weights[identity].kept.append((values, kept_as))
            places.append((module, key, weights[identity]))
    return places


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """The offloaded buffers with their values, which are small enough to be kept in memory."""
    for hook, module, prefix, path in _hooked(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                values, kept_as = _unprefixed(hook.weights_map, path + key)
                _check_kept(prefix + path + key, values, kept_as)
                yield module, key, values[kept_as].clone()


def _hooked(model: nn.Module) -> Iterator[tuple[Any, nn.Module, str, str]]:
    """Each offloaded module: (hook, module, name of the hook's module, path from there).

    A name or path that is not empty ends in a dot.
    """
    known: set[nn.Module] = set()
    for name, outer in model.named_modules():
        hook = offloading_hook(outer)
        if hook is None:
            continue
        for path, module in outer.named_modules() if hook.place_submodules else [("", outer)]:
            if module not in known:
                known.add(module)
                yield hook, module, f"{name}." if name else "", f"{path}." if path else ""


def _check_kept(name: str, values: Any, key: str) -> None:
    if values is None or key not in values:
        raise ModelError(f"{name} is offloaded by accelerate, but has no values; reload the model")
    if not isinstance(values, dict) and key not in values.state_dict and not values.save_folder:
        raise ModelError(
            f"{name} is offloaded by accelerate to the checkpoint's own file, which must not be "
            "changed; give the model a folder to offload to: offload_folder in from_pretrained"
        )


def offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that loads the module's weights, or None."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
        if getattr(one, "offload", False):
            return one
    return None


def offloaded_weights(model: nn.Module) -> Any:
    """accelerate's OffloadedWeightsLoader, which all modules of the model share.

    Raises:
        ModelError: no weight is offloaded.
    """
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None:
            return hook.weights_map.dataset
    raise ModelError("no weight of the model is offloaded")


def keep_in(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Make a model that is offloaded to disk read its weights from ``weights``.

    Args:
        model: all of its modules share accelerate's OffloadedWeightsLoader.
        weights: replaces that loader, and has its ``index``, ``state_dict`` and ``save_folder``. If
            it is :class:`Storing`, changed weights are passed to its ``store``.
    """
    for hook, *_ in _hooked(model):
        hook.weights_map.dataset = weights


def run_on(model: nn.Module, device: torch.device) -> None:
    """Make an offloaded model run on another device than it was loaded for.

    accelerate's hooks then move weights and inputs there. Buffers that are in memory are moved now.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
            if hasattr(one, "execution_device"):
                one.execution_device = device
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:  # a meta buffer is offloaded
                module._buffers[key] = buffer.to(device)


def _unprefixed(values: Any, key: str) -> tuple[Any, str]:
    """The dict or OffloadedWeightsLoader behind accelerate's prefixed views, and the key in it."""
    while hasattr(values, "prefix"):
        values, key = values.dataset, values.prefix + key
    return values, key


def _identity(values: Any, key: str) -> Any:
    """A value that is equal for two names of the same stored weight, and for no others."""
    in_memory = values if isinstance(values, dict) else values.state_dict
    if key in in_memory:
        at = address(in_memory[key])
        return (id(values), key) if at is None else (at, in_memory[key].storage_offset())
    entry = values.index[key]
    if entry.get("safetensors_file") is not None:
        return entry["safetensors_file"], entry.get("weight_name", key)
    return str(values.save_folder), key


def _store(values: Any, key: str, weight: torch.Tensor) -> None:
    """Write a weight to where it is stored; a checkpoint's own file is never changed."""
    in_memory = values if isinstance(values, dict) else values.state_dict
    if key in in_memory:
        in_memory[key].copy_(weight)
        return
    if isinstance(values, Storing):
        values.store(key, weight)
        return
    # accelerate's format, but not written through a memory map: there a full disk raises SIGBUS.
    # Written under another name first, so that the file of this name is always complete.
    folder = Path(values.save_folder)
    unfinished = folder / f"{key}.unfinished"
    try:
        with unfinished.open("wb") as file:
            plain = weight.contiguous().flatten().view(torch.uint8)
            file.write(plain.numpy().data)
        unfinished.replace(folder / f"{key}.dat")
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    dtype = str(weight.dtype).removeprefix("torch.")
    values.index[key] = {"dtype": dtype, "shape": list(weight.shape)}
