"""calib → batches: read the calibration iterable once, onto the model's device."""

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

# No useful calibration has more batches: an iterable that yields so many has no end.
MOST_BATCHES = 2**16
_ENDLESS = (
    "If calib has no end, or is a whole training set, pass a part: itertools.islice(calib, 128)"
)
_SHARED = ("mask", "position", "bias", "cache")  # inputs that batches may well have in common


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward call.

    ``index`` is the batch's place in the calibration. ``notes`` are remarks for the report.
    """

    index: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_calib(calib: Any, model: nn.Module, device: torch.device | None = None) -> list[Batch]:
    """Read ``calib`` once and return its batches.

    All inputs stay in memory until the run ends, because each block is run on all batches before
    the next block. An iterable that is neither a list nor a tuple may write every batch to the same
    buffer, so its tensors, arrays and other objects are copied when they are read.

    Args:
        calib: an iterable of model inputs: a tensor, a tuple or list, or a mapping each.
        model: the batches are arguments of its ``forward``.
        device: where the tensors are put; None is the device of the model's first parameter.

    Raises:
        CalibrationError: ``calib`` is not an iterable of model inputs, is empty, holds NaN or Inf,
            has more than ``MOST_BATCHES`` batches, or does not fit into memory.
    """
    refuse_calib(calib)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    switch = _position_of_use_cache(model)
    lasting = type(calib) in (list, tuple)  # no batch is overwritten by the next one
    room, memory = available(device) if not lasting else 0.0, _Memory()
    batches: list[Batch] = []
    index, empty = -1, 0
    for index, item in enumerate(calib):
        if not lasting and index >= MOST_BATCHES:
            raise CalibrationError(
                f"calib has yielded {MOST_BATCHES:,} batches and has not ended. {_ENDLESS}"
            )
        args, kwargs = _arguments(item, index)
        notes = suspicious_labels(model, item, index) if not batches else ""
        args, kwargs = _plain((args, kwargs))
        refuse_contents(args, kwargs, index)
        if switch is not None and len(args) <= switch:
            kwargs["use_cache"] = False  # a cache in the outputs only takes memory
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
                f"which has to hold all batches. {_ENDLESS}"
            )
        if _is_empty((args, kwargs)):  # some models do not run on an empty batch
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
            "iterated before yields nothing more; make it a list)"
        )
    left_out = f"{empty} of {index + 1} calibration batches are empty" if empty else ""
    found = tuple(note for note in (memory.note, left_out) if note)
    batches[0] = replace(batches[0], notes=(*batches[0].notes, *found))
    for note in batches[0].notes:
        logger.warning("%s", note)
    return batches


class _Memory:
    """Finds batches of a list that share memory, so that all have the values of the last one."""

    def __init__(self) -> None:
        self._first: dict[Any, int] = {}
        self.note = ""

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        """Compare one more batch with those before; fills ``note`` at the first shared memory."""
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
                f"calibration batches {found[0][1]} and {index} lie in the same memory, so they "
                "have the same values. If calib is a list made from a generator that reuses one "
                "buffer, every batch has the last batch's values: clone each batch, or pass the "
                "generator itself"
            )


def _is_empty(inputs: Any) -> bool:
    """Whether the inputs hold tensors, and none of these has an element."""
    tensors = [leaf for leaf in tree_leaves(inputs) if _is_tensor(leaf)]
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def _position_of_use_cache(model: nn.Module) -> int | None:
    """The position of ``use_cache`` among the parameters of ``forward``; None: it has none."""
    if isinstance(model, fx.GraphModule):  # the value is fixed in the graph
        return None
    names = list(inspect.signature(model.forward).parameters)
    return names.index("use_cache") if "use_cache" in names else None


def _arguments(item: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, torch.Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        refuse_keys(item, index)
        # Sorted, so that batches with the same keys have the same input signature.
        return (), {key: item[key] for key in sorted(item)}
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    refuse_item(item, index)
    raise AssertionError  # not reached: refuse_item always raises


def _plain(value: Any) -> Any:
    """``value`` with dicts in place of other mappings (BatchEncoding), which pytree does not open.

    Subclasses of dict are kept.
    """
    if isinstance(value, Mapping) and (type(value) is dict or not isinstance(value, dict)):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_plain(inner) for inner in value)
    return value


def _is_built_in(item: Any) -> bool:
    """Whether all containers of a batch are built in; others may make their values on access."""
    if type(item) is dict:
        return all(map(_is_built_in, item.values()))
    if isinstance(item, tuple) or type(item) is list:
        return all(map(_is_built_in, item))
    return not isinstance(item, (Mapping, list, tuple))


def _on_device(value: Any, device: torch.device, index: int, *, copied: bool) -> Any:
    """The inputs on the device, all contiguous: a trace depends on the memory layout.

    A tensor that is passed twice stays one tensor: self-attention, for instance, checks that.
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
        except Exception as error:  # the object's own code may raise anything
            raise CalibrationError(
                f"calibration batch {index} holds a {type(leaf).__name__}, which cannot be copied "
                f"({type(error).__name__}: {error}) and may change with the next batch; make calib "
                "a list in which each batch has its own object"
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
            # An additive attention mask may hold -inf; NaN and +inf are always errors.
            bad = torch.isnan(values)
            bad |= torch.isinf(values) if leaf.is_complex() else torch.isposinf(values)
            if bool(bad.any()):
                raise CalibrationError(
                    f"calibration batch {index} holds {int(bad.sum())} NaN or Inf values in an "
                    f"input of shape {tuple(leaf.shape)}; remove or repair the batch"
                )


def _strange_kind(tensor: torch.Tensor) -> str:
    """Why a tensor is not an ordinary one, as the end of a sentence; empty if it is."""
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
    # A subclass that implements every op itself, and usually lacks some.
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return f"is a {type(tensor).__name__}" if own else ""


def _shape(tensor: torch.Tensor) -> str:
    if tensor.is_nested:  # it has no shape: only its first size is known
        return f"{tensor.size(0)} x {'?, ' * (tensor.dim() - 1)}".rstrip(", ")
    return str(tuple(tensor.shape))


def notes_of(batches: Iterable[Batch]) -> list[str]:
    """The remarks on all batches, for the report."""
    return [note for batch in batches for note in batch.notes]
