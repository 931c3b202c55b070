"""The processes that work on one model together, by torch.distributed; or this one alone.

Whatever they do together begins with a meeting, in which each says whether it is well: one that
failed elsewhere ends the work of all, with its error, in the place of leaving them waiting.
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
_AGREED = "_magr_fx_agreed"  # set on an error that every rank knows of
# What says that a site cannot be solved, and not that anything is wrong with the run.
UNSOLVABLE = (MagRError, LinAlgError, ArithmeticError)


@dataclass(frozen=True)
class Ranks:
    """One of ``world`` processes, ``rank`` of 0 to world - 1; without a group the only one.

    What is done together has to be done by all, in the same order. Sums are the same bits on
    every rank.

    Raises:
        DistributedError: a rank failed, in any method that communicates, or does not answer.
            Where a rank raised a :class:`~magr_fx.MagRError`, every rank raises the same.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1

    def owns(self, index: int) -> bool:
        """Whether the calibration batch with this number is run here."""
        return index % self.world == self.rank

    def meet(self, error: Exception | None = None) -> None:
        """Wait for all ranks; raise, on all of them, if one of them comes with an error."""
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
        """Replace the tensor, in place, by the sum of all ranks'."""
        self._in_place(tensor, lambda wire: dist.all_reduce(wire, group=self.group))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace the tensor, in place, by that of one rank; same shape and dtype everywhere."""

        def send(wire: torch.Tensor) -> None:  # as bytes: not every backend knows every dtype
            raw = wire.view(-1).view(torch.uint8)
            dist.broadcast(raw, group=self.group, group_src=source)

        self._in_place(tensor, send)

    def concat(self, rows: torch.Tensor) -> torch.Tensor:
        """Everybody's rows, one below the other, in the order of the ranks."""
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
        """The rows that are this rank's, of so many; parts begin at multiples, and none is empty
        where there are ``multiple`` rows for each rank.
        """
        units = -(-rows // multiple)
        start, stop = (units * at // self.world * multiple for at in (self.rank, self.rank + 1))
        return slice(start, min(stop, rows))

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What cannot be solved on one rank, cannot on any: all raise, and may go on from there."""
        try:
            yield
        except UNSOLVABLE as error:
            if not getattr(error, _AGREED, False):
                self.meet(error if isinstance(error, MagRError) else CalibrationError(str(error)))
            raise
        self.meet()

    def gather(self, item: Item) -> list[Item]:
        """Everybody's, in the order of the ranks; a small picklable object without tensors."""
        self.meet()
        return [item] if self.group is None else self._gather(item)

    def agree_on(self, what: dict[str, str]) -> None:
        """Raise unless it is the same on every rank, naming what differs."""
        everybody = self.gather(what)
        differing = [key for key in what if len({other.get(key) for other in everybody}) > 1]
        if differing:
            raise DistributedError(
                f"the {self.world} ranks differ in: {', '.join(differing)}. Give every rank the "
                "same model, options and whole calibration, which is split over them here (no "
                "DistributedSampler); or process_group=False to work on each rank by itself"
            )

    def least_loaded(self, costs: Sequence[float]) -> list[int]:
        """A rank for each piece of work: the most costly first, to whom has least to do so far."""
        load, owners = [0.0] * self.world, [0] * len(costs)
        for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
            owners[at] = min(range(self.world), key=load.__getitem__)
            load[owners[at]] += costs[at]
        return owners

    def _gather(self, item: Any) -> list[Any]:
        everybody: list[Any] = [None] * self.world
        with torch.cuda.device(self._device("cpu")) if self._on_cuda else contextlib.nullcontext():
            self._call(lambda: dist.all_gather_object(everybody, item, group=self.group))
        return everybody

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
        """Where a tensor on such a device has to be for the group's backends to take it."""
        if kind == "cuda" or self._on_cuda:  # the one that the caller has set for this rank
            if kind == "cuda" and "cuda" not in self._backends:
                return torch.device("cpu")
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def _backends(self) -> str:
        """Such as "cpu:gloo,cuda:nccl"."""
        return dist.get_backend_config(self.group)

    @property
    def _on_cuda(self) -> bool:
        """Whether everything has to go through a CUDA device, as for NCCL alone."""
        return "cpu" not in self._backends

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # of a connection that closed, or of a timeout
            if is_out_of_memory(error):
                raise
            broken = DistributedError(
                f"rank {self.rank} of {self.world} lost the others: {error}. One of them has died, "
                "or did not come to the same call in time: look at its log. Start the ranks anew; "
                "with checkpoint_dir the same call goes on after the last state that was saved. "
                "Where a rank needs longer for a block, give init_process_group a longer timeout "
                "(--timeout on the command line)"
            )
            setattr(broken, _AGREED, True)
            raise broken from error


ALONE = Ranks()


@contextlib.contextmanager
def distributed_session(process_group: Group = None) -> Iterator[Ranks]:
    """The ranks that work on one model together; what one raises inside, all raise.

    Args:
        process_group: the group; None is the default one where it is initialised, and False this
            process alone.

    Raises:
        ConfigError: no group, or one that this process is not in.
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
    """The error's kind, for one of ours the public one, and what it says."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in PUBLIC_ERRORS), names[0]), str(error)
