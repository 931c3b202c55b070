"""compare(original, quantized, batches): both run on the same inputs, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from magr_fx.comparing.inputs import running, text_arguments
from magr_fx.comparing.model_size import model_size
from magr_fx.comparing.next_token import NextToken, predicts_next_token
from magr_fx.comparing.outputs import compare_outputs, outputs_of
from magr_fx.comparing.texts import check_predictable, compare_text
from magr_fx.errors import CalibrationError, ModelError
from magr_fx.machine.ranks import ALONE, Ranks, distributed_session
from magr_fx.passes.graphs.trace import calibration_mode, unwrap
from magr_fx.passes.inputs.calibration import Batch, read_calib
from magr_fx.passes.offloading.offloaded import execution_device, is_offloaded
from magr_fx.passes.offloading.sharded import is_sharded
from magr_fx.passes.tracing.module_state import state_kept
from magr_fx.reporting.comparison import Comparison


def compare(
    original: nn.Module, quantized: nn.Module, batches: Any, *, progress: bool | None = None
) -> Comparison:
    """How far a quantized model is from the original, on the same inputs.

    For transformers' causal language models: the divergence KL(original ‖ quantized) of the next
    token's distribution, perplexities, and how often the most probable token is the same. For any
    other module: cosine and relative error of its outputs. Tokens that the attention_mask leaves
    out do not count. Logits are computed for some tokens at a time.

    Several ranks of torch.distributed share the batches, and all return the same. A model may be
    offloaded by accelerate. Both models are left as they are.

    Args:
        original: the model before quantization, such as ``copy.deepcopy(model)`` before
            :func:`magr_fx.magr_quantize`, which changes ``model`` in place.
        quantized: the same architecture and vocabulary.
        batches: inputs as for calibration: a tensor of token ids ``[batch, tokens]``, a tuple, or a
            dict each. For a language model a label of -100 leaves a token out as well.
        progress: whether to show a bar; None shows it on a terminal.

    Raises:
        CalibrationError: the batches are no inputs, or no token of them counts.
        ModelError: both are one and the same model, have different vocabularies or outputs, give
            NaN (the message names the window), do not run, or are sharded over ranks.
    """
    _check(original, quantized)
    first, second = unwrap(original), unwrap(quantized)
    with distributed_session() as ranks:
        read = _read(batches, first)
        with _undisturbed(first), _undisturbed(second):
            text = outputs = None
            if predicts_next_token(first) and predicts_next_token(second):
                whole = NextToken(first)

                def hidden(at: int) -> Any:
                    with running(first, read[at]):
                        return whole.hidden(text_arguments(read[at], first))

                text = compare_text(whole, hidden, second, read, ranks, progress)
            else:

                def outputs_before(at: int) -> list[tuple[str, Tensor]]:
                    return outputs_of(first, read[at])

                outputs = compare_outputs(outputs_before, first, second, read, ranks, progress)
    return Comparison(text, outputs, model_size(second), model_size(first))


class Reference:
    """What a model makes of some batches before it is quantized, to be compared with afterwards.

    Of a causal language model the hidden states of all tokens are kept, and a copy of its head; of
    any other module its outputs.

    Args:
        model: any.
        batches: as for :func:`compare`.
        ranks: which share the batches.
    """

    def __init__(self, model: nn.Module, batches: Any, ranks: Ranks = ALONE) -> None:
        inner = unwrap(model)
        self._model, self._batches, self._ranks = inner, _read(batches, inner), ranks
        self._size = model_size(inner)
        self._head: NextToken | None = None
        with _undisturbed(inner):
            if predicts_next_token(inner):
                check_predictable(self._batches, inner)
                whole = NextToken(inner)
                self._known = self._each(lambda batch: whole.hidden(text_arguments(batch, inner)))
                self._head = whole.head()
            else:
                self._known = self._each(lambda batch: outputs_of(inner, batch))

    def _each(self, run: Callable[[Batch], Any]) -> list[Any]:
        """Of every batch that this rank owns, what ``run`` makes of it."""
        found: list[Any] = [None] * len(self._batches)
        for at, batch in enumerate(self._batches):
            if self._ranks.owns(at):
                with running(self._model, batch):
                    found[at] = run(batch)
        return found

    def against(self, model: nn.Module, progress: bool | None = None) -> Comparison:
        """Compare what the model is by now with what it was; see :func:`compare`."""
        ranks = self._ranks
        inner, known, batches = unwrap(model), self._known.__getitem__, self._batches
        text = outputs = None
        with _undisturbed(inner):
            if self._head is not None:
                text = compare_text(self._head, known, inner, batches, ranks, progress)
            else:
                outputs = compare_outputs(known, inner, inner, batches, ranks, progress)
        return Comparison(text, outputs, model_size(inner), self._size)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; what forward changes in the model is undone."""
    kept = contextlib.nullcontext() if is_offloaded(model) else state_kept(model)
    with calibration_mode(model), kept:
        yield


def _check(original: nn.Module, quantized: nn.Module) -> None:
    for model in (original, quantized):
        if not isinstance(model, nn.Module):
            raise ModelError(f"a model must be a torch.nn.Module, got {type(model).__name__}")
    original, quantized = unwrap(original), unwrap(quantized)
    if original is quantized:
        raise ModelError(
            "both models are one and the same: magr_quantize and quantize_ change a model in "
            "place, so keep a copy of the original, copy.deepcopy(model), before"
        )
    for model in (original, quantized):
        if is_sharded(model):
            raise ModelError(
                f"{type(model).__name__} is sharded over ranks (DTensor, FSDP2), and is run in "
                "parts here: compare the gathered models"
            )


def _read(batches: Any, model: nn.Module) -> list[Batch]:
    device = (execution_device(model) or torch.device("cpu")) if is_offloaded(model) else None
    try:
        return read_calib(batches, model, device)
    except CalibrationError as error:
        raise CalibrationError(f"of the batches to compare the models on: {error}") from error
