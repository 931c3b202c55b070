"""logits of two models → how far apart they are, for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScores(NamedTuple):
    """One number for each token that was predicted, ``[tokens]`` on the CPU.

    Attributes:
        divergence: KL(p ‖ q) = Σ p·(log p - log q) of the original's distribution p of the next
            token and the quantized model's q, in nats; float64.
        loss, loss_original: -log q and -log p of the token that follows, in nats; float64.
        same_top: whether both models hold the same token to be the most probable.
        probability_change: q - p of the token that follows; float64.
        window: the number of the window that it is in.
    """

    divergence: Tensor
    loss: Tensor
    loss_original: Tensor
    same_top: Tensor
    probability_change: Tensor
    window: Tensor

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The tokens of all parts, one after the other."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def token_scores(
    original: Tensor, quantized: Tensor, following: Tensor, window: Tensor
) -> TokenScores:
    """Compare two distributions of the next token, in float64.

    Equal logits give a divergence of exactly 0.

    Args:
        original, quantized: logits ``[tokens, vocabulary]``, of any dtype.
        following: the token that follows, ``[tokens]``.
        window: the number of the window that each token is in, ``[tokens]``.
    """
    log_p, log_q = (each.double().log_softmax(-1) for each in (original, quantized))
    p = log_p.exp()
    # A token that the original rules out (log p = -inf) adds nothing, whatever q says of it.
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_(min=0)
    at = following[:, None].to(log_p.device)
    loss_original, loss = (-each.gather(-1, at)[:, 0] for each in (log_p, log_q))
    return TokenScores(
        divergence.cpu(),
        loss.cpu(),
        loss_original.cpu(),
        (original.argmax(-1) == quantized.argmax(-1)).cpu(),
        ((-loss).exp() - (-loss_original).exp()).cpu(),
        window.cpu(),
    )
