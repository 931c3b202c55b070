"""Record which traced inputs are passed unchanged to the modules inside a model, by what names.

A wrapper may take its inputs as ``*args``, or under names of its own. The modules that it passes
them to tell what they are, for example ``attention_mask``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from magr_fx.passes.graphs.torch_private import GetAttrKey, MappingKey, tree_flatten_with_path

CALLS = "module_calls"  # their key in the ``meta`` of a traced graph module


class ModuleCall(NamedTuple):
    """One call of a module inside the model.

    Attributes:
        arguments: the arguments that are inputs of the trace: their names, and their positions
            among these inputs.
        batch_first: the module's own ``batch_first``; None if it has none.
        masks: the names of its arguments ``[batch, tokens]`` that are called a mask and were made
            by the model itself.
    """

    arguments: tuple[tuple[str, int], ...]
    batch_first: bool | None = None
    masks: tuple[str, ...] = ()


class CallLog:
    """The calls of the modules inside a model that are given inputs or masks, outer first.

    It is no attribute of a module, because torch.export undoes changes of these.
    """

    def __init__(self) -> None:
        self.calls: list[ModuleCall] = []

    @contextlib.contextmanager
    def noting(self, model: nn.Module, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
        """Record the calls in this context, by hooks that are removed at its end."""
        places: dict[int, int] = {}
        for place, tensor in enumerate(inputs):
            places.setdefault(id(tensor), place)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_dynamo_compiling():  # traces a branch of torch.cond
                return
            with contextlib.suppress(TypeError, ValueError):  # without a fitting signature
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                leaves = named_leaves(dict(bound.arguments))
                found = ((name, places[id(leaf)]) for name, leaf in leaves if id(leaf) in places)
                arguments = tuple(found)
                masks = tuple(
                    n for n, leaf in leaves if id(leaf) not in places and _is_mask(n, leaf)
                )
                if arguments or masks:
                    order = getattr(module, "batch_first", None)
                    self.calls.append(ModuleCall(arguments, order, masks))

        with contextlib.ExitStack() as hooks:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    handle = module.register_forward_pre_hook(note, with_kwargs=True)
                    hooks.callback(handle.remove)
            yield


def _is_mask(name: str, leaf: Any) -> bool:
    return "mask" in name and isinstance(leaf, torch.Tensor) and leaf.dim() == 2


def named_leaves(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """The leaves of bound arguments, in order, each with its name.

    A value in a mapping (also that of ``**kwargs``) is named by its key, a value in a named tuple
    by its field, and any other value by its argument.
    """
    named: list[tuple[str, Any]] = []
    for argument, value in arguments.items():
        for path, leaf in tree_flatten_with_path(value)[0]:
            keys = [str(k.key) for k in path if isinstance(k, MappingKey)]
            keys += [k.name for k in path if isinstance(k, GetAttrKey)]
            named.append((keys[-1] if keys else argument, leaf))
    return named
