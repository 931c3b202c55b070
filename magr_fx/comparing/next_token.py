"""A causal language model and a batch → logits, some tokens at a time.

A whole tensor of logits ``[batch, tokens, vocabulary]`` can be larger than the model: 2,048 tokens
of a vocabulary of 262,144 take 2 GB in float32. So the model's body runs once for a batch, and then
its head, with all that the model does around it (scales, caps), on one piece of the body's output
after the other.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from magr_fx.errors import ModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call


class _BodyHasRunError(Exception):
    """Raised by a hook, to leave out what the model would do with its body's output."""


class NextToken:
    """transformers' model of the next token of a text, as a body and a head.

    Args:
        model: for which :func:`predicts_next_token` holds.
        body: the part that returns the hidden states; found when it is not given.
    """

    def __init__(self, model: Any, body: Any = None) -> None:
        self.model, self._body = model, body

    @property
    def vocabulary(self) -> int:
        """How many logits a token has, or a few less: heads may be padded."""
        return len(self.model.get_output_embeddings().weight)

    def hidden(self, arguments: Arguments) -> Any:
        """The output of the body, which has ``last_hidden_state [batch, tokens, hidden]``.

        Raises:
            ModelError: no part of the model returns one.
        """
        bodies = [self._body] if self._body is not None else _bodies(self.model)
        ids = arguments[1]["input_ids"]
        for body in bodies:
            output = self._stopped_after(body, arguments)
            hidden = getattr(output, "last_hidden_state", None)
            # Not an encoder's of pictures: one state for each token.
            if isinstance(hidden, Tensor) and hidden.shape[:2] == ids.shape:
                self._body = body
                return output
        raise ModelError(
            f"no part of {type(self.model).__name__} returns one hidden state for each of the "
            f"{tuple(ids.shape)} tokens, from which its logits could be computed in pieces; "
            "compare its language model alone"
        )

    def logits(self, hidden: Any, part: tuple[slice, slice], arguments: Arguments) -> Tensor:
        """Logits ``[sequences, tokens, vocabulary]`` of a part of the batch.

        Args:
            hidden: what :meth:`hidden` returned, of this model or of the one that it is a head of.
            part: of the sequences, and of the tokens.
            arguments: of the model.
        """
        piece = copy.copy(hidden)
        piece.last_hidden_state = hidden.last_hidden_state[part]
        args, kwargs = arguments
        with self._body_gives(piece):
            logits: Tensor = self.model(*args, **kwargs).logits
        return logits

    def head(self) -> NextToken:
        """A copy of the model without its body, which stays what it is when that is quantized."""
        empty = nn.Module()
        return NextToken(copy.deepcopy(self.model, {id(self._body): empty}), empty)

    def _stopped_after(self, body: Any, arguments: Arguments) -> Any:
        """What this part of the model returns, when the model is called; None if it is not run."""
        seen: list[Any] = []

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> NoReturn:
            seen.append(output)
            raise _BodyHasRunError

        hook = body.register_forward_hook(stop)
        args, kwargs = arguments
        try:
            self.model(*args, **kwargs)
        except _BodyHasRunError:
            pass
        finally:
            hook.remove()
        return seen[0] if seen else None

    @contextlib.contextmanager
    def _body_gives(self, output: Any) -> Iterator[None]:
        """Let the body return this, whatever it is called with."""
        body: Any = self._body
        own = vars(body).get("forward")  # such as accelerate's
        body.forward = lambda *_args, **_kwargs: output
        try:
            yield
        finally:
            del body.forward
            if own is not None:
                body.forward = own


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a model is transformers' own for the next token of a text, with a body and a head."""
    return (
        isinstance(model, PreTrainedModel)
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.get_output_embeddings() is not None
        and bool(_bodies(model))
    )


def _bodies(model: Any) -> list[nn.Module]:
    """What may return the hidden states: in most models the first, in OPT and Llama 4 a later."""
    found = [model.base_model, model.get_decoder(), *model.children()]
    others = (model, model.get_output_embeddings())
    return [body for body in found if not any(body is other for other in others)]
