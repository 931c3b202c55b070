"""Whether a directory holds the model that its configuration says, and what an option names.

All of it by names, shapes and dtypes: no weight is read.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from magr_fx.errors import ConfigError, ModelError
from magr_fx.model_directory import FLOATING, StoredTensor
from magr_fx.passes.find_linears import FilterFn

_REMEDY = "config.json and the weights must be of one model: finish the download, or save it anew"


def check_names(source: Path, missing: Iterable[str], unexpected: Iterable[str], kind: str) -> None:
    """Whether the directory has all tensors of the model, and no others.

    Args:
        source: the directory.
        missing: what transformers did not find, and would make up.
        unexpected: what it found no use for.
        kind: the class that it loads.

    Raises:
        ModelError: some are missing, or superfluous; the message has the first name.
    """
    for names, lacks in ((sorted(missing), True), (sorted(unexpected), False)):
        if names:
            count = f"{len(names)} tensors, {names[0]} for one," if len(names) > 1 else names[0]
            what = f"lacks {count}" if lacks else f"holds {count}"
            which = f"which {kind} {'has' if lacks else 'does not know'}"
            raise ModelError(f"{source} {what} {which}; {_REMEDY}")


def check_shapes(
    parameters: Mapping[str, Tensor], stored: Mapping[str, StoredTensor | None]
) -> None:
    """Whether each parameter is stored in its own shape, as numbers of floating point.

    Args:
        parameters: of the model, by name; their shapes count.
        stored: for those names, what is stored; None where it is made of several.

    Raises:
        ModelError: one is not.
    """
    for name, parameter in parameters.items():
        found = stored.get(name)
        if found is None:
            continue
        if tuple(parameter.shape) != found.shape:
            raise ModelError(
                f"{name} is {found.shape} in {found.file}, and by config.json it is "
                f"{tuple(parameter.shape)}; {_REMEDY}"
            )
        if parameter.is_floating_point() and found.dtype not in FLOATING:
            raise ModelError(
                f"{name} in {found.file} is stored as {found.dtype}: MagR works on "
                f"{', '.join(FLOATING)}; start from the full-precision model"
            )


def check_token_ids(model: Any, batches: Sequence[Tensor]) -> None:
    """Whether the model has an embedding for each token of the text.

    Raises:
        ModelError: the tokenizer is of another model.
    """
    table = model.get_input_embeddings()
    most = max((int(batch.max()) for batch in batches), default=0)
    if table is not None and most >= table.weight.shape[0]:
        raise ModelError(
            f"the tokenizer makes the token {most}, and the model has {table.weight.shape[0]:,} "
            "embeddings; the tokenizer's files have to be the model's own"
        )


def check_skipped(model: nn.Module, patterns: Sequence[str], chosen: FilterFn) -> None:
    """Whether each pattern of ``--skip`` leaves out something that would be rewritten without it.

    Args:
        model: its modules' names count.
        patterns: as given.
        chosen: what would be rewritten without them.

    Raises:
        ConfigError: one does not; the message has the names that are close.
    """
    names = [n for n, m in model.named_modules() if n and _has_matrix(m) and chosen(m, n)]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            continue
        every = [name for name, _ in model.named_modules() if name]
        others = [name for name in every if fnmatch.fnmatchcase(name, pattern)]
        inside = [n for n in names if any(n.startswith(f"{other}.") for other in others)]
        if inside:
            remedy = f"it names what holds them: {pattern}.* leaves out {inside[0]}, for one"
        elif others:
            remedy = f"{others[0]}, which it names, is left alone without it"
        else:
            close = _close(pattern, names)
            remedy = f"the closest there are: {', '.join(close)}"
        raise ConfigError(f"--skip {pattern!r} matches no module that would be rewritten; {remedy}")


def _has_matrix(module: nn.Module) -> bool:
    own = (p for p in module._parameters.values() if p is not None)
    return not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in own)


def _close(pattern: str, names: Sequence[str]) -> list[str]:
    """What the pattern may have meant: by the last part of the names, if that is all it says."""
    bare = pattern.strip("*?.")
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    last = difflib.get_close_matches(bare.rpartition(".")[2], kinds, n=3, cutoff=0.5)
    if "." not in bare and last:
        return [f"*.{kind}" for kind in last]
    return difflib.get_close_matches(bare, names, n=3, cutoff=0) or list(names[:3])
