"""Activations between blocks on the disk: memory that the system may take back at any time.

Each value that a later block reads becomes a memory map of a file. Its pages are read when they
are needed, and written when memory is; the file has no name any more, so that nothing is left of
it, however the process ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from magr_fx.disk import take_room
from magr_fx.errors import CheckpointError, ConfigError

LEAST = 2**16  # bytes: what is smaller stays in memory


class Spill:
    """Keeps values in files.

    Args:
        folder: where; it is made if there is none.
        stored: the model's tensors, whose memory is left where it is.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], stored: Iterable[torch.Tensor]) -> None:
        self.folder = Path(folder)
        self._stored = {tensor.untyped_storage().data_ptr() for tensor in stored}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ConfigError(
                f"spill_dir {self.folder} cannot be written to: {error}; give another directory"
            ) from error

    def keep(self, values: dict[fx.Node, Any]) -> None:
        """Move the memory of these values, of all that is large, to files."""
        moved: dict[int, torch.UntypedStorage] = {}

        def on_disk(value: Any) -> Any:
            if type(value) is not torch.Tensor or value.device.type != "cpu":
                return value
            storage = value.untyped_storage()
            at = storage.data_ptr()
            if storage.nbytes() < LEAST or at in self._stored or storage.filename is not None:
                return value
            if at not in moved:  # views of one memory remain that
                moved[at] = self._mapped(storage)
            like = torch.empty(0, dtype=value.dtype)
            return like.set_(moved[at], value.storage_offset(), value.size(), value.stride())

        for node, value in values.items():
            values[node] = tree_map(on_disk, value)

    def _mapped(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        size = storage.nbytes()
        try:
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix="activations-")
            try:
                # A map of a file that has no room would end in a signal when it is written to.
                with open(descriptor, "r+b", closefd=False) as file:
                    take_room(file, size)
                mapped: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"activations cannot be written to {self.folder}: {error}. Free some space, or "
                "give another spill_dir"
            ) from error
        mapped.copy_(storage)
        return mapped  # type: ignore[no-any-return]
