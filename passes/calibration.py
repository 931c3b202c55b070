"""calib → batches: read the calibration iterable once, in one form, on the model's device."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from magr_fx.errors import CalibrationError
from magr_fx.passes.torch_private import tree_leaves, tree_map_only

_FORMS = "a tensor (first argument), a tuple or list (arguments) or a mapping (keyword arguments)"


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward call, and the batch's place in the calibration."""

    index: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def read_calib(calib: Any, model: nn.Module) -> list[Batch]:
    """Read ``calib`` once and return its batches, their tensors on the model's device.

    The inputs are held until the run ends: each batch is run through the model block by block.

    Raises:
        CalibrationError: ``calib`` is no iterable of model inputs, is empty, or holds NaN or Inf.
    """
    if isinstance(calib, (torch.Tensor, Mapping, str, bytes)) or not isinstance(calib, Iterable):
        remedy = "For a single input pass a list of one: [calib]"
        if isinstance(calib, torch.utils.data.Dataset):
            remedy = "Wrap a dataset in a torch DataLoader"
        raise CalibrationError(
            f"calib must be an iterable of model inputs, each {_FORMS}; got "
            f"{type(calib).__name__}. {remedy}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    switch = _position_of_use_cache(model)
    batches = []
    for index, item in enumerate(calib):
        args, kwargs = _arguments(item, index)
        if switch is not None and len(args) <= switch:
            kwargs["use_cache"] = False  # a cache in the outputs is memory that nobody reads
        args, kwargs = _plain((args, kwargs))
        _check_values((args, kwargs), index)
        # In one memory layout, which a trace depends on, whatever slice of what the caller gives.
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: t.to(device).contiguous(), (args, kwargs)
        )
        batches.append(Batch(index, args, kwargs))
    if not batches:
        raise CalibrationError(
            "calib is empty: give at least one model input (a generator that was "
            "iterated before yields nothing; make it a list)"
        )
    return batches


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
        # Sorted, so that two batches with the same keys are one input signature.
        return (), {key: item[key] for key in sorted(item)}
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    raise CalibrationError(
        f"calibration batch {index} is a {type(item).__name__}; each must be {_FORMS}"
    )


def _plain(value: Any) -> Any:
    """``value`` with dicts for other mappings (a BatchEncoding), which hide their tensors."""
    if isinstance(value, Mapping) and (type(value) is dict or not isinstance(value, dict)):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_plain(inner) for inner in value)
    return value


def _check_values(inputs: Any, index: int) -> None:
    for leaf in tree_leaves(inputs):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.is_meta or leaf.layout is not torch.strided:
            kind = "is on the meta device" if leaf.is_meta else f"has the layout {leaf.layout}"
            raise CalibrationError(
                f"calibration batch {index} holds a tensor of shape {tuple(leaf.shape)} that "
                f"{kind}; give ordinary tensors with values"
            )
        if leaf.is_floating_point():
            # An additive attention mask holds -inf on purpose; NaN and +inf never are.
            bad = torch.isnan(leaf) | torch.isposinf(leaf)
            if bool(bad.any()):
                raise CalibrationError(
                    f"calibration batch {index} holds {int(bad.sum())} NaN or Inf values in an "
                    f"input of shape {tuple(leaf.shape)}; remove or repair it"
                )
