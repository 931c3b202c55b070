"""rotate_transform and RotatePass: rotate the streams of a model before it is quantized."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from magr_fx.errors import ConfigError, ModelError
from magr_fx.machine.memory import out_of_memory_told
from magr_fx.passes.graphs.trace import unwrap
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.offloading.execution import is_offloaded_or_sharded
from magr_fx.passes.rewriting.check_model import check_model, check_not_frozen
from magr_fx.passes.rotating.rotate_model import rotate
from magr_fx.passes.tracing.trace_batches import Tracing
from magr_fx.reporting.rotation import Rotation

logger = logging.getLogger("magr_fx")
Model = TypeVar("Model", bound=nn.Module)


def rotate_transform(
    model: Model, calib: Any, *, seed: int = 0, untie: bool = False, trace: str = "auto"
) -> Model:
    """Rotate the streams of a model in place; its outputs stay, up to rounding.

    A stream x is a value that linears write and read, and that only additions and norms touch: the
    residual stream of a pre-norm transformer (R1), and the values of each head between v and o
    (R2). It becomes x·Q for a random orthogonal Q: weights ``[out, in]`` that write it become QᵀW,
    weights that read it W·Q, and embeddings E·Q. The weights of norms move into the linears behind
    them. Large weights are thereby spread over many smaller ones, which an integer grid fits
    better; nothing is added to the model (Liu et al., "SpinQuant", arXiv 2405.16406, R1 and R2;
    Q is not trained here). Everything is computed in float64.

    Hidden states and key-value caches are rotated as well: give ``calib`` inputs that make the
    model return what is to stay as it is. A stream that anything else touches is left alone.

    Args:
        model: any module that runs, compiled or not; not offloaded, sharded or quantized.
        calib: inputs of the model, as for :func:`magr_fx.magr_transform`: it is traced on them,
            and its outputs are compared on the first batch of each trace. Where they leave a weight
            unused, such as an expert that no token reaches, nothing is rotated.
        seed: of the random matrices.
        untie: give a head that shares its weight with an embedding a copy of its own, since the
            two can be rotated together only if no norm's weight has to be folded into one of them.
            It stays tied where that lets nothing be rotated, or would change an output.
        trace: as for :func:`magr_fx.magr_transform`.

    Returns:
        ``model`` itself, with ``model.magr_rotations``: a list of :class:`Rotation`, one for each
        stream that a weight reads, also of those that are left alone, with the reason.

    Raises:
        ConfigError: ``seed`` is no int from 0 to 2**63 - 1.
        ModelError: the model is offloaded or sharded, returns no tensor, or its outputs changed;
            it is as it was.
        CalibrationError, TraceError: as for :func:`magr_fx.magr_transform`.

    Example:
        >>> import torch
        >>> from magr_fx import rotate_transform
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> model = rotate_transform(model, [torch.randn(5, 8)])
        >>> [(stream.name, stream.block) for stream in model.magr_rotations if not stream.reason]
        [('1.weight', 16)]
    """
    with out_of_memory_told(lambda: None):
        inner = unwrap(model)
        rotations = _rotate(inner, calib, seed, Tracing(trace, all_experts=False), untie=untie)
    inner.magr_rotations = rotations  # type: ignore[assignment]
    return model


class RotatePass(PassBase):
    """:func:`rotate_transform` as a torch.fx pass; the graph keeps its nodes and Parameters.

    ``graph_module.meta["magr_rotations"]`` has the list of streams.

    Args:
        calib, seed: as for :func:`rotate_transform`.

    Raises:
        ModelError: the argument is not a GraphModule, or its outputs changed.
    """

    def __init__(self, calib: Any, *, seed: int = 0) -> None:
        self.calib, self.seed = calib, seed

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rotate the graph's weights; ``modified`` is True if there was a stream to rotate."""
        if not isinstance(graph_module, fx.GraphModule):
            raise ModelError(
                f"RotatePass takes a torch.fx GraphModule, got {type(graph_module).__name__}; "
                "call rotate_transform for a module that is not traced"
            )
        with out_of_memory_told(lambda: None):
            rotations = _rotate(graph_module, self.calib, self.seed, Tracing("auto"), untie=False)
        graph_module.meta["magr_rotations"] = rotations
        return PassResult(graph_module, modified=any(not found.reason for found in rotations))


def _rotate(
    model: nn.Module, calib: Any, seed: int, tracing: Tracing, *, untie: bool
) -> list[Rotation]:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be an int from 0 to 2**63 - 1, got {seed!r}")
    if is_offloaded_or_sharded(model):
        raise ModelError(
            "the model is offloaded or sharded: rotate it while it is in memory as a whole"
        )
    check_model(model, None)
    check_not_frozen(model)
    batches = read_calib(calib, model)
    rotations = rotate(model, batches, tracing, seed, untie=untie)
    done = [found for found in rotations if not found.reason]
    logger.info(
        "rotated %d of %d streams, %d parameters",
        *(len(done), len(rotations), sum(found.weights for found in done)),
    )
    return rotations
