"""A model as its files describe it: built without values, and held against their headers.

transformers makes up what a file lacks, at random, leaves out what it does not know, and offloads
to disk whatever shape is there. Here a directory is taken only if it holds what its configuration
says; the comparison is transformers' own loading, of tensors without values.
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
_ANEW = "load the model with transformers and save_pretrained it anew"
_FULL = "start from the full-precision model"


def empty_model(folder: Path, config: dict[str, Any]) -> Any:
    """The model of a directory on the meta device: modules and shapes, no values.

    Args:
        folder: a model's directory.
        config: its ``config.json``.

    Raises:
        ModelError: transformers cannot build it.
    """
    kind = model_class(config)
    build = getattr(kind, "_from_config", None) or kind.from_config  # the second of Auto classes
    try:
        # No code of the directory's own is run, nor asked about.
        resolved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with _META:
            return build(resolved).eval()
    except Exception as error:  # whatever transformers raises of what it does not know
        raise ModelError(
            f"transformers cannot build the model that {folder / CONFIG} describes, as "
            f"{kind.__name__}: {brief(error)}"
        ) from error


def check_stored(model: Any, folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Whether a directory holds each tensor of its model, in its shape, and no other.

    What transformers knows that files may hold or lack is no error: tied weights once or twice,
    prefixes, fused experts one by one, old buffers. Nor is what the model's class leaves out, such
    as heads over a base model: a warning names that.

    Args:
        model: of :func:`empty_model`.
        folder: the model's directory.
        tensors: what its files hold.

    Raises:
        ModelError: a tensor is missing, superfluous, or of another shape or kind of dtype; the
            message names it.
    """
    found = _loaded(model, tensors)
    if found is None:
        fault = _fault_by_name(model, folder, tensors)
        raise ModelError(
            f"transformers cannot put the weights of {type(model).__name__} together from the "
            f"tensors of {folder}; {_ANEW}"
            if fault is None
            else f"{fault}; {_MEND}"
        )
    loaded, missing, unexpected, mismatched = found
    _check_dtypes(loaded, tensors, missing, unexpected)
    kind = type(model).__name__
    if mismatched:
        name, stored, wanted = min(mismatched)
        if _stored_name(loaded, name, tensors) is None:  # it is made of several
            cause = _fault_by_name(loaded, folder, tensors)
            if cause is not None:
                raise ModelError(f"{cause}{_more(mismatched)}; {_MEND}")
        own = _stored_name(loaded, name, tensors) or name
        file = tensors[own].file if own in tensors else folder
        raise ModelError(
            f"{own} in {file} has the shape {[*stored]}, and {CONFIG} makes it {[*wanted]}"
            f"{_more(mismatched)}; {_MEND}"
        )
    if missing:
        name = min(missing)
        own = next(iter(_as_stored(loaded, [name])), name)
        also = f"; {min(unexpected)}, which is there, is none of it" if unexpected else ""
        raise ModelError(
            f"{folder} lacks {own}, which {kind} has, so that its values would be made up"
            f"{_more(missing)}{also}; {_MEND}"
        )
    left_out = _left_out(loaded, unexpected, tensors)
    if left_out:
        _log.warning("%s leaves out what %s holds: %s", kind, folder, ", ".join(sorted(left_out)))
    unexpected = {n for n in unexpected if _stored_name(loaded, n, tensors) not in left_out}
    if unexpected:
        name = min(unexpected)
        own = _stored_name(loaded, name, tensors) or name
        file = tensors[own].file if own in tensors else folder
        raise ModelError(
            f"{own} in {file} is no tensor of {kind}, as {CONFIG} describes it"
            f"{_more(unexpected)}; correct {CONFIG} if it belongs there, else {_ANEW}, which "
            "leaves it out"
        )


def _left_out(model: Any, unexpected: set[str], tensors: dict[str, StoredTensor]) -> set[str]:
    """The stored names of what belongs to the architecture, and not to this class of it.

    That is a head: beside the base model in the files, and of no module that the model has. Or a
    part of the base model that some classes are built without, such as a pooler.
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
    """The names and shapes of the base model's tensors, as transformers builds it by itself."""
    try:
        with _META:
            base = AutoModel.from_config(model.config)
    except Exception:  # whatever transformers raises of what has no base model
        return {}
    return {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}


_MEND = f"{CONFIG} and the weights are of two models, or damaged: download both anew"


def _loaded(
    model: Any, tensors: dict[str, StoredTensor]
) -> tuple[Any, set[str], set[str], set[Any]] | None:
    """What transformers makes of the tensors, and what it misses; None if it cannot convert them.

    The names are the model's own.
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
    except Exception:  # what was wrong in a conversion transformers only logs
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
    """Whether each parameter of floating point is stored as such; buffers may be anything."""
    floats = {name: stored for name, stored in tensors.items() if stored.dtype in FLOATS}
    if len(floats) == len(tensors):
        return
    others = tensors.keys() - floats.keys()
    # Of a packed or quantized model neither names nor shapes fit.
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
        where = f" in {stored.file} is stored as {stored.dtype}" if stored else " is of no float"
        raise ModelError(f"{name}{where}: MagR works on {', '.join(FLOATS)}; {_FULL}")


def _fault_by_name(model: Any, folder: Path, tensors: dict[str, StoredTensor]) -> str | None:
    """What is wrong, by the names and shapes that transformers would store the model with."""
    wanted = _as_stored(model, [name for name, _ in model.named_parameters()])
    for name, shape in sorted(wanted.items()):
        if name in tensors and tensors[name].shape != shape:
            return (
                f"{name} in {tensors[name].file} has the shape {[*tensors[name].shape]}, and "
                f"{CONFIG} makes it {[*shape]}"
            )
    if not wanted.keys() & tensors.keys():  # they are stored in another way
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
    """The names and shapes that transformers would store these weights with."""
    known = model.state_dict()
    try:
        parts = revert_weight_conversion(model, {n: known[n] for n in names if n in known})
    except Exception:  # whatever a conversion raises that has no way back
        return {}
    return {name: tuple(part.shape) for name, part in parts.items()}


def _stored_name(model: Any, name: str, tensors: dict[str, StoredTensor]) -> str | None:
    """The one stored tensor that a name of the model is; None where it is not just one."""
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
    return f" (and {others:,} more are wrong in this way)" if others > 0 else ""
