"""Activations between blocks on the disk: memory that the system may take back at any time.

Each value that a later block reads becomes a memory map of a file. Its pages are read when they
are needed, and written when memory is; the file has no name any more, so that nothing is left of
it, however the process ends. A value on a device cannot be one: it is away until the next block
that runs on its batch, when it comes back to its device.
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

LEAST = 2**16  # bytes: what is smaller stays in memory
MAPPED = frozenset({"cpu"})  # the devices on which memory can be a file


@dataclass(frozen=True, eq=False)
class SpilledTensor:
    """A tensor of a device that is not there now.

    Attributes:
        values: the bytes of its whole memory, on the CPU; one tensor for all views of one memory.
        device, dtype, size, stride, offset: of the tensor.
    """

    values: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view of its bytes on the device; an in-place change is one of them."""
        whole = memory.numel() // self.dtype.itemsize * self.dtype.itemsize
        return memory[:whole].view(self.dtype).as_strided(self.size, self.stride, self.offset)


def load_spilled(values: dict[fx.Node, Any]) -> dict[StorageWeakRef, tuple[torch.Tensor, int]]:
    """Have what is away on its device again; views of one memory remain that.

    Returns:
        For each memory on a device the bytes that it was made of, and its tensors' version then.
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
    """Keeps values in files.

    Args:
        folder: where; it is made if there is none.
        stored: the model's tensors, whose memory is left where it is.

    Raises:
        ConfigError: the folder cannot be written to, or the system is Windows.
    """

    def __init__(self, folder: str | os.PathLike[str], stored: Iterable[torch.Tensor]) -> None:
        self.folder = folder_named(folder, "spill_dir")
        if sys.platform == "win32":
            raise ConfigError(
                "spill_dir needs a system on which a file may lose its name while it is mapped, "
                "which Windows is not; leave spill_dir out"
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
        """Have those of these values that are away on their devices, until :meth:`keep`."""
        self._in_files |= load_spilled(values)

    def keep(self, values: dict[fx.Node, Any]) -> None:
        """Move the memory of these values, of all that is large, to files."""
        moved: dict[StorageWeakRef, torch.UntypedStorage] = {}

        def on_disk(value: Any) -> Any:
            if type(value) is not torch.Tensor:
                return value
            storage, at = value.untyped_storage(), memory_of(value)
            if storage.nbytes() < LEAST or at in self._stored or storage.filename is not None:
                return value
            known, version = self._in_files.get(at, (None, 0))
            if known is not None and version == version_of(value):  # its file still tells
                moved[at] = known.untyped_storage()
            elif at not in moved:  # views of one memory remain that
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
                # A map of a file that has no room would end in a signal when it is written to.
                with open(descriptor, "r+b", closefd=False) as file:
                    preallocate(file, size)
                mapped: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except (OSError, RuntimeError) as error:  # torch tells what the system says of a map
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"activations cannot be written to {self.folder}: {error}. Free some space, or "
                "give another spill_dir"
            ) from error
        mapped.copy_(storage)
        return mapped  # type: ignore[no-any-return]


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    """Tells memory from memory, also while there is none or after it was freed."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
