"""The inputs of both models: their arguments, the tokens in them, and which of these count."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from magr_fx.comparing.next_token import Arguments
from magr_fx.errors import CalibrationError, MagRError, ModelError, brief
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.finding.mask_values import Convention, convention, counted_tokens
from magr_fx.passes.graphs.torch_private import tree_map
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import own_arguments

IGNORED = -100  # transformers' label of what has no loss
# What decides the form of the outputs, or adds one that takes memory: set as it is needed here.
_OF_OUTPUTS = ("labels", "return_dict", "logits_to_keep", "num_logits_to_keep", "use_cache")


def text_arguments(batch: Batch, model: nn.Module) -> Arguments:
    """The arguments of a batch for a model of transformers, by their names, and on its device.

    Without labels, since no loss is wanted, and without what would change the form of the outputs.
    """
    signature = inspect.signature(model.forward)
    given = _named(batch, signature)
    named = {name: value for name, value in given.items() if name not in _OF_OUTPUTS}
    if "return_dict" in signature.parameters:
        named["return_dict"] = True
    return (), _own(named, model)


def _named(batch: Batch, signature: inspect.Signature) -> dict[str, Any]:
    """The arguments of a batch by their names, without the switch of the cache."""
    kwargs = {k: v for k, v in batch.kwargs.items() if k != "use_cache"}
    try:
        found = dict(signature.bind_partial(*batch.args, **kwargs).arguments)
    except TypeError:  # forward does not take them: running it will say so
        return kwargs
    rest: dict[str, Any] = found.pop("kwargs", {})
    return {**found, **rest}


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


class Tokens:
    """The tokens of some batches, and which of them count.

    Args:
        batches: all of them, from which is read how their masks are meant.
        model: whose forward's arguments they are.
    """

    def __init__(self, batches: Sequence[Batch], model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        self._decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._how: dict[str, Convention] = {}
        for name in ("attention_mask", "decoder_attention_mask"):
            masks = [_named(batch, self._signature).get(name) for batch in batches]
            self._how[name] = convention(
                [mask for mask in masks if isinstance(mask, Tensor)], marks_padding=False
            )

    def ids(self, batch: Batch) -> Tensor:
        """Token ids ``[batch, tokens]``, on the CPU.

        Raises:
            CalibrationError: the batch has none.
        """
        ids = _named(batch, self._signature).get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise CalibrationError(
                f"batch {batch.index} has no input_ids [batch, tokens], which are what the models "
                "predict; give token ids, not embeddings"
            )
        return ids.cpu()

    def counted(self, batch: Batch, shape: tuple[int, int], output: str = "") -> Tensor | None:
        """Whether each token counts, ``[sequences, length]``, on the CPU.

        None where the batch has a mask that does not say it of so many tokens.

        Args:
            batch: the call.
            shape: sequences and length.
            output: whose tokens are meant, for models with a decoder: those of the encoder have
                a name that begins so.
        """
        decoder = self._decodes and not output.startswith("encoder")
        name = "decoder_attention_mask" if decoder else "attention_mask"
        mask = _named(batch, self._signature).get(name)
        if not isinstance(mask, Tensor):
            return torch.ones(shape, dtype=torch.bool)
        found = counted_tokens(mask, *shape, self._how[name])
        return None if found is None else found.cpu()

    def predicted(self, batch: Batch) -> Tensor:
        """Whether a token and the one that follows it count, ``[batch, tokens - 1]``.

        Raises:
            CalibrationError: the mask has a form that does not say.
        """
        ids, labels = self.ids(batch), _named(batch, self._signature).get("labels")
        counts = self.counted(batch, (ids.shape[0], ids.shape[1]))
        if counts is None:
            raise CalibrationError(
                f"the attention_mask of batch {batch.index} does not say which tokens count; "
                "give one of [batch, tokens] with 1 for those that do"
            )
        found = counts[:, :-1] & counts[:, 1:]
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            found &= (labels[:, 1:] != IGNORED).cpu()
        return found
