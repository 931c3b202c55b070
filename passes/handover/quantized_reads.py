"""Check that the model's code runs, and computes right, with torchao's tensors as weights.

torchao's tensors run in ``F.linear(x, weight, bias)`` and in few other functions, and a graph does
not show how code reads a weight. So the model is run, and each function that reads a weight is
called twice more: with torchao's tensor, and with that tensor dequantized. The model itself goes on
with its own weights. So one run checks all weights, and holds few quantized copies at a time.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from magr_fx.machine.memory import is_out_of_memory
from magr_fx.passes.graphs.torch_private import (
    TreeSpec,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
)
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.graphs.vmap import in_transform
from magr_fx.passes.handover.target import ConfigOf
from magr_fx.passes.handover.torchao_rounding import dequantized, quantized_copy
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import PLAIN, own_arguments
from magr_fx.passes.offloading.resident import Resident, all_resident
from magr_fx.passes.tracing.module_state import attributes_kept

KEPT = 2**28  # bytes of weights whose quantized copies are kept for the next read
# Largest ‖result - expected‖ / ‖expected‖: of activations, which a target may quantize as well, and
# of values that are computed from weights alone.
TOLERANCE, WEIGHT_TOLERANCE = 0.1, 1e-2


@dataclass(frozen=True)
class _StandIn:
    """For a weight, or a tensor computed from weights: torchao's tensor, and that dequantized."""

    names: tuple[str, ...]  # of the weights
    quantized: Tensor
    values: Tensor


class QuantizedReads(TorchFunctionMode):
    """Tries each read of a weight with torchao's tensor of it, while the model runs unchanged.

    Args:
        weights: name → the Parameter objects of this weight.
        config_of: the torchao config by the name of the weight.
        resident: loads weights that are offloaded.
        elsewhere: the storage addresses of the parameters that may be offloaded.

    Attributes:
        refused: name of a weight → why some code cannot use its quantized tensor.
        seen: the names of the weights that were read.
    """

    def __init__(
        self,
        weights: Mapping[str, Collection[Tensor]],
        config_of: ConfigOf,
        resident: Resident = all_resident,
        elsewhere: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}
        self.seen: set[str] = set()
        self._weights = {id(own): (name, own) for name, owns in weights.items() for own in owns}
        self._config_of, self._resident, self._elsewhere = config_of, resident, elsewhere
        self._copies: OrderedDict[str, _StandIn] = OrderedDict()  # least recently read first
        self._derived: Any = WeakTensorKeyDictionary()  # values of the model → stand-ins
        # The dtypes of the results of each kind of read.
        self._tried: dict[Any, list[torch.dtype | None]] = {}
        self._errors: list[tuple[tuple[str, ...], str, Tensor, float]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with self._in_memory(tensors):
            names = tuple(dict.fromkeys(name for t in tensors for name in self._names_of(t)))
            self.seen.update(names)
            if not names or not self.refused.keys().isdisjoint(names):
                return func(*args, **(kwargs or {}))
            # A read of a kind that was tried before is not tried again.
            key = (
                getattr(func, "__self__", None),
                _name(func),
                str(spec),
                *map(self._kind, leaves),
            )
            tried = None if key in self._tried else self._try(func, leaves, spec, names)
            own = func(*args, **(kwargs or {}))
        if key not in self._tried:
            if tried is None or not self._compare(func, names, own, *tried):
                return own
            results = tree_flatten(tried[0])[0]
            if not any(is_quantized(result) for result in results):
                self._tried[key] = [getattr(r, "dtype", None) for r in results]
        return _with_dtypes(own, self._tried.get(key))

    def end(self) -> None:
        """Refuse the weights whose results differ from those of the dequantized weights."""
        for names, what, error, tolerance in self._errors:
            if not float(error) <= tolerance:  # also for NaN
                self._refuse(names, f"the result of {what} is off by {float(error):.0%}")
        self._errors.clear()
        self._copies.clear()

    @contextlib.contextmanager
    def _in_memory(self, tensors: list[Tensor]) -> Iterator[None]:
        away = [t for t in tensors if self._elsewhere and _address(t) in self._elsewhere]
        with self._resident(away) if away else contextlib.nullcontext():
            yield

    def _names_of(self, tensor: Tensor) -> tuple[str, ...]:
        if id(tensor) in self._weights:
            return (self._weights[id(tensor)][0],)
        return self._derived[tensor].names if tensor in self._derived else ()

    def _kind(self, leaf: Any) -> Any:
        """What a read depends on beside the function; unknown objects count as different kinds."""
        if not isinstance(leaf, Tensor):
            return repr(leaf) if isinstance(leaf, PLAIN) else object()
        if id(leaf) in self._weights:
            return id(leaf)
        if leaf in self._derived:
            return object()
        return leaf.dtype, leaf.dim(), leaf.numel() == 0, str(leaf.device)

    def _stand_in(self, leaf: Any) -> _StandIn | None:
        if not isinstance(leaf, Tensor):
            return None
        if id(leaf) not in self._weights:
            return self._derived.get(leaf)  # type: ignore[no-any-return]
        name, own = self._weights[id(leaf)]
        if name not in self._copies:
            quantized = quantized_copy(own, self._config_of(name))
            values = dequantized(quantized).to(own.dtype)
            self._copies[name] = _StandIn((name,), quantized, values)
            room = KEPT
            for other, kept in reversed(list(self._copies.items())):
                room -= kept.values.nbytes
                if room < 0 and other != name:
                    del self._copies[other]
        self._copies.move_to_end(name)
        return self._copies[name]

    def _try(
        self, func: Any, leaves: list[Any], spec: TreeSpec, names: tuple[str, ...]
    ) -> tuple[Any, Any] | None:
        """The function's results for torchao's tensors, and for these dequantized."""
        is_linear = func is functional.linear
        # Of F.linear(x, weight) the result is not compared: its error is that of the target.
        plainly = is_linear and spec.children()[0].num_children > 1

        def call(which: str) -> Any:
            copies = {} if is_linear else {id(t): t.clone() for t in others}
            own = [
                leaf if s is None else getattr(s, which)
                for leaf, s in zip(leaves, stand_ins, strict=True)
            ]
            args, kwargs = tree_unflatten([copies.get(id(leaf), leaf) for leaf in own], spec)
            return func(*args, **kwargs)

        try:
            stand_ins = [self._stand_in(leaf) for leaf in leaves]
            # These are copied for each call: the function may change them in place.
            others = [
                leaf
                for leaf, s in zip(leaves, stand_ins, strict=True)
                if s is None and isinstance(leaf, Tensor)
            ]
            quantized = call("quantized")
            return quantized, quantized if plainly else call("values")
        except Exception as error:  # torchao can raise anything
            if is_out_of_memory(error):
                raise
            self._refuse(names, f"{_name(func)} fails ({brief(error)})")
            return None

    def _compare(
        self, func: Any, names: tuple[str, ...], own: Any, quantized: Any, wanted: Any
    ) -> bool:
        """Note the errors of torchao's results, and keep these as stand-ins for those in ``own``.

        ``wanted`` are the results with dequantized weights. Returns False if a weight is refused.
        """
        results, spec = tree_flatten(quantized)
        others, expected = tree_flatten(own)[0], tree_flatten(wanted)[0]
        if not len(results) == len(others) == len(expected):
            self._refuse(names, f"{_name(func)} returns another structure, {spec}")
            return False
        for result, value, right in zip(results, others, expected, strict=True):
            if not (isinstance(result, Tensor) and isinstance(value, Tensor)):
                if isinstance(result, (torch.Size, torch.dtype)) and result != value:
                    self._refuse(names, f"{_name(func)} returns {result} instead of {value}")
                    return False
                continue
            if result.shape != value.shape:
                shapes = f"{tuple(result.shape)} instead of {tuple(value.shape)}"
                self._refuse(names, f"{_name(func)} returns the shape {shapes}")
                return False
            made = is_quantized(result)
            # A weight that the function returns unchanged is known already.
            if made and id(value) not in self._weights:
                self._derived[value] = _StandIn(names, result, right)
            if result is not right and value.is_floating_point() and not in_transform():
                tolerance = WEIGHT_TOLERANCE if made else TOLERANCE
                error = _error(dequantized(result) if made else result, right)
                self._errors.append((names, _name(func), error, tolerance))
        return True

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            self.refused.setdefault(name, why)


def brief(error: Exception) -> str:
    """An error in one line of at most 120 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")


def run_apart(
    model: nn.Module,
    batch: Batch,
    stand_ins: Mapping[str, Tensor],
    device: torch.device | None = None,
) -> None:
    """Run the model once on copies of the batch and the buffers; the model is not changed.

    Args:
        model: in evaluation mode.
        batch: the arguments.
        stand_ins: name of a parameter → the tensor to use in its place.
        device: where to run; None is where the buffers are.

    Raises:
        Exception: whatever the model raises.
    """
    buffers = {
        name: buffer.clone() if device is None else buffer.to(device, copy=True)
        for name, buffer in model.named_buffers()
    }
    args, kwargs = own_arguments((batch.args, batch.kwargs))
    if device is not None:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
    with torch.compiler.set_stance("force_eager"), attributes_kept(model):
        torch.func.functional_call(model, {**buffers, **stand_ins}, args, kwargs, tie_weights=False)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # the tensor has no storage
        return 0


def _error(result: Tensor, expected: Tensor) -> Tensor:
    """‖result - expected‖ / ‖expected‖; equal elements count as 0, also Inf and NaN."""
    one, other = result.detach().float(), expected.detach().float()
    known = ~((one == other) | (one.isnan() & other.isnan()))
    one, other = one.where(known, 0), other.where(other.isfinite(), 0)
    return (one - other.where(known, 0)).norm() / other.norm().clamp_min(1e-30)  # type: ignore[no-any-return]


def _with_dtypes(result: Any, dtypes: list[torch.dtype | None] | None) -> Any:
    """The model's own result in the dtypes that quantized weights would give."""
    leaves, spec = tree_flatten(result)
    if dtypes is None or not any(isinstance(leaf, Tensor) for leaf in leaves):
        return result
    return tree_unflatten(
        [
            leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ],
        spec,
    )


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(func.__self__, "__name__", name)
    return name
