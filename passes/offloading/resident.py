"""Weights that are kept elsewhere, and in memory only while a block needs them.

While we work on such a model, each of its weights is an ordinary CPU tensor whose addresses hold
no memory yet, an anonymous mapping that nobody has written to. So it can be traced and looked for
as any other. To use a weight is to copy its values there; afterwards they go back to where they
came from, if they changed, and the mapping's pages to the system. Where the model is to run on
another device, the parameter has its values there in the meantime.
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
    """Has the values of these weights in memory while it is open; all others are left as they are.

    ``ahead`` are those that will be asked for next, which can begin to come.
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


class PlaceholderParameter:
    """Stands for a weight: a parameter on the CPU, without memory until its values are there.

    Raises:
        ModelError: the system has no such memory (Windows).
    """

    def __init__(self, like: torch.Tensor) -> None:
        if not hasattr(mmap, "MAP_PRIVATE") or not hasattr(mmap.mmap, "madvise"):
            raise ModelError(
                "a model that is offloaded or sharded, and a plan, need memory maps of Unix, which "
                "this system does not have; load the model as a whole, or work under Linux"
            )
        size = like.numel() * like.element_size()
        # Private: of a shared mapping MADV_DONTNEED frees nothing.
        self._pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = torch.frombuffer(self._pages, dtype=torch.uint8)[:size]
        self._empty = raw.view(like.dtype).view(like.shape)
        self.parameter = nn.Parameter(self._empty, like.requires_grad)

    @property
    def address(self) -> int:
        """Where it is on the CPU, whether its values are there or not."""
        return self._empty.untyped_storage().data_ptr()

    def fill(self, values: torch.Tensor, device: torch.device | None) -> None:
        """Have the values at the parameter's own address, or on a device."""
        if device is None:
            self.parameter.copy_(values)
        else:
            there = values.to(device, self._empty.dtype).contiguous()
            if there.untyped_storage().nbytes() != there.nbytes:
                there = there.clone()  # where it lies in its memory is to be as in the outline
            self.parameter.data = there

    def empty(self) -> None:
        """Let go of the values' memory."""
        self.parameter.data = self._empty
        self._pages.madvise(mmap.MADV_DONTNEED)


class NotStoredError(CheckpointError):
    """Weights that changed could not be written to where they are kept.

    ``names`` are theirs; they are what they were. All others are stored.
    """

    def __init__(self, failed: dict[str, BaseException]) -> None:
        self.names = frozenset(failed)
        first, error = next(iter(failed.items()))
        on_disk = isinstance(error, OSError)
        why = f"{error}. Free some space" if on_disk else f"{type(error).__name__}: {error}"
        super().__init__(
            f"{len(failed)} rewritten weights, {first} for one, cannot be written to where they "
            f"are kept, and are what they were: {why}"
        )
        self.__cause__ = error


class OffloadedWeight(Protocol):
    """A weight that is kept elsewhere: an outline stands for it.

    ``load`` gives its values, ``store`` keeps new ones, ``prefetch`` says that they will be loaded.
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
    """A weight that is in memory, on whatever device, beside others that are not."""

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
        """Nothing: it is there."""


class Weights:
    """Has the weights in memory that are asked for.

    Args:
        weights: all of them.
        device: where they are needed; None is the CPU, each at its own address.
        before: what is done before some are loaded.
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
        self._versions: dict[OffloadedWeight, int] = {}  # of those in memory, as they were loaded

    def check(self) -> None:
        """Load every weight once.

        Raises:
            ModelError: one is NaN or Inf.
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
        """Have these weights, or those that these are views of, in memory; see Resident.

        Raises:
            NotStoredError: at the end, whatever some could not be stored for. An interrupt has it
                as its cause.
        """
        # In the order they were asked for, which is the same on all ranks.
        weights = [weight for weight in self._weights_of(tensors) if weight not in self._versions]
        self._before()
        try:
            with torch.no_grad():
                for weight in weights:
                    weight.placeholder.fill(weight.load(), self._device)
                    self._versions[weight] = version_of(weight.placeholder.parameter)
            trim()  # of what was read
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
                except BaseException as error:  # what one meets is not to cost the others
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


Place = tuple[
    nn.Module, str, OffloadedWeight
]  # a module, the name of its parameter, and its weight


@contextlib.contextmanager
def with_placeholders(
    model: nn.Module,
    places: list[Place],
    device: torch.device | None = None,
    before: Callable[[], None] = lambda: None,
) -> Iterator[Resident]:
    """Have outlines in the places of weights that are kept elsewhere, for as long as it is open.

    Args:
        model: has its own Parameter objects and buffers back afterwards.
        places: of these weights.
        device: where they are needed; None is the CPU. For another device the whole model is on
            the CPU meanwhile, also weights and buffers that are in memory elsewhere.
        before: what is done before some are loaded.

    Raises:
        ModelError: one is NaN or Inf.
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
    """All other weights of the model.

    Raises:
        ModelError: two of them, or one and a buffer, share memory, which outlines would not.
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
                        f"{full} and {other} are two tensors in one memory, in a model of which a "
                        "part is offloaded or sharded; make them one Parameter, give each its own "
                        "memory (clone), or load the model as a whole"
                    )
                weights[own] = InMemory(full, own)
            yield module, key, weights[own]
