"""calib → batches: read the calibration iterable once, in one form, on the model's device."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import CalibrationError
from magr_fx.machine.memory import available
from magr_fx.passes.graphs.module_calls import named_leaves
from magr_fx.passes.graphs.torch_private import is_fake, tree_leaves, tree_map
from magr_fx.passes.inputs.calibration_forms import (
    refuse_calib,
    refuse_contents,
    refuse_item,
    refuse_keys,
    suspicious_labels,
)
from magr_fx.passes.inputs.dataclass_inputs import dataclasses_open
from magr_fx.passes.inputs.tensors_only import PLAIN

logger = logging.getLogger("magr_fx")

# More batches than any calibration has use for: whoever gives so many gives them without an end.
MOST_BATCHES = 2**16
_ENDLESS = (
    "If calib has no end, or is a whole training set, take some of it: itertools.islice(calib, 128)"
)
_SHARED = ("mask", "position", "bias", "cache")  # what batches have in common by right


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward call, and the batch's place in the calibration.

    ``notes`` are what the report should say of the batch.
    """

    index: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_calib(calib: Any, model: nn.Module, device: torch.device | None = None) -> list[Batch]:
    """Read ``calib`` once and return its batches, their tensors on ``device``, or the model's own.

    The inputs are held until the run ends: each batch is run through the model block by block. What
    is not a list or a tuple may fill the same memory with one batch after the other, so that its
    tensors, arrays and other objects are copied as they come.

    Raises:
        CalibrationError: ``calib`` is no iterable of model inputs, is empty, holds NaN or Inf, has
            more than ``MOST_BATCHES`` batches, or does not fit into memory.
    """
    refuse_calib(calib)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    switch = _position_of_use_cache(model)
    lasting = type(calib) in (list, tuple)  # all of it is there at once
    room, memory = available(device) if not lasting else 0.0, _Memory()
    batches: list[Batch] = []
    index, empty = -1, 0
    for index, item in enumerate(calib):
        if not lasting and index >= MOST_BATCHES:
            raise CalibrationError(
                f"calib has yielded {MOST_BATCHES:,} batches, and there is no end. {_ENDLESS}"
            )
        args, kwargs = _arguments(item, index)
        notes = suspicious_labels(model, item, index) if not batches else ""
        args, kwargs = _plain((args, kwargs))
        refuse_contents(args, kwargs, index)
        if switch is not None and len(args) <= switch:
            kwargs["use_cache"] = False  # a cache in the outputs is memory that nobody reads
        with dataclasses_open((args, kwargs)):
            _check_values((args, kwargs), index)
            if lasting:
                memory.see(args, kwargs, index)
            args, kwargs = _on_device(
                (args, kwargs), device, index, copied=not (lasting and _is_built_in(item))
            )
            if not lasting:
                room -= sum(t.nbytes for t in tree_leaves((args, kwargs)) if _is_tensor(t))
        if room < 0:
            raise CalibrationError(
                f"the first {index + 1} batches of calib do not fit into the memory of {device}, "
                f"in which all of them are held. {_ENDLESS}"
            )
        if _is_empty((args, kwargs)):  # which some models do not run on
            empty += 1
        else:
            batches.append(Batch(index, args, kwargs, (notes,) if notes else ()))
    if empty and not batches:
        raise CalibrationError(
            f"no token of the {empty} calibration batches counts: their inputs are empty (of size "
            "0); nothing was changed"
        )
    if not batches:
        raise CalibrationError(
            "calib is empty: give at least one model input (a generator that was "
            "iterated before yields nothing; make it a list)"
        )
    left_out = f"{empty} of {index + 1} calibration batches are empty" if empty else ""
    found = tuple(note for note in (memory.note, left_out) if note)
    batches[0] = replace(batches[0], notes=(*batches[0].notes, *found))
    for note in batches[0].notes:
        logger.warning("%s", note)
    return batches


class _Memory:
    """Finds entries of a list that lie in the same memory: all hold what the last one did."""

    def __init__(self) -> None:
        self._first: dict[Any, int] = {}
        self.note = ""

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        """Look at one more entry."""
        named = [(name, t) for name, t in named_leaves({"": args, **kwargs}) if _is_tensor(t)]
        named = [(name, t) for name, t in named if t.numel() and not t.is_nested]
        found: list[tuple[bool, int]] = []
        for at, (name, tensor) in enumerate(named):
            own = (at == 0 or name != "") and not any(part in name for part in _SHARED)
            key = (tensor.device, tensor.data_ptr(), tensor.dtype)
            before = self._first.setdefault(key, index)
            if before != index:
                found.append((own, before))
        if found and not self.note and (any(own for own, _ in found) or len(found) == len(named)):
            self.note = (
                f"calibration batches {found[0][1]} and {index} lie in the same memory, so that "
                "they hold the same values. If calib was made of a generator that fills one "
                "buffer, all batches hold its last values: clone each as it comes, or pass the "
                "generator itself"
            )


def _is_empty(inputs: Any) -> bool:
    """Whether there are tensors, and all of them have a size of 0."""
    tensors = [leaf for leaf in tree_leaves(inputs) if _is_tensor(leaf)]
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def _position_of_use_cache(model: nn.Module) -> int | None:
    """Where ``forward`` takes ``use_cache``; None where it does not, or not any more."""
    if isinstance(model, fx.GraphModule):  # a value that the graph was made with
        return None
    names = list(inspect.signature(model.forward).parameters)
    return names.index("use_cache") if "use_cache" in names else None


def _arguments(item: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, torch.Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        refuse_keys(item, index)
        # Sorted, so that two batches with the same keys are one input signature.
        return (), {key: item[key] for key in sorted(item)}
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    refuse_item(item, index)
    raise AssertionError  # it never returns


def _plain(value: Any) -> Any:
    """``value`` with dicts for other mappings (a BatchEncoding), which hide their tensors."""
    if isinstance(value, Mapping) and (type(value) is dict or not isinstance(value, dict)):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_plain(inner) for inner in value)
    return value


def _is_built_in(item: Any) -> bool:
    """Whether an entry holds its values itself; others may make them as they are asked for."""
    if type(item) is dict:
        return all(map(_is_built_in, item.values()))
    if isinstance(item, tuple) or type(item) is list:
        return all(map(_is_built_in, item))
    return not isinstance(item, (Mapping, list, tuple))


def _on_device(value: Any, device: torch.device, index: int, *, copied: bool) -> Any:
    """The inputs as they are held, in one memory layout, which a trace depends on.

    What is one and the same tensor stays so: self-attention, for one, asks that.
    """
    known: dict[int, Any] = {}

    def hold(leaf: Any) -> Any:
        if isinstance(leaf, PLAIN):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = _leaf_on_device(leaf, device, index, copied=copied)
        return known[id(leaf)]

    return tree_map(hold, value)


def _leaf_on_device(leaf: Any, device: torch.device, index: int, *, copied: bool) -> Any:
    if not _is_tensor(leaf):
        try:
            return copy.deepcopy(leaf) if copied else leaf
        except Exception as error:  # whatever the object's own code raises
            raise CalibrationError(
                f"calibration batch {index} holds a {type(leaf).__name__}, which cannot be copied "
                f"({type(error).__name__}: {error}) and may change with the next batch; make calib "
                "a list, of batches that have their own"
            ) from error
    if isinstance(leaf, nn.Parameter) or leaf.requires_grad:
        leaf = leaf.detach()
    if copied:
        return leaf.to(device, copy=True, memory_format=torch.contiguous_format)
    return leaf.to(device).contiguous()


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _check_values(inputs: Any, index: int) -> None:
    for leaf in tree_leaves(inputs):
        if not isinstance(leaf, torch.Tensor):
            continue
        kind = _strange_kind(leaf)
        if kind:
            raise CalibrationError(
                f"calibration batch {index} holds a tensor of shape {_shape(leaf)} that {kind}; "
                "give ordinary tensors with values"
            )
        if leaf.is_floating_point() or leaf.is_complex():
            values = leaf.float() if leaf.is_floating_point() and leaf.itemsize == 1 else leaf
            # An additive attention mask holds -inf on purpose; NaN and +inf never are.
            bad = torch.isnan(values)
            bad |= torch.isinf(values) if leaf.is_complex() else torch.isposinf(values)
            if bool(bad.any()):
                raise CalibrationError(
                    f"calibration batch {index} holds {int(bad.sum())} NaN or Inf values in an "
                    f"input of shape {tuple(leaf.shape)}; remove or repair it"
                )


def _strange_kind(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being an ordinary one; empty where nothing does."""
    if tensor.is_nested:
        return "is nested: pad it (torch.nested.to_padded_tensor), with an attention_mask"
    if tensor.is_meta:
        return "is on the meta device"
    if is_fake(tensor):
        return "is fake (FakeTensorMode)"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    # One that has ways of its own with every op, and mostly lacks some of them.
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return f"is a {type(tensor).__name__}" if own else ""


def _shape(tensor: torch.Tensor) -> str:
    if tensor.is_nested:  # which has none
        return f"{tensor.size(0)} x {'?, ' * (tensor.dim() - 1)}".rstrip(", ")
    return str(tuple(tensor.shape))


def notes_of(batches: Iterable[Batch]) -> list[str]:
    """What the report should say of the batches."""
    return [note for batch in batches for note in batch.notes]
