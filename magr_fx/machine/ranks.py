"""The processes that work on one model together by torch.distributed; or this process alone.

Before every collective operation the ranks exchange whether one of them has failed. If so, every
rank raises the error of that rank, instead of waiting for it until the timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import distributed as dist
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from magr_fx.errors import PUBLIC_ERRORS, CalibrationError, ConfigError, DistributedError, MagRError
from magr_fx.machine.memory import is_out_of_memory

Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"
Item = TypeVar("Item")
_AGREED = "_magr_fx_agreed"  # set on an error that every rank raises
# Errors that say that one site cannot be solved; the run itself can continue.
UNSOLVABLE = (MagRError, LinAlgError, ArithmeticError)


@dataclass(frozen=True)
class Ranks:
    """One of ``world`` processes, with ``rank`` from 0 to world - 1; the only one without a group.

    All ranks have to call the methods that communicate, in the same order. Sums have the same
    bits on every rank.

    Raises:
        DistributedError: a rank failed or does not answer; from any method that communicates. If a
            rank raised a :class:`~magr_fx.MagRError`, every rank raises the same error.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1

    def owns(self, index: int) -> bool:
        """Whether this rank runs the calibration batch with this number."""
        return index % self.world == self.rank

    def meet(self, error: Exception | None = None) -> None:
        """Wait for all ranks; if one of them passes an error, all of them raise it."""
        if self.group is None:
            return
        failed = torch.tensor([error is not None], dtype=torch.int32, device=self._device("cpu"))
        self._call(lambda: dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group))
        if not int(failed):
            return
        known = self._gather(None if error is None else _described(error))
        first = next(at for at, what in enumerate(known) if what is not None)
        kind, message = known[first]
        if first == self.rank and isinstance(error, MagRError):
            setattr(error, _AGREED, True)
            raise error
        same = PUBLIC_ERRORS.get(kind)
        if same is not None:
            agreed: MagRError = same(message)
        else:
            agreed = DistributedError(f"rank {first} of {self.world} failed: {kind}: {message}")
        setattr(agreed, _AGREED, True)
        raise agreed from error

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace the tensor, in place, by the sum over all ranks."""
        self._in_place(tensor, lambda wire: dist.all_reduce(wire, group=self.group))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace the tensor, in place, by that of rank ``source``; same shape and dtype."""

        def send(wire: torch.Tensor) -> None:  # as bytes: some backends lack some dtypes
            raw = wire.view(-1).view(torch.uint8)
            dist.broadcast(raw, group=self.group, group_src=source)

        self._in_place(tensor, send)

    def concat(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, concatenated in the order of the ranks."""
        if self.group is None:
            return rows
        lengths = self.gather(len(rows))
        whole = rows.new_empty(sum(lengths), *rows.shape[1:])
        for rank, part in enumerate(torch.split(whole, lengths)):
            if rank == self.rank:
                part.copy_(rows)
            if part.numel():
                self.broadcast(part, rank)
        return whole

    def part_of(self, rows: int, multiple: int = 1) -> slice:
        """This rank's share of ``rows`` rows. Every share starts at a multiple of ``multiple``,
        and none is empty if there are ``multiple`` rows for each rank.
        """
        units = -(-rows // multiple)
        start, stop = (units * at // self.world * multiple for at in (self.rank, self.rank + 1))
        return slice(start, min(stop, rows))

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """If one rank cannot solve a site, every rank raises the same error, and may continue."""
        try:
            yield
        except UNSOLVABLE as error:
            if not getattr(error, _AGREED, False):
                self.meet(error if isinstance(error, MagRError) else CalibrationError(str(error)))
            raise
        self.meet()

    def gather(self, item: Item) -> list[Item]:
        """The items of all ranks, in their order: small picklable objects without tensors."""
        self.meet()
        return [item] if self.group is None else self._gather(item)

    def agree_on(self, what: dict[str, str]) -> None:
        """Raise a DistributedError, with the keys that differ, unless all ranks pass the same."""
        items = self.gather(what)
        differing = [key for key in what if len({other.get(key) for other in items}) > 1]
        if differing:
            raise DistributedError(
                f"the {self.world} ranks differ in: {', '.join(differing)}. Give every rank the "
                "same model and options, and the whole calibration, without a DistributedSampler: "
                "the batches are split over the ranks here. Or pass process_group=False, so that "
                "each rank works by itself"
            )

    def least_loaded(self, costs: Sequence[float]) -> list[int]:
        """A rank for each task: the most costly task first, each to the least loaded rank."""
        load, owners = [0.0] * self.world, [0] * len(costs)
        for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
            owners[at] = min(range(self.world), key=load.__getitem__)
            load[owners[at]] += costs[at]
        return owners

    def _gather(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.world
        with torch.cuda.device(self._device("cpu")) if self._on_cuda else contextlib.nullcontext():
            self._call(lambda: dist.all_gather_object(items, item, group=self.group))
        return items

    def _in_place(self, tensor: torch.Tensor, collective: Callable[[torch.Tensor], Any]) -> None:
        if self.group is None:
            return
        self.meet()
        wire = tensor.detach().to(self._device(tensor.device.type)).contiguous()
        self._call(lambda: collective(wire))
        if wire.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(wire)

    def _device(self, kind: str) -> torch.device:
        """The device that a tensor on a ``kind`` device must be on for the group's backends."""
        if kind == "cuda" or self._on_cuda:  # the device that the caller has made current
            if kind == "cuda" and "cuda" not in self._backends:
                return torch.device("cpu")
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def _backends(self) -> str:
        """The group's backends, such as "cpu:gloo,cuda:nccl"."""
        return dist.get_backend_config(self.group)

    @property
    def _on_cuda(self) -> bool:
        """Whether all tensors must be on a CUDA device, as with NCCL alone."""
        return "cpu" not in self._backends

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # a closed connection, or a timeout
            if is_out_of_memory(error):
                raise
            broken = DistributedError(
                f"rank {self.rank} of {self.world} lost the others: {error}. One of them has died, "
                "or did not reach the same call in time: look at its log. Start all ranks again; "
                "with checkpoint_dir the same call continues from the last state that was saved. "
                "If a rank needs longer for a block, give init_process_group a longer timeout "
                "(--timeout on the command line)"
            )
            setattr(broken, _AGREED, True)
            raise broken from error


ALONE = Ranks()


@contextlib.contextmanager
def distributed_session(process_group: Group = None) -> Iterator[Ranks]:
    """The ranks that work on one model together; an error on one rank is raised on all of them.

    Args:
        process_group: the group; None is the default group if it is initialised, else this process
            alone; False is this process alone.

    Raises:
        ConfigError: ``process_group`` is no group, or a group that this process is not in.
        DistributedError: another rank failed, or does not answer.
    """
    ranks = _ranks_of(process_group)
    try:
        yield ranks
    except Exception as error:
        if not getattr(error, _AGREED, False):
            ranks.meet(error)
        raise
    ranks.meet()


def _ranks_of(process_group: Group) -> Ranks:
    if process_group is False:
        return ALONE
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise ConfigError(
            "process_group must be a torch.distributed.ProcessGroup that this rank is in, None for "
            f"the default group, or False for this process alone, got {process_group!r}"
        )
    world = dist.get_world_size(process_group)
    return ALONE if world == 1 else Ranks(process_group, dist.get_rank(process_group), world)


def _described(error: Exception) -> tuple[str, str]:
    """The class name of an error, for a MagRError that of its public class, and its message."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in PUBLIC_ERRORS), names[0]), str(error)
