"""Keeps the activations between blocks on disk, to save memory.

Each value that a later block reads is moved to a memory map of a file. The system reads its pages
when they are used, and writes them back when it needs the memory. The file's name is removed at
once, so that no file remains, however the process ends. Device memory cannot be such a map: the
bytes of a value on a device are copied to a map, and back for the next block on its batch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from magr_fx.errors import CheckpointError, ConfigError
from magr_fx.machine.disk import folder_named, preallocate
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.graphs.torch_private import tree_map, version_of

LEAST = 2**16  # bytes: smaller values stay in memory
MAPPED = frozenset({"cpu"})  # the devices whose memory can be a map of a file


@dataclass(frozen=True, eq=False)
class SpilledTensor:
    """A tensor of a device whose values were moved to a file.

    Attributes:
        values: the bytes of its whole storage, on the CPU; views of one storage share this tensor.
        device, dtype, size, stride, offset: those of the tensor.
    """

    values: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of ``memory``, the bytes of its storage on the device.

        All views of one storage see each other's in-place changes.
        """
        whole = memory.numel() // self.dtype.itemsize * self.dtype.itemsize
        return memory[:whole].view(self.dtype).as_strided(self.size, self.stride, self.offset)


def load_spilled(values: dict[fx.Node, Any]) -> dict[StorageWeakRef, tuple[torch.Tensor, int]]:
    """Copy spilled tensors back to their devices, in place; views of one storage stay views of one.

    Returns:
        For each new storage on a device: the spilled bytes, and the tensor's version after the
        copy.
    """
    memories: dict[StorageWeakRef, torch.Tensor] = {}
    known: dict[StorageWeakRef, tuple[torch.Tensor, int]] = {}

    def here(value: Any) -> Any:
        if not isinstance(value, SpilledTensor):
            return value
        at = memory_of(value.values)
        if at not in memories:
            memories[at] = value.values.to(value.device, copy=True)
        tensor = value.within(memories[at])
        known[memory_of(tensor)] = (value.values, version_of(tensor))
        return tensor

    for node, value in values.items():
        values[node] = tree_map(here, value)
    return known


class Spill:
    """Moves the values between blocks to files.

    Args:
        folder: the directory for the files; it is created if it does not exist.
        stored: the model's tensors, which are not moved.

    Raises:
        ConfigError: the folder cannot be written to, or the system is Windows.
    """

    def __init__(self, folder: str | os.PathLike[str], stored: Iterable[torch.Tensor]) -> None:
        self.folder = folder_named(folder, "spill_dir")
        if sys.platform == "win32":
            raise ConfigError(
                "spill_dir needs a system that can delete a file while it is mapped, which Windows "
                "cannot; leave spill_dir out"
            )
        self._stored = {memory_of(tensor) for tensor in stored}
        self._in_files: dict[StorageWeakRef, tuple[torch.Tensor, int]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"spill_dir {self.folder} cannot be written to: {error}; give another directory"
            ) from error

    def fetch(self, values: dict[fx.Node, Any]) -> None:
        """Copy the spilled tensors among the values back to their devices, until :meth:`keep`."""
        self._in_files |= load_spilled(values)

    def keep(self, values: dict[fx.Node, Any]) -> None:
        """Move the values of at least ``LEAST`` bytes to files, in place."""
        moved: dict[StorageWeakRef, torch.UntypedStorage] = {}

        def on_disk(value: Any) -> Any:
            if type(value) is not torch.Tensor:
                return value
            storage, at = value.untyped_storage(), memory_of(value)
            if storage.nbytes() < LEAST or at in self._stored or storage.filename is not None:
                return value
            known, version = self._in_files.get(at, (None, 0))
            if known is not None and version == version_of(value):  # its file is still valid
                moved[at] = known.untyped_storage()
            elif at not in moved:  # views of one storage stay views of one
                moved[at] = self._mapped(storage)
            size, stride, offset = value.size(), value.stride(), int(value.storage_offset())
            if value.device.type in MAPPED:
                return torch.empty(0, dtype=value.dtype, device=moved[at].device).set_(
                    moved[at], offset, size, stride
                )
            bytes_ = torch.empty(0, dtype=torch.uint8, device=moved[at].device).set_(moved[at])
            return SpilledTensor(bytes_, value.device, value.dtype, size, stride, offset)

        for node, value in values.items():
            values[node] = tree_map(on_disk, value)
        for at in list(self._in_files):
            if at.expired():  # type: ignore[no-untyped-call]
                del self._in_files[at]

    def _mapped(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        size = storage.nbytes()
        try:
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix="activations-")
            try:
                # Without this, writing to the map would raise SIGBUS when the disk is full.
                with open(descriptor, "r+b", closefd=False) as file:
                    preallocate(file, size)
                mapped: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except (OSError, RuntimeError) as error:  # from_file raises RuntimeError
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"activations cannot be written to {self.folder}: {error}. Free some space, or "
                "give another spill_dir"
            ) from error
        mapped.copy_(storage)
        return mapped  # type: ignore[no-any-return]


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    """A key for the tensor's storage; stays unique while it has no memory or after it is freed."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
