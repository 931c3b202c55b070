"""Named tensors in files, as a mapping: for tensors that together do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch

from magr_fx.errors import CheckpointError
from magr_fx.machine.disk import save


class TensorFiles(MutableMapping[str, torch.Tensor]):
    """Keeps each tensor, also torchao's, in a file of its own.

    Args:
        folder: an existing directory that has no other files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Raises:
            CheckpointError: the disk is full, or the file may not be written.
        """
        try:
            with self._file(name).open("wb") as file:
                save(tensor, file)
        except OSError as error:
            raise CheckpointError(
                f"{self._file(name)} cannot be written: {error}. Free some space"
            ) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = torch.load(self._file(name), weights_only=True)
        except FileNotFoundError:
            raise KeyError(name) from None
        return tensor

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._file(name).exists()

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.name.removesuffix(".pt") for path in sorted(self.folder.glob("*.pt")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


class DiscardedTensors(MutableMapping[str, torch.Tensor]):
    """Discards every tensor: for ranks whose tensors another rank writes."""

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        pass

    def __getitem__(self, name: str) -> torch.Tensor:
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
