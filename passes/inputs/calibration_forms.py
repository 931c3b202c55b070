"""Common wrong forms of a calibration, and the remedy that the error message gives for each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from magr_fx.errors import CalibrationError
from magr_fx.passes.graphs.torch_private import tree_leaves

FORMS = "a tensor (first argument), a tuple or list (arguments) or a mapping (keyword arguments)"
_NUMBERS = (
    "turn token ids and other numbers into tensors with a batch dimension: torch.tensor([[1, 2, "
    '3]]), or tokenizer(..., return_tensors="pt")'
)
_TEXT = 'tokenize text first: tokenizer(texts, return_tensors="pt", padding=True)'
_ARRAYS = "turn NumPy arrays into tensors: torch.from_numpy(array)"
_ROWS = (
    "rows of a data set have no batch dimension: add one (row[None]), or wrap the data set in a "
    "torch DataLoader"
)
_ALONE = "pass the images alone: [images for images, _ in loader]"
_LABELS = f"for batches of (images, labels), as from a DataLoader, {_ALONE}"
_ONE_MAPPING = (
    "a mapping is passed as keyword arguments; if forward takes the mapping itself as its only "
    "argument, pass it in a tuple: (features,)"
)
# Parts of the names of parameters that may rightly get a 1-D integer tensor beside the images.
_INDICES = ("label", "target", "length", "size", "time", "step", "class", "id", "ind", "offs", "y")
_TOKENS = ("input_ids", "attention_mask", "inputs_embeds", "pixel_values", "token_type_ids")


def refuse_calib(calib: Any) -> None:
    """Refuse a ``calib`` that is not an iterable of model inputs.

    Raises:
        CalibrationError: with the remedy.
    """
    single = (torch.Tensor, Mapping, str, bytes, np.ndarray)
    if isinstance(calib, Iterable) and not isinstance(calib, single):
        return
    remedy = "For a single input pass a list of one: [calib]"
    if isinstance(calib, np.ndarray):
        remedy = "For a single input pass a list of one tensor: [torch.from_numpy(calib)]"
    elif isinstance(calib, Dataset) or (_has_items(calib) and not isinstance(calib, single)):
        remedy = "Wrap a dataset in a torch DataLoader"
    elif callable(calib) and not isinstance(calib, (nn.Module, type)):
        remedy = "If it is a function that yields inputs, it has to be called: calib()"
    raise CalibrationError(
        f"calib must be an iterable of model inputs, each {FORMS}; got "
        f"{type(calib).__name__}. {remedy}"
    )


def refuse_item(item: Any, index: int) -> None:
    """Refuse a batch that is neither a tensor nor a tuple, list or mapping.

    Raises:
        CalibrationError: always, with the remedy.
    """
    remedies: list[tuple[Any, str]] = [
        ((str, bytes), _TEXT),
        ((np.ndarray, np.generic), _ARRAYS),
        ((int, float), _NUMBERS),
        (DataLoader, "pass the DataLoader itself as calib"),
        (Dataset, "wrap a dataset in a torch DataLoader, and pass that as calib"),
    ]
    remedy = next((r for kinds, r in remedies if isinstance(item, kinds)), "")
    if not remedy and not isinstance(item, (type(None), set, frozenset)):
        remedy = "if forward takes such an object, pass it in a tuple: (batch,)"
    raise CalibrationError(
        f"calibration batch {index} is a {type(item).__name__}; each must be {FORMS}"
        + (f". Remedy: {remedy}" if remedy else "")
    )


def refuse_keys(item: Mapping[Any, Any], index: int) -> None:
    """Refuse a mapping whose keys cannot be the names of arguments.

    Raises:
        CalibrationError: with the remedy.
    """
    strange = next((key for key in item if not isinstance(key, str)), None)
    if strange is not None:
        raise CalibrationError(
            f"calibration batch {index} is a mapping with the key {strange!r}, which cannot name "
            f"an argument: {_ONE_MAPPING}"
        )


def refuse_contents(args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
    """Refuse a batch with lists of numbers, arrays or text in place of tensors.

    A batch that has a tensor is refused only if this is so for one of the ``_TOKENS``.

    Raises:
        CalibrationError: with the remedy.
    """
    leaves = tree_leaves((args, kwargs))
    named = [kwargs[key] for key in _TOKENS if key in kwargs]
    found = ""
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        found = _remedy(args) or next(filter(None, map(_remedy, kwargs.values())), "")
    found = found or next(filter(None, map(_remedy, named)), "")
    if found:
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves))
        raise CalibrationError(
            f"calibration batch {index} holds {kinds} where the model needs tensors: {found}"
        )


def describe_failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Remedies for the form of a batch on which the model fails; empty if none is known."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    found = [remedy for leaf in (*args, *kwargs.values()) if (remedy := _remedy(leaf))]
    named = list(_named(model, args, kwargs))
    if any(_is_row(one) for at, one in enumerate(named) if at == 0 or one[0] in _TOKENS):
        found.append(_ROWS)
    if len(args) > 1 and len(tensors) > 1 and _is_label(tensors[0], tensors[-1]):
        found.append(_LABELS)
    if kwargs and not args and _takes_one_argument(model):
        found.append(_ONE_MAPPING)
    return "; ".join(dict.fromkeys(found))


def describe_misfit(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """A remedy for arguments that do not fit ``forward``; empty if none is known."""
    positional = [p for p in signature.parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in positional if p.default is p.empty]
    given = set(kwargs) - {"use_cache"}
    if given and not args and len(required) == 1 and required[0] not in given:
        return f". Possible remedy: {_ONE_MAPPING}"
    if len(args) <= len(positional):
        return ""
    if not any(isinstance(one, torch.Tensor) for one in args):
        return f". Possible remedy: {_remedy(args) or _NUMBERS}"
    return f". Possible remedy: {_LABELS}; if forward takes the list as one argument, pass (batch,)"


def suspicious_labels(model: nn.Module, item: Any, index: int) -> str:
    """A warning about labels that ``forward`` would take as an option; empty if there are none."""
    if type(item) not in (list, tuple) or len(item) < 2:
        return ""
    if not all(isinstance(one, torch.Tensor) for one in item) or not _is_label(item[0], item[-1]):
        return ""
    parameters = _parameters(model)
    if len(item) > len(parameters):
        return ""  # an error is raised where the arguments are bound to forward
    parameter = parameters[len(item) - 1]
    name = parameter.name.lower()
    words = name.split("_")
    if parameter.default is parameter.empty or any(
        word == part or (len(part) > 2 and part in name) for word in words for part in _INDICES
    ):
        return ""
    return (
        f"the last tensor of calibration batch {index} has one integer for each of {len(item[0])} "
        f"inputs, and forward takes it as {parameter.name!r}. If those are labels, {_ALONE}"
    )


def _has_items(calib: Any) -> bool:
    """Whether it has items and a length, like a data set; it may have no end when iterated."""
    return hasattr(type(calib), "__getitem__") and hasattr(type(calib), "__len__")


def _remedy(value: Any) -> str:
    """The remedy for numbers in lists, arrays or text in place of a tensor; else empty."""
    if not isinstance(value, (list, tuple, Mapping, np.ndarray)):
        return ""
    leaves = list(_flat(value))
    if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return ""
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        return _ARRAYS
    kinds: list[tuple[Any, str]] = [
        ((str, bytes), _TEXT),
        ((int, float, np.number), _NUMBERS),
    ]
    return next((r for k, r in kinds if leaves and all(isinstance(x, k) for x in leaves)), "")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _flat(inner)
    else:
        yield value


def _named(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the arguments, each with its parameter's name; "" if it is unknown."""
    names = [parameter.name for parameter in _parameters(model)] + [""] * len(args)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, torch.Tensor):
            yield name, value


def _is_row(named: tuple[str, torch.Tensor]) -> bool:
    """Whether an input seems to lack the batch dimension, going by its name and shape."""
    name, value = named
    least = {"inputs_embeds": 3, "pixel_values": 4}.get(name, 2)
    image = value.dim() == 3 and value.is_floating_point() and value.shape[0] in (1, 3, 4)
    return 0 < value.dim() < least or image


def _is_label(first: torch.Tensor, last: torch.Tensor) -> bool:
    """Whether ``last`` has one integer for each row of ``first``, which is floating point."""
    whole = not (last.is_floating_point() or last.is_complex() or last.dtype is torch.bool)
    of_inputs = first.is_floating_point() and first.dim() > 1
    return whole and of_inputs and tuple(last.shape) == tuple(first.shape[:1])


def _takes_one_argument(model: nn.Module) -> bool:
    """Whether forward requires exactly one argument, or names none (``*args``)."""
    given = _parameters(model)
    required = [p for p in given if p.default is p.empty]
    return len(required) == 1 or not given


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of forward that may be passed by position."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
