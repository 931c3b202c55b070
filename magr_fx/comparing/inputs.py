"""The inputs of both models: their arguments, and running a model on them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from magr_fx.comparing.next_token import Arguments
from magr_fx.errors import MagRError, ModelError, brief
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.finding.counted_tokens import named_arguments
from magr_fx.passes.graphs.torch_private import tree_map
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import own_arguments

# What decides the form of the outputs, or adds one that takes memory: set as it is needed here.
_OF_OUTPUTS = ("labels", "return_dict", "logits_to_keep", "num_logits_to_keep", "use_cache")


def text_arguments(batch: Batch, model: nn.Module) -> Arguments:
    """The arguments of a batch for a model of transformers, by their names, and on its device.

    Without labels, since no loss is wanted, and without what would change the form of the outputs.
    """
    signature = inspect.signature(model.forward)
    given = named_arguments(batch, signature)
    named = {name: value for name, value in given.items() if name not in _OF_OUTPUTS}
    if "return_dict" in signature.parameters:
        named["return_dict"] = True
    return (), _own(named, model)


def arguments_of(batch: Batch, model: nn.Module) -> Arguments:
    """A copy of the arguments of a batch, on the model's device."""
    args, kwargs = _own((batch.args, batch.kwargs), model)
    if isinstance(model, fx.GraphModule):  # which has no such argument, nor a cache
        kwargs.pop("use_cache", None)
    return args, kwargs


def _own(arguments: Any, model: nn.Module) -> Any:
    """Copies on the model's device: forward may change its inputs in place."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(leaf: Any) -> Any:
        # A model that is offloaded moves its inputs itself.
        return leaf.to(device) if isinstance(leaf, Tensor) and device.type != "meta" else leaf

    return tree_map(moved, own_arguments(arguments))


@contextlib.contextmanager
def running(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Run a model inside, uncompiled; what its own code raises is told with the batch.

    Raises:
        ModelError: the model does not run.
    """
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    except MagRError:
        raise
    except Exception as error:  # a model's code can raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} does not run on batch {batch.index} of those to compare the "
            f"models on: {brief(error)}"
        ) from error
