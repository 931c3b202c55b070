"""What a model takes in memory, and bits for each of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, fx, nn

from magr_fx.reporting.comparison import ModelSize


def model_size(model: nn.Module) -> ModelSize:
    """Count each parameter and buffer once; a quantized tensor is what it is made of.

    Args:
        model: any; weights that are offloaded count as what they are when they are loaded.
    """
    memory = sum(t.nbytes for t in _plain(chain(model.parameters(), model.buffers())))
    held: list[Tensor] = [*model.parameters()]
    if isinstance(model, fx.GraphModule):  # of PT2E, which holds codes as buffers
        held += [*model.buffers()]
    matrices = [tensor for tensor in held if tensor.dim() > 1]
    weights = sum(matrix.numel() for matrix in matrices)
    own = sum(part.nbytes for part in _plain(iter(matrices)))
    return ModelSize(memory, None, weights, 8 * own / weights if weights else 0.0)


def _plain(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    """The ordinary tensors that these are made of, each once."""
    seen: set[tuple[int, int]] = set()
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            pending += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        elif tensor.is_meta or (key := (tensor.data_ptr(), tensor.nbytes)) not in seen:
            if not tensor.is_meta:
                seen.add(key)
            yield tensor
