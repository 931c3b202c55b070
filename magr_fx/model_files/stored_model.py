"""Build a model from its configuration without values, and compare it with its stored tensors.

transformers initialises missing tensors at random, ignores tensors that it does not know, and does
not check the shapes of tensors that it offloads to disk. Here a directory is accepted only if it
holds the tensors that its configuration describes. The comparison uses transformers' own loading,
with tensors without values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from magr_fx.errors import ModelError, brief
from magr_fx.machine.safetensors_header import FLOATS, StoredTensor
from magr_fx.model_files.model_class import model_class
from magr_fx.model_files.model_directory import CONFIG
from magr_fx.passes.known_layers.transformers_private import revert_weight_conversion

_log = logging.getLogger("magr_fx")
_META = torch.device("meta")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAVE_AGAIN = "load the model with transformers, and save it again with save_pretrained"
_FULL = "start from the full-precision model"


def empty_model(folder: Path, config: dict[str, Any]) -> Any:
    """A directory's model on the meta device: modules and shapes, without values.

    Args:
        folder: the model's directory.
        config: the contents of its ``config.json``.

    Raises:
        ModelError: transformers cannot build the model.
    """
    kind = model_class(config)
    build = getattr(kind, "_from_config", None) or kind.from_config  # Auto classes have the second
    try:
        # False: never run code from the model's directory, and do not ask the user about it.
        resolved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with _META:
            return build(resolved).eval()
    except Exception as error:  # transformers can raise anything for a model it does not know
        raise ModelError(
            f"transformers cannot build the model that {folder / CONFIG} describes, as "
            f"{kind.__name__}: {brief(error)}"
        ) from error


def check_stored(model: Any, folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Check that a directory holds each tensor of its model, in the right shape, and no others.

    Differences that transformers handles by itself are accepted: tied weights that are stored once
    or twice, prefixes, experts that are stored one by one, old buffers. Tensors that the model's
    class does not use, such as heads over a base model, are accepted with a warning.

    Args:
        model: the model, from :func:`empty_model`.
        folder: the model's directory.
        tensors: the tensors of its files.

    Raises:
        ModelError: a tensor is missing, is one too many, has another shape, or is not of floating
            point; the message names it.
    """
    found = _loaded(model, tensors)
    if found is None:
        fault = _fault_by_name(model, folder, tensors)
        raise ModelError(
            f"transformers cannot make the weights of {type(model).__name__} from the tensors of "
            f"{folder}; {_SAVE_AGAIN}"
            if fault is None
            else f"{fault}; {_DOWNLOAD_BOTH}"
        )
    loaded, missing, unexpected, mismatched = found
    _check_dtypes(loaded, tensors, missing, unexpected)
    kind = type(model).__name__
    if mismatched:
        name, stored, wanted = min(mismatched)
        if _stored_name(loaded, name, tensors) is None:  # it is made of several stored tensors
            cause = _fault_by_name(loaded, folder, tensors)
            if cause is not None:
                raise ModelError(f"{cause}{_more(mismatched)}; {_DOWNLOAD_BOTH}")
        own = _stored_name(loaded, name, tensors) or name
        file = tensors[own].file if own in tensors else folder
        raise ModelError(
            f"{own} in {file} has the shape {[*stored]}, but by {CONFIG} it is {[*wanted]}"
            f"{_more(mismatched)}; {_DOWNLOAD_BOTH}"
        )
    if missing:
        name = min(missing)
        own = next(iter(_as_stored(loaded, [name])), name)
        also = f"; it has {min(unexpected)}, which the model lacks" if unexpected else ""
        raise ModelError(
            f"{folder} lacks {own}, which {kind} has, so its values would be random"
            f"{_more(missing)}{also}; {_DOWNLOAD_BOTH}"
        )
    left_out = _left_out(loaded, unexpected, tensors)
    if left_out:
        _log.warning(
            "%s does not use these tensors of %s: %s", kind, folder, ", ".join(sorted(left_out))
        )
    unexpected = {n for n in unexpected if _stored_name(loaded, n, tensors) not in left_out}
    if unexpected:
        name = min(unexpected)
        own = _stored_name(loaded, name, tensors) or name
        file = tensors[own].file if own in tensors else folder
        raise ModelError(
            f"{own} in {file} is not a tensor of {kind}, as {CONFIG} describes it"
            f"{_more(unexpected)}; correct {CONFIG} if it belongs to the model, else {_SAVE_AGAIN}"
            ", which leaves it out"
        )


def _left_out(model: Any, unexpected: set[str], tensors: dict[str, StoredTensor]) -> set[str]:
    """The stored names of tensors that belong to the architecture but not to the model's class.

    Such a tensor belongs to a head, which is outside the base model and to none of the model's
    modules, or to a part of the base model that some classes omit, such as a pooler.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    stored = {n for name in unexpected if (n := _stored_name(model, name, tensors)) is not None}
    if not stored or not prefix or not any(name.startswith(prefix) for name in tensors):
        return set()
    modules = {name for name, _ in model.named_modules()}
    kinds = {_unnumbered(name) for name in model.state_dict()}
    base = _of_base_model(model)
    return {
        name
        for name in stored
        if (
            base.get(name.removeprefix(prefix)) == tensors[name].shape
            if name.startswith(prefix)
            else name.rpartition(".")[0] not in modules and _unnumbered(name) not in kinds
        )
    }


def _of_base_model(model: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of the base model, as ``AutoModel`` builds it."""
    try:
        with _META:
            base = AutoModel.from_config(model.config)
    except Exception:  # transformers can raise anything if there is no base model
        return {}
    return {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}


_DOWNLOAD_BOTH = (
    f"{CONFIG} and the weights belong to different models, or are damaged: download both again"
)


def _loaded(
    model: Any, tensors: dict[str, StoredTensor]
) -> tuple[Any, set[str], set[str], set[Any]] | None:
    """Load the tensors, without values, with transformers; None if it cannot convert them.

    Returns:
        The loaded model and its missing, unexpected and mismatched tensors, by the model's names.
    """
    values = {
        name: torch.empty(stored.shape, dtype=_DTYPES.get(stored.dtype, torch.uint8), device=_META)
        for name, stored in tensors.items()
    }
    try:
        loaded, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=values,
            device_map={"": _META},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception:  # transformers only logs what was wrong in a conversion
        return None
    return (
        loaded,
        set(info["missing_keys"]),
        set(info["unexpected_keys"]),
        set(info["mismatched_keys"]),
    )


def _check_dtypes(
    model: Any, tensors: dict[str, StoredTensor], missing: set[str], unexpected: set[str]
) -> None:
    """Check that every parameter is stored in floating point; buffers may have any dtype."""
    floats = {name: stored for name, stored in tensors.items() if stored.dtype in FLOATS}
    if len(floats) == len(tensors):
        return
    others = tensors.keys() - floats.keys()
    # A packed or quantized model has stored names and shapes that the model does not have.
    wrong = {name for name in others & unexpected if len(tensors[name].shape) >= 2}
    without = _loaded(model, floats)
    if without is not None:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        lost = (without[1] - missing) & parameters
        wrong |= {_stored_name(model, name, tensors) or name for name in lost}
    else:
        wrong |= others - unexpected
    if wrong:
        name = min(wrong & tensors.keys(), default=min(wrong))
        stored = tensors.get(name)
        where = f" in {stored.file} is stored as {stored.dtype}" if stored else " is not a float"
        raise ModelError(f"{name}{where}: MagR rewrites {', '.join(FLOATS)} only; {_FULL}")


def _fault_by_name(model: Any, folder: Path, tensors: dict[str, StoredTensor]) -> str | None:
    """The first difference to the names and shapes that transformers would store the model with."""
    wanted = _as_stored(model, [name for name, _ in model.named_parameters()])
    for name, shape in sorted(wanted.items()):
        if name in tensors and tensors[name].shape != shape:
            return (
                f"{name} in {tensors[name].file} has the shape {[*tensors[name].shape]}, but by "
                f"{CONFIG} it is {[*shape]}"
            )
    if not wanted.keys() & tensors.keys():  # the model is stored under entirely different names
        return None
    lacking = min(wanted.keys() - tensors.keys(), default=None)
    if lacking is not None:
        return f"{folder} lacks {lacking}, which {type(model).__name__} has"
    kinds = {_unnumbered(name) for name in wanted}
    others = (n for n in tensors.keys() - wanted.keys() if _unnumbered(n) in kinds)
    extra = min(others, default=None)
    return extra and f"{extra} in {tensors[extra].file} is one more than {CONFIG} has"


def _unnumbered(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _as_stored(model: Any, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The names and shapes under which transformers would store these weights."""
    known = model.state_dict()
    try:
        parts = revert_weight_conversion(model, {n: known[n] for n in names if n in known})
    except Exception:  # a conversion that cannot be reverted can raise anything
        return {}
    return {name: tuple(part.shape) for name, part in parts.items()}


def _stored_name(model: Any, name: str, tensors: dict[str, StoredTensor]) -> str | None:
    """The name under which a weight of the model is stored; None if it is not a single tensor."""
    parts = [*_as_stored(model, [name])]
    if len(parts) > 1:
        return None
    for own in (name, *parts):
        if own in tensors:
            return own
    ends = [own for own in tensors if name.endswith(f".{own}") or own.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else None


def _more(names: Iterable[Any]) -> str:
    others = len([*names]) - 1
    return f" (and {others:,} more are wrong in the same way)" if others > 0 else ""
