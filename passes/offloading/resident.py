"""Offloaded and sharded weights, which are in memory only while a block needs them.

While such a model is worked on, each of its weights is replaced by a placeholder: an ordinary CPU
parameter on an anonymous memory map that takes no memory until it is written to. The model can
then be traced, and its weights found, as in any other model. To load a weight, its values are
copied into the map. Afterwards they are written back to where they are stored, if they changed,
and the map's pages are freed. If the model runs on another device, the placeholder's data is a
tensor on that device while the weight is loaded.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from magr_fx.errors import CheckpointError, ModelError
from magr_fx.machine.memory import trim
from magr_fx.passes.graphs.torch_private import version_of
from magr_fx.passes.graphs.unsupported_weights import why_unsupported


class Resident(Protocol):
    """A context in which the values of the given weights are in memory.

    ``ahead`` are the weights that will be needed next: loading them may begin in the background.
    """

    def __call__(
        self, tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
    ) -> AbstractContextManager[None]: ...


def all_resident(
    tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
) -> AbstractContextManager[None]:
    """The :class:`Resident` of a model whose weights are all in memory; it does nothing."""
    del tensors, ahead
    return contextlib.nullcontext()


class PlaceholderParameter:
    """Takes a weight's place: a CPU parameter that needs no memory until its values are loaded.

    Raises:
        ModelError: the system has no such memory maps (Windows).
    """

    def __init__(self, like: torch.Tensor) -> None:
        if not hasattr(mmap, "MAP_PRIVATE") or not hasattr(mmap.mmap, "madvise"):
            raise ModelError(
                "an offloaded or sharded model, and a plan, need Unix memory maps, which this "
                "system does not have; load the whole model into memory, or use Linux"
            )
        size = like.numel() * like.element_size()
        # Private, because MADV_DONTNEED frees no memory of a shared mapping.
        self._pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = torch.frombuffer(self._pages, dtype=torch.uint8)[:size]
        self._empty = raw.view(like.dtype).view(like.shape)
        self.parameter = nn.Parameter(self._empty, like.requires_grad)

    @property
    def address(self) -> int:
        """Its address on the CPU, whether its values are loaded or not."""
        return self._empty.untyped_storage().data_ptr()

    def fill(self, values: torch.Tensor, device: torch.device | None) -> None:
        """Load the values into the parameter's own memory, or onto ``device``."""
        if device is None:
            self.parameter.copy_(values)
        else:
            there = values.to(device, self._empty.dtype).contiguous()
            if there.untyped_storage().nbytes() != there.nbytes:
                there = there.clone()  # the storage offset must be 0, as in the placeholder
            self.parameter.data = there

    def empty(self) -> None:
        """Free the memory of the values."""
        self.parameter.data = self._empty
        self._pages.madvise(mmap.MADV_DONTNEED)


class NotStoredError(CheckpointError):
    """Some changed weights could not be written back to where they are stored.

    The weights ``names`` keep their original values. All other changed weights are stored.
    """

    def __init__(self, failed: dict[str, BaseException]) -> None:
        self.names = frozenset(failed)
        first, error = next(iter(failed.items()))
        on_disk = isinstance(error, OSError)
        why = f"{error}. Free some space" if on_disk else f"{type(error).__name__}: {error}"
        super().__init__(
            f"{len(failed)} rewritten weights, {first} for one, cannot be written back to where "
            f"they are stored, and keep their original values: {why}"
        )
        self.__cause__ = error


class OffloadedWeight(Protocol):
    """A weight that is stored elsewhere and has a placeholder in the model.

    ``load`` returns its values, ``store`` writes new ones, ``prefetch`` may start to load them.
    """

    @property
    def name(self) -> str: ...

    @property
    def placeholder(self) -> PlaceholderParameter: ...

    def load(self) -> torch.Tensor: ...

    def store(self, weight: torch.Tensor) -> None: ...

    def prefetch(self) -> None: ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """A weight that is in memory, on any device, in a model of which other weights are not."""

    name: str
    own: nn.Parameter
    placeholder: PlaceholderParameter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "placeholder", PlaceholderParameter(self.own))

    def load(self) -> torch.Tensor:
        return self.own.detach()

    def store(self, weight: torch.Tensor) -> None:
        if weight.data_ptr() != self.own.data_ptr():
            self.own.detach().copy_(weight)

    def prefetch(self) -> None:
        """Do nothing: the weight is in memory."""


class Weights:
    """Loads and stores the weights behind the placeholders of a model.

    Args:
        weights: all weights that have a placeholder.
        device: where they are needed; None is the CPU, each in its placeholder's own memory.
        before: called before each loading.
    """

    def __init__(
        self,
        weights: Collection[OffloadedWeight],
        device: torch.device | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._weights, self._device, self._before = weights, device, before
        self._by_parameter = {weight.placeholder.parameter: weight for weight in weights}
        self._by_address = {weight.placeholder.address: weight for weight in weights}
        self._versions: dict[OffloadedWeight, int] = {}  # of each loaded weight, when loaded

    def check(self) -> None:
        """Load every weight once, and check its values.

        Raises:
            ModelError: a weight holds NaN or Inf.
        """
        for weight in self._weights:
            parameter = weight.placeholder.parameter
            with self.resident([parameter]):
                supported = why_unsupported(parameter) is None
                if supported and not bool(parameter.detach().isfinite().all()):
                    raise ModelError(
                        f"{weight.name} holds NaN or Inf; repair or reload the model's weights"
                    )

    @contextlib.contextmanager
    def resident(
        self, tensors: Iterable[torch.Tensor], *, ahead: Iterable[torch.Tensor] = ()
    ) -> Iterator[None]:
        """Load the weights that ``tensors`` are, or are views of; see :class:`Resident`.

        Raises:
            NotStoredError: at the end, if some changed weights could not be stored. If an interrupt
                stopped the storing, that is raised, with a NotStoredError as its cause.
        """
        # In the order of ``tensors``, which is the same on all ranks: loading may be collective.
        weights = [weight for weight in self._weights_of(tensors) if weight not in self._versions]
        self._before()
        try:
            with torch.no_grad():
                for weight in weights:
                    weight.placeholder.fill(weight.load(), self._device)
                    self._versions[weight] = version_of(weight.placeholder.parameter)
            trim()  # return the memory that loading has freed to the system
            for weight in self._weights_of(ahead):
                if weight not in weights:
                    weight.prefetch()
            yield
        finally:
            failed: dict[str, BaseException] = {}
            for weight in weights:
                parameter, version = weight.placeholder.parameter, self._versions.pop(weight, None)
                try:
                    if version is not None and version_of(parameter) != version:
                        weight.store(parameter.detach())
                except BaseException as error:  # the other weights are stored all the same
                    failed[weight.name] = error
                weight.placeholder.empty()
            trim()
            if failed:
                lost = NotStoredError(failed)
                for reason in failed.values():
                    if not isinstance(reason, Exception):
                        raise reason from lost
                raise lost

    def _weights_of(self, tensors: Iterable[torch.Tensor]) -> list[OffloadedWeight]:
        found = (
            self._by_parameter.get(tensor)  # type: ignore[call-overload]
            or self._by_address.get(tensor.untyped_storage().data_ptr())
            for tensor in tensors
        )
        return list(dict.fromkeys(weight for weight in found if weight is not None))


# A module, the name of its parameter, and the weight that the parameter is.
Place = tuple[nn.Module, str, OffloadedWeight]


@contextlib.contextmanager
def with_placeholders(
    model: nn.Module,
    places: list[Place],
    device: torch.device | None = None,
    before: Callable[[], None] = lambda: None,
) -> Iterator[Resident]:
    """Inside the context, replace weights that are stored elsewhere by placeholders.

    Args:
        model: gets its own Parameter objects and buffers back afterwards.
        places: where in the model these weights are.
        device: where they are needed; None is the CPU. With another device all other weights get
            placeholders too, and buffers are copied to the CPU, so that the model is traced there.
        before: called before each loading.

    Yields:
        What loads weights: see :class:`Resident`.

    Raises:
        ModelError: a weight holds NaN or Inf, or two tensors that are not offloaded share memory.
    """
    with contextlib.ExitStack() as restored:
        if device is not None:
            places = [*places, *_in_memory(model, places)]
            copies = {id(buffer): buffer.cpu() for buffer in model.buffers()}
            for module in model.modules():
                for key, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        restored.callback(module._buffers.__setitem__, key, buffer)
                        module._buffers[key] = copies[id(buffer)]
        for module, key, weight in places:
            restored.callback(module._parameters.__setitem__, key, module._parameters[key])
            module._parameters[key] = weight.placeholder.parameter
        weights = Weights(list(dict.fromkeys(weight for *_, weight in places)), device, before)
        weights.check()
        yield weights.resident


def _in_memory(model: nn.Module, others: list[Place]) -> Iterator[Place]:
    """The places of the model's other weights, which are in memory.

    Raises:
        ModelError: two of them, or one and a buffer, share memory, which placeholders could not.
    """
    known = {(module, key) for module, key, _ in others}
    weights: dict[nn.Parameter, InMemory] = {}
    owners: dict[int, str] = {}
    for name, buffer in model.named_buffers():
        if not buffer.is_meta:
            owners.setdefault(buffer.untyped_storage().data_ptr(), name)
    for name, module in model.named_modules():
        for key, own in module._parameters.items():
            if own is None or (module, key) in known:
                continue
            if own not in weights:
                full = f"{name}.{key}" if name else key
                other = owners.setdefault(own.untyped_storage().data_ptr(), full)
                if other != full and own.numel():
                    raise ModelError(
                        f"{full} and {other} are two tensors in one memory, which is not supported "
                        "in a partly offloaded or sharded model; make them one Parameter, give "
                        "each its own memory (clone), or load the whole model into memory"
                    )
                weights[own] = InMemory(full, own)
            yield module, key, weights[own]
