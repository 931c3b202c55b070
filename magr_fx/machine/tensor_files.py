"""Named tensors on the disk, as a mapping: what is too much to keep in memory until the end."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch

from magr_fx.errors import CheckpointError
from magr_fx.machine.disk import save


class TensorFiles(MutableMapping[str, torch.Tensor]):
    """Each tensor in a file of its own, torchao's among them.

    Args:
        folder: a directory, which is there, for these files alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Raises:
            CheckpointError: there is no space, or no permission.
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


class LetGo(MutableMapping[str, torch.Tensor]):
    """Keeps nothing: of what another rank keeps."""

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
