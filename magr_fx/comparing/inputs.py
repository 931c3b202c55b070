"""The inputs of both models: their arguments, the tokens in them, and which of these count."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from magr_fx.comparing.next_token import Arguments
from magr_fx.errors import CalibrationError
from magr_fx.passes.finding.mask_values import convention, counted_tokens
from magr_fx.passes.graphs.torch_private import tree_map
from magr_fx.passes.inputs.calibration import Batch

IGNORED = -100  # transformers' label of what has no loss


def arguments_of(batch: Batch, model: nn.Module) -> Arguments:
    """The arguments of a batch on the model's device, without labels: no loss is wanted."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(leaf: Any) -> Any:
        # A model that is offloaded moves its inputs itself.
        return leaf.to(device) if isinstance(leaf, Tensor) and device.type != "meta" else leaf

    kwargs = {name: value for name, value in batch.kwargs.items() if name != "labels"}
    args, kwargs = tree_map(moved, (batch.args, kwargs))
    return args, kwargs


class Tokens:
    """The tokens of some batches.

    Args:
        batches: all of them, from which is read how their masks are meant.
        model: whose forward's arguments they are.
    """

    def __init__(self, batches: Sequence[Batch], model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        masks = [self._named(batch).get("attention_mask") for batch in batches]
        self._how = convention([m for m in masks if isinstance(m, Tensor)], marks_padding=False)

    def ids(self, batch: Batch) -> Tensor:
        """Token ids ``[batch, tokens]``, on the CPU.

        Raises:
            CalibrationError: the batch has none.
        """
        ids = self._named(batch).get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise CalibrationError(
                f"batch {batch.index} has no input_ids [batch, tokens], which are what the models "
                "predict; give token ids, not embeddings"
            )
        return ids.cpu()

    def counted(self, batch: Batch, sequences: int, length: int) -> Tensor | None:
        """Whether each token counts, ``[sequences, length]``, on the CPU.

        None where the batch has a mask that does not say it of so many tokens.
        """
        mask = self._named(batch).get("attention_mask")
        if not isinstance(mask, Tensor):
            return torch.ones(sequences, length, dtype=torch.bool)
        found = counted_tokens(mask, sequences, length, self._how)
        return None if found is None else found.cpu()

    def predicted(self, batch: Batch) -> Tensor:
        """Whether a token and the one that follows it count, ``[batch, tokens - 1]``.

        Raises:
            CalibrationError: the mask has a form that does not say.
        """
        ids, labels = self.ids(batch), self._named(batch).get("labels")
        counts = self.counted(batch, ids.shape[0], ids.shape[1])
        if counts is None:
            raise CalibrationError(
                f"the attention_mask of batch {batch.index} does not say which tokens count; "
                "give one of [batch, tokens] with 1 for those that do"
            )
        found = counts[:, :-1] & counts[:, 1:]
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            found &= (labels[:, 1:] != IGNORED).cpu()
        return found

    def _named(self, batch: Batch) -> dict[str, Any]:
        return dict(self._signature.bind_partial(*batch.args, **batch.kwargs).arguments)
