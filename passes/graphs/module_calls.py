"""Which of the traced inputs reach the modules inside a model as they are, and by what names.

A wrapper may take its inputs as ``*args``, or under names of its own. The modules that it hands
them to say what they are: ``attention_mask``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from magr_fx.passes.graphs.torch_private import GetAttrKey, MappingKey, tree_flatten_with_path

CALLS = "module_calls"  # where a traced graph module keeps them, in its ``meta``


class ModuleCall(NamedTuple):
    """One call: its arguments that are inputs of the trace, by their positions among those.

    ``batch_first`` is what the module says of the order of its dimensions; None: it does not.
    ``masks`` are its arguments of that name, ``[batch, tokens]``, which the model made itself.
    """

    arguments: tuple[tuple[str, int], ...]
    batch_first: bool | None = None
    masks: tuple[str, ...] = ()


class CallLog:
    """The calls of the modules inside a model that are given inputs or masks, outer first.

    An object of its own, since torch.export puts back what forward does to a module's attributes.
    """

    def __init__(self) -> None:
        self.calls: list[ModuleCall] = []

    @contextlib.contextmanager
    def noting(self, model: nn.Module, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
        """Note the calls inside of the context; the hooks that this takes are only there."""
        places: dict[int, int] = {}
        for place, tensor in enumerate(inputs):
            places.setdefault(id(tensor), place)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_dynamo_compiling():  # a branch of torch.cond, which is only traced
                return
            with contextlib.suppress(TypeError, ValueError):  # no signature, or another one
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

    What lies in a mapping, that of ``**kwargs`` included, goes by its own key there, and what lies
    in a named tuple by its field; anything else by its argument.
    """
    named: list[tuple[str, Any]] = []
    for argument, value in arguments.items():
        for path, leaf in tree_flatten_with_path(value)[0]:
            keys = [str(k.key) for k in path if isinstance(k, MappingKey)]
            keys += [k.name for k in path if isinstance(k, GetAttrKey)]
            named.append((keys[-1] if keys else argument, leaf))
    return named
