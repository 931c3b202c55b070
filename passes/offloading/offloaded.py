"""Models whose weights accelerate keeps elsewhere, in memory or on the disk.

See :mod:`resident` for how they are worked on. accelerate's hooks, which fetch the
weights of each module as it runs, are off meanwhile.
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
    """Whether accelerate keeps some of the model's weights elsewhere."""
    return isinstance(model, nn.Module) and any(map(offloading_hook, model.modules()))


def execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate would run an offloaded model, the first part of it; None for the CPU.

    Raises:
        ModelError: torch has no such device here.
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
    """Give every offloaded weight an address, and a way to its values, for as long as it is open.

    accelerate's hooks are off meanwhile. The model has its own Parameter objects back afterwards.

    Args:
        model: any; one that is not offloaded stays as it is.
        device: where weights are needed, those that are in memory as well; None is the CPU.

    Raises:
        ModelError: the weights cannot be had, or are NaN or Inf. The model is as it was then.
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
            # Models that read a child's weights themselves ask for its hook.
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
    """An offloaded weight: where its values are kept, and what stands for it."""

    name: str
    kept: list[tuple[Any, str]]  # the mappings, and the keys in them
    placeholder: PlaceholderParameter
    ahead: FetchAhead | None  # to the device where it is needed, if that is not the CPU

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
                if stored:  # several names of one weight: it is what it was under all of them
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
    """Weights that know themselves where to keep new values; see :func:`keep_in`."""

    def store(self, name: str, weight: torch.Tensor) -> None: ...


def _find(model: nn.Module, ahead: FetchAhead | None) -> list[Place]:
    """The offloaded weights; what several names share, in the model or where it is kept, is one."""
    weights: dict[Any, _Weight] = {}
    places: list[Place] = []
    tied = tied_names(model)  # accelerate keeps two copies
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
    """The offloaded buffers, which are small, with their values."""
    for hook, module, prefix, path in _hooked(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                values, kept_as = _unprefixed(hook.weights_map, path + key)
                _check_kept(prefix + path + key, values, kept_as)
                yield module, key, values[kept_as].clone()


def _hooked(model: nn.Module) -> Iterator[tuple[Any, nn.Module, str, str]]:
    """Each module that is offloaded: the hook, itself, the name of the hook's module, and the rest.

    The names end in a dot where they are not empty.
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
        raise ModelError(f"{name} is offloaded by accelerate, but its values are nowhere to be had")
    if not isinstance(values, dict) and key not in values.state_dict and not values.save_folder:
        raise ModelError(
            f"{name} is offloaded by accelerate to a file that is not to be written to; give the "
            "model a folder to offload to: offload_folder in from_pretrained"
        )


def offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that fetches the module's weights, or None."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
        if getattr(one, "offload", False):
            return one
    return None


def offloaded_weights(model: nn.Module) -> Any:
    """accelerate's OffloadedWeightsLoader, which all modules of a model share.

    Raises:
        ModelError: no weight is offloaded.
    """
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None:
            return hook.weights_map.dataset
    raise ModelError("no weight of the model is offloaded")


def keep_in(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Let a model that is offloaded to disk have its weights from these.

    Args:
        model: all of its modules share accelerate's OffloadedWeightsLoader.
        weights: what takes its place, with its ``index``, ``state_dict`` and ``save_folder``; if it
            is :class:`Storing`, weights that change go there.
    """
    for hook, *_ in _hooked(model):
        hook.weights_map.dataset = weights


def run_on(model: nn.Module, device: torch.device) -> None:
    """Let a model that is offloaded run on another device than it was loaded for.

    accelerate's hooks bring weights and inputs there; buffers, which stay in memory, are moved.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
            if hasattr(one, "execution_device"):
                one.execution_device = device
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:  # one that is, is offloaded
                module._buffers[key] = buffer.to(device)


def _unprefixed(values: Any, key: str) -> tuple[Any, str]:
    """The dict, or accelerate's OffloadedWeightsLoader, that has the values, and the key there."""
    while hasattr(values, "prefix"):
        values, key = values.dataset, values.prefix + key
    return values, key


def _identity(values: Any, key: str) -> Any:
    """What is equal for two names of one weight."""
    in_memory = values if isinstance(values, dict) else values.state_dict
    if key in in_memory:
        at = address(in_memory[key])
        return (id(values), key) if at is None else (at, in_memory[key].storage_offset())
    entry = values.index[key]
    if entry.get("safetensors_file") is not None:
        return entry["safetensors_file"], entry.get("weight_name", key)
    return str(values.save_folder), key


def _store(values: Any, key: str, weight: torch.Tensor) -> None:
    """Write a weight where it is kept; a checkpoint's own file is left as it is."""
    in_memory = values if isinstance(values, dict) else values.state_dict
    if key in in_memory:
        in_memory[key].copy_(weight)
        return
    if isinstance(values, Storing):
        values.store(key, weight)
        return
    # As accelerate stores it, but not through a memory map, which a full disk ends with a signal.
    # First under another name: what is there under this one is always whole.
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
