"""Weights on their way to a device, while it works on those before them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch


class FetchAhead:
    """Loads weights in a thread of its own and, to CUDA, copies them on a stream of its own.

    What is fetched takes up the device's memory beside what is worked on: one block more.
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
        """Let ``load`` run, and its result be brought to the device."""
        if key not in self._coming:
            self._coming[key] = self._thread.submit(self._fetch, load)

    def take(self, key: Hashable) -> torch.Tensor | None:
        """What was begun, on the device; None where nothing was. Raises what ``load`` raised."""
        coming = self._coming.pop(key, None)
        if coming is None:
            return None
        values = coming.result()
        if self._stream is not None:  # its memory is not to be used anew before this one is done
            values.record_stream(torch.cuda.current_stream(self.device))
        return values

    @torch.no_grad()
    def _fetch(self, load: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._stream is None:
            return load().to(self.device)
        with torch.cuda.stream(self._stream):
            values = load()
            with contextlib.suppress(RuntimeError):  # of a machine that has none to give
                # Only a copy from pinned memory leaves the device's other work undisturbed.
                values = values.pin_memory() if values.device.type == "cpu" else values
            values = values.to(self.device, non_blocking=True)
        self._stream.synchronize()  # so that the memory that it came from, too, is free
        return values
