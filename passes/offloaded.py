"""Models whose weights accelerate keeps elsewhere: each weight in memory only while it is needed.

While we work on such a model, each of its weights is an ordinary CPU tensor whose addresses hold
no memory yet, an anonymous mapping that nobody has written to. So it can be traced and looked for
as any other. To use a weight is to copy its values there; afterwards they go back to where they
came from, if they changed, and the mapping's pages to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn

from magr_fx.errors import ModelError
from magr_fx.model_directory import read_header
from magr_fx.passes.blocks import Block
from magr_fx.passes.trace import attribute
from magr_fx.passes.weight_views import COPIES, VIEWS

# glibc keeps what was freed in pieces of up to 32 MB, which adds up to the size of a small model.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
_ALIASES = VIEWS | COPIES  # some copies are none where there is nothing to change


class Resident(Protocol):
    """Has the values of these weights in memory while it is open; all others are left as they are.

    ``ahead`` are those that will be asked for next, which the disk may begin to read.
    """

    def __call__(
        self, tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
    ) -> AbstractContextManager[None]: ...


def all_resident(
    tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
) -> AbstractContextManager[None]:
    """The :class:`Resident` of a model that is in memory as a whole."""
    del tensors, ahead
    return contextlib.nullcontext()


def read_by(blocks: Iterable[Block]) -> list[torch.Tensor]:
    """The stored tensors that the blocks read, or something that may share their memory."""
    found: dict[int, torch.Tensor] = {}
    for block in blocks:
        for node in block.nodes:
            for value in (node, *node.all_input_nodes):
                tensor = attribute(block.trace, _origin(value))
                if tensor is not None:
                    found[id(tensor)] = tensor
    return list(found.values())


def _origin(value: fx.Node) -> fx.Node:
    while value.target in _ALIASES and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def is_offloaded(model: object) -> bool:
    """Whether accelerate keeps some of the model's weights elsewhere."""
    return isinstance(model, nn.Module) and any(map(offloading_hook, model.modules()))


@contextlib.contextmanager
def at_hand(model: nn.Module) -> Iterator[Resident]:
    """Give every offloaded weight an address, and a way to its values, for as long as it is open.

    accelerate's hooks are off meanwhile. The model has its own Parameter objects back afterwards.

    Raises:
        ModelError: the weights cannot be had, would be wanted on another device than the CPU, or
            are NaN or Inf. The model is as it was then.
    """
    if not is_offloaded(model):
        yield all_resident
        return
    with contextlib.ExitStack() as restored:
        weights = _find(model)
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
        for weight in weights:
            for module, key in weight.places:
                restored.callback(module._parameters.__setitem__, key, module._parameters[key])
                module._parameters[key] = weight.parameter
        pages = Pages(weights)
        pages.check()
        yield pages.resident


@dataclass(frozen=True, eq=False)
class _Weight:
    """An offloaded weight: who has it, where its values are kept, and what stands for it."""

    name: str
    places: list[tuple[nn.Module, str]]
    kept: list[tuple[Any, str]]  # the mappings, and the keys in them
    parameter: nn.Parameter
    pages: mmap.mmap

    def load(self) -> torch.Tensor:
        values, key = self.kept[0]
        value: torch.Tensor = values[key]
        return value

    def store(self, weight: torch.Tensor) -> None:
        for values, key in self.kept:
            _store(values, key, weight)

    def announce(self) -> None:
        values, key = self.kept[0]
        entry = {} if isinstance(values, dict) else values.index.get(key, {})
        file = entry.get("safetensors_file")
        if file is not None and hasattr(os, "posix_fadvise"):  # not on macOS
            stored = read_header(Path(file))[entry.get("weight_name", key)]
            with stored.file.open("rb") as opened:
                span = (stored.start, stored.nbytes)
                os.posix_fadvise(opened.fileno(), *span, os.POSIX_FADV_WILLNEED)


class Kept(Protocol):
    """A weight with its values elsewhere; ``parameter``, whose memory ``pages`` is, stands for it.

    ``load`` gives its values, ``store`` keeps new ones, ``announce`` says that they will be loaded.
    """

    @property
    def name(self) -> str: ...

    @property
    def parameter(self) -> nn.Parameter: ...

    @property
    def pages(self) -> mmap.mmap: ...

    def load(self) -> torch.Tensor: ...

    def store(self, weight: torch.Tensor) -> None: ...

    def announce(self) -> None: ...


@runtime_checkable
class Storing(Protocol):
    """Weights that know themselves where to keep new values; see :func:`keep_in`."""

    def store(self, name: str, weight: torch.Tensor) -> None: ...


class Pages:
    """Has the weights in memory that are asked for.

    Args:
        weights: all of them.
        before: what is done before some are loaded.
    """

    def __init__(
        self, weights: Collection[Kept], before: Callable[[], None] = lambda: None
    ) -> None:
        self._weights, self._before = weights, before
        self._of = {w.parameter.untyped_storage().data_ptr(): w for w in weights}
        self._versions: dict[Kept, int] = {}  # of those in memory, as they were loaded

    def check(self) -> None:
        """Load every weight once.

        Raises:
            ModelError: one is NaN or Inf.
        """
        for weight in self._weights:
            with self.resident([weight.parameter]):
                if not bool(weight.parameter.detach().isfinite().all()):
                    raise ModelError(
                        f"{weight.name} holds NaN or Inf; repair or reload the model's weights"
                    )

    @contextlib.contextmanager
    def resident(
        self, tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
    ) -> Iterator[None]:
        """Have these weights, or those that these are views of, in memory; see Resident."""
        # In the order they were asked for, which is the same on all ranks.
        weights = [weight for weight in self._behind(tensors) if weight not in self._versions]
        self._before()
        try:
            with torch.no_grad():
                for weight in weights:
                    weight.parameter.copy_(weight.load())
                    self._versions[weight] = weight.parameter._version
            _TRIM(0)  # of what was read
            for weight in self._behind(ahead):
                if weight not in weights:
                    weight.announce()
            yield
        finally:
            for weight in weights:
                version = self._versions.pop(weight, None)
                if version is not None and weight.parameter._version != version:
                    weight.store(weight.parameter.detach())
                weight.pages.madvise(mmap.MADV_DONTNEED)
            _TRIM(0)

    def _behind(self, tensors: Iterable[torch.Tensor]) -> list[Kept]:
        found = (self._of.get(tensor.untyped_storage().data_ptr()) for tensor in tensors)
        return list(dict.fromkeys(weight for weight in found if weight is not None))


def _find(model: nn.Module) -> list[_Weight]:
    """The offloaded weights; what several names share, in the model or where it is kept, is one."""
    weights: dict[Any, _Weight] = {}
    # Of transformers: name → the name it shares its weight with. accelerate keeps two copies.
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for hook, module, prefix, path in _hooked(model):
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            values, kept_as = _unprefixed(hook.weights_map, path + key)
            name = prefix + path + key
            _check_place(name, hook, values, kept_as)
            partner = tied.get(name, name)
            identity = partner if partner in tied.values() else _identity(values, kept_as)
            if identity not in weights:
                weights[identity] = _Weight(name, [], [], *reserved(parameter))
            weights[identity].places.append((module, key))
            weights[identity].kept.append((values, kept_as))
    return list(weights.values())


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """The offloaded buffers, which are small, with their values."""
    for hook, module, prefix, path in _hooked(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                values, kept_as = _unprefixed(hook.weights_map, path + key)
                _check_place(prefix + path + key, hook, values, kept_as)
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


def _check_place(name: str, hook: Any, values: Any, key: str) -> None:
    if torch.device(hook.execution_device or "cpu").type != "cpu":
        raise ModelError(
            f"{name} is offloaded by accelerate, to run on {hook.execution_device}; MagR works on "
            'offloaded weights on the CPU: load the model with device_map={"": "disk"} on a '
            "machine without an accelerator, call cpu_offload or disk_offload with "
            'execution_device="cpu", or load it as a whole'
        )
    if values is None or key not in values:
        raise ModelError(f"{name} is offloaded by accelerate, but its values are nowhere to be had")
    if not isinstance(values, dict) and key not in values.state_dict and not values.save_folder:
        raise ModelError(
            f"{name} is offloaded by accelerate to a file that is not to be written to; give the "
            "model a folder to offload to: offload_folder in from_pretrained"
        )


def reserved(like: torch.Tensor) -> tuple[nn.Parameter, mmap.mmap]:
    """A parameter on the CPU whose elements take up memory only once they are written."""
    size = like.numel() * like.element_size()
    # Private: of a shared mapping MADV_DONTNEED frees nothing.
    pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(pages, dtype=torch.uint8)[:size].view(like.dtype).view(like.shape)
    return nn.Parameter(values, like.requires_grad), pages


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
        return in_memory[key].untyped_storage().data_ptr(), in_memory[key].storage_offset()
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
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    dtype = str(weight.dtype).removeprefix("torch.")
    values.index[key] = {"dtype": dtype, "shape": list(weight.shape)}
