"""Loads the next block's weights to a device while it works on the current block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch


class FetchAhead:
    """Loads weights in a separate thread and copies them to CUDA on a separate stream.

    The loaded weights take the memory of one more block on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._coming: dict[Hashable, Future[torch.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "magr-fx fetches weights")
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __enter__(self) -> FetchAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._coming.clear()
        self._thread.shutdown(cancel_futures=True)

    def begin(self, key: Hashable, load: Callable[[], torch.Tensor]) -> None:
        """Start ``load`` in the thread, and copy its result to the device."""
        if key not in self._coming:
            self._coming[key] = self._thread.submit(self._fetch, load)

    def take(self, key: Hashable) -> torch.Tensor | None:
        """The loaded tensor on the device, or None if ``begin`` was not called for ``key``.

        Raises any error that ``load`` raised.
        """
        coming = self._coming.pop(key, None)
        if coming is None:
            return None
        values = coming.result()
        if self._stream is not None:  # do not reuse its memory before the current stream is done
            values.record_stream(torch.cuda.current_stream(self.device))
        return values

    @torch.no_grad()
    def _fetch(self, load: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._stream is None:
            return load().to(self.device)
        with torch.cuda.stream(self._stream):
            values = load()
            with contextlib.suppress(RuntimeError):  # the machine has no pinned memory left
                # Only a copy from pinned memory runs beside the device's other work.
                values = values.pin_memory() if values.device.type == "cpu" else values
            values = values.to(self.device, non_blocking=True)
        self._stream.synchronize()  # afterwards the host memory of the copy can be freed
        return values
