"""A weight that torchao is to quantize, and where the model holds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from magr_fx.passes.known_layers.as_linears import Rebuilt


class Place(NamedTuple):
    """An attribute of a module that holds a weight; a tied weight has several places."""

    module: nn.Module
    key: str
    name: str

    @property
    def is_linear(self) -> bool:
        """Whether ``quantize_`` quantizes it by default."""
        return (
            self.key == "weight"
            and isinstance(self.module, nn.Linear)
            # The class that nn.MultiheadAttention gives its out_proj to keep quantizers away.
            and not isinstance(self.module, NonDynamicallyQuantizableLinear)
        )


class QuantizableWeight(NamedTuple):
    """A weight that torchao is to quantize.

    It is a whole parameter with all places that hold it. Or it is a slice of a parameter, or stored
    transposed: then ``rebuilt`` is the module to be replaced by the same with nn.Linear, and
    ``path`` the linear in it that will hold the weight.
    """

    name: str
    weight: torch.Tensor
    places: list[Place]
    rebuilt: Rebuilt | None = None
    path: str = ""
    covers: tuple[str, ...] = ()  # the names of its matrices, if it is a stack

    @property
    def is_linear(self) -> bool:
        return all(place.is_linear for place in self.places)
