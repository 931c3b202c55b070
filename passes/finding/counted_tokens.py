"""Which tokens of a batch count, by the masks among the arguments of a transformers' model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from magr_fx.errors import CalibrationError
from magr_fx.passes.finding.mask_values import Convention, convention, counted_tokens
from magr_fx.passes.inputs.calibration import Batch

IGNORED = -100  # transformers' label of what has no loss


def named_arguments(batch: Batch, signature: inspect.Signature) -> dict[str, Any]:
    """The arguments of a batch by their names, without the switch of the cache."""
    kwargs = {k: v for k, v in batch.kwargs.items() if k != "use_cache"}
    try:
        found = dict(signature.bind_partial(*batch.args, **kwargs).arguments)
    except TypeError:  # forward does not take them: running it will say so
        return kwargs
    rest: dict[str, Any] = found.pop("kwargs", {})
    return {**found, **rest}


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
            masks = [named_arguments(batch, self._signature).get(name) for batch in batches]
            self._how[name] = convention(
                [mask for mask in masks if isinstance(mask, Tensor)], marks_padding=False
            )

    def ids(self, batch: Batch) -> Tensor:
        """Token ids ``[batch, tokens]``, on the CPU.

        Raises:
            CalibrationError: the batch has none.
        """
        ids = named_arguments(batch, self._signature).get("input_ids")
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
        mask = named_arguments(batch, self._signature).get(name)
        if not isinstance(mask, Tensor):
            return torch.ones(shape, dtype=torch.bool)
        found = counted_tokens(mask, *shape, self._how[name])
        return None if found is None else found.cpu()

    def predicted(self, batch: Batch) -> Tensor:
        """Whether a token and the one that follows it count, ``[batch, tokens - 1]``.

        Raises:
            CalibrationError: the mask has a form that does not say.
        """
        ids, labels = self.ids(batch), named_arguments(batch, self._signature).get("labels")
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
