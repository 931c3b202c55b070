"""rewritten model → PT2E: export, prepare with the user's quantizer, calibrate, convert."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from magr_fx.errors import (
    CalibrationError,
    ConfigError,
    HandoverError,
    MagRError,
    ModelError,
    TraceError,
    first_line,
)
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.quiet import torch_silenced
from magr_fx.passes.graphs.torch_private import tree_flatten, tree_leaves, tree_map, tree_unflatten
from magr_fx.passes.graphs.trace import GUARDS, attributes
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import own_arguments
from magr_fx.passes.tracing.trace_batches import bind

IMAGE_DIMS = 4  # an input with at least this many dimensions counts as images or volumes


def is_pt2e_quantizer(target: object) -> bool:
    """Whether ``target`` is a PT2E quantizer, such as X86InductorQuantizer."""
    return isinstance(target, Quantizer)


def export_for_pt2e(
    model: nn.Module, batches: list[Batch]
) -> tuple[fx.GraphModule, InputCheck, list[Batch]]:
    """Export the model for PT2E: its graph, a check of the graph's inputs, and the batches.

    The graph is called like the model, and shares its parameters, so that a weight that is
    rewritten in place changes in both. A model that is an exported graph is used as it is.

    Raises:
        CalibrationError: the batches differ in their arguments, dtypes, devices or numbers of
            dimensions, of which one graph takes only one kind.
        TraceError: torch.export refused the model.
    """
    batches = [Batch(b.index, b.args, _keywords(model, b.kwargs)) for b in batches]
    forms = [_form(batch) for batch in batches]
    other = next((at for at, form in enumerate(forms) if form != forms[0]), None)
    if other is not None:
        raise CalibrationError(
            f"calibration batch {batches[other].index} has other arguments than batch "
            f"{batches[0].index}, or arguments of other types; PT2E quantizes one graph, so give "
            "all batches the same arguments, with the same dtypes and numbers of dimensions"
        )
    if isinstance(model, fx.GraphModule):
        return model, InputCheck(model), batches
    # Sizes of 1 cannot be made dynamic: trace the batch that has the fewest of them.
    first = max(batches, key=lambda batch: sum(n > 1 for t in _tensors(batch) for n in t.shape))
    open_sizes = _open_sizes(batches)
    try:
        graph_module = _export(model, first, open_sizes)
    except Exception as error:  # the model's own code can raise anything
        if is_out_of_memory(error):
            raise
        raise TraceError(
            f"PT2E needs the graph of torch.export, which refuses {type(model).__name__}: "
            f"{type(error).__name__}: {first_line(error)}; use a torchao "
            "config as target instead"
        ) from error
    check = InputCheck(graph_module)
    names = dict.fromkeys(str(size) for one in check.expected for size in one.sizes)
    for size in filter(str.isidentifier, names):
        alone = _with_a_size_of_one(model, graph_module, first, check.expected, size, open_sizes)
        if alone is not None:
            check.others.append(alone)
    return graph_module, check, batches


def _open_sizes(batches: list[Batch]) -> list[set[int]]:
    """For each tensor of a batch, the dimensions that are dynamic in the graph.

    These are all dimensions, since the graph will be called with other lengths than those of the
    calibration. For images they are only the first one, and those in which the batches differ: with
    all dimensions dynamic, models of images can take minutes to trace.
    """
    tensors = [_tensors(batch) for batch in batches]
    dims = [set(range(t.dim() if t.dim() < IMAGE_DIMS else 1)) for t in tensors[0]]
    for others in tensors[1:]:
        for found, one, other in zip(dims, tensors[0], others, strict=True):
            sizes = zip(one.shape, other.shape, strict=True)
            found.update(dim for dim, (a, b) in enumerate(sizes) if a != b)
    return dims


def _export(model: nn.Module, batch: Batch, open_sizes: list[set[int]]) -> fx.GraphModule:
    dims = {
        id(tensor): {dim: torch.export.Dim.AUTO for dim in found if tensor.shape[dim] > 1}
        for tensor, found in zip(_tensors(batch), open_sizes, strict=True)
    }
    shapes = tree_map(lambda value: dims.get(id(value)), bind(model, batch))
    with torch_silenced():
        exported = torch.export.export(
            model, batch.args, batch.kwargs, dynamic_shapes=shapes, strict=False
        )
    return exported.module()


def _with_a_size_of_one(
    model: nn.Module,
    graph_module: fx.GraphModule,
    batch: Batch,
    expected: list[_Expected],
    size: str,
    open_sizes: list[set[int]],
) -> InputCheck | None:
    """A check for inputs with a 1 in place of a dynamic size; None if the graph may be wrong there.

    A graph is traced with dynamic sizes of 2 or more. So the model is exported once more with the
    1. If the graph computes the same as the model there, that export's guards are the check.
    """
    leaves, spec = tree_flatten((batch.args, batch.kwargs))
    if len(leaves) != len(expected):
        return None
    for at, one in enumerate(expected):
        for dim, name in enumerate(one.sizes):
            if name == size:
                leaves[at] = leaves[at].narrow(dim, 0, 1)
    args, kwargs = tree_unflatten(leaves, spec)
    narrow = Batch(batch.index, *own_arguments((args, kwargs)))
    try:
        check = InputCheck(_export(model, narrow, open_sizes))
        with torch_silenced():
            outputs = [
                [
                    leaf
                    for leaf in tree_leaves(run(*args, **kwargs))
                    if isinstance(leaf, torch.Tensor)
                ]
                for run in (graph_module, model)
                for args, kwargs in [own_arguments((narrow.args, narrow.kwargs))]
            ]
    except Exception as error:  # the model, or its graph, fails with a 1 there
        if is_out_of_memory(error):
            raise
        return None
    same = all(
        one.shape == other.shape and torch.allclose(one, other, equal_nan=True)
        for one, other in zip(*outputs, strict=False)
    )
    return check if same and len(outputs[0]) == len(outputs[1]) else None


def _tensors(batch: Batch) -> list[torch.Tensor]:
    leaves = tree_leaves((batch.args, batch.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def try_quantizer(
    name: str,
    graph_module: fx.GraphModule,
    check: InputCheck,
    quantizer: Quantizer,
    batches: list[Batch],
) -> None:
    """Do all steps once on a copy of the graph, so that errors come before anything is changed.

    Raises:
        ConfigError: the quantizer, or torchao, fails with this model or this calibration.
        CalibrationError, HandoverError: as in :func:`quantize_graph`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own code to copy a graph warns
        graph_module = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    with contextlib.suppress(Exception):  # a quantizer that cannot be copied is used twice
        quantizer = copy.deepcopy(quantizer)
    try:
        with torch_silenced():  # a graph prints the line that fails
            quantize_graph(graph_module, check, quantizer, batches)
    except HandoverError as error:
        raise HandoverError(f"{error}. Nothing was changed") from error
    except MagRError:
        raise
    except Exception as error:  # torchao and the graph can raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"PT2E cannot quantize {name} with {type(quantizer).__name__} and this "
            f"calibration: {type(error).__name__}: {first_line(error)}. "
            "Nothing was changed; use a torchao config as target instead"
        ) from error


def quantize_graph(
    graph_module: fx.GraphModule, check: InputCheck, quantizer: Quantizer, batches: list[Batch]
) -> fx.GraphModule:
    """Prepare, calibrate and convert the graph, which has the model's rewritten weights.

    The result refuses inputs that the graph is wrong for, see :class:`InputCheck`. The batches
    are not changed.

    Raises:
        CalibrationError: the graph is not right for a batch.
        HandoverError: the quantizer changed nothing in the graph.
    """
    check.put_into(graph_module)
    prepared = prepare_pt2e(graph_module, quantizer)
    for batch in batches:
        args, kwargs = own_arguments((batch.args, batch.kwargs))
        try:
            prepared(*args, **kwargs)
        except ModelError as error:  # of InputCheck
            raise CalibrationError(f"calibration batch {batch.index}: {error}") from error
    converted: fx.GraphModule = convert_pt2e(prepared)
    check.put_into(converted)
    if not any("dequantize" in str(node.target) for node in converted.graph.nodes):
        raise HandoverError(
            f"{type(quantizer).__name__} quantized nothing in the graph; give it a configuration "
            "first, for example with set_global"
        )
    return converted


class _Expected(NamedTuple):
    """One input: a tensor's dtype and sizes (symbols by their names), or a constant."""

    dtype: torch.dtype | None
    sizes: tuple[int | str, ...] = ()
    constant: Any = None

    @classmethod
    def of(cls, value: Any) -> _Expected:
        if not isinstance(value, torch.Tensor):
            return cls(None, constant=value)
        # Export may have specialised a dynamic size to a number.
        names = (str(size) for size in value.shape)
        return cls(value.dtype, tuple(int(n) if n.isdigit() else n for n in names))

    def fits(self, leaf: Any, sizes: dict[str, int]) -> bool:
        if self.dtype is None:
            return type(leaf) is type(self.constant) and leaf == self.constant
        if not isinstance(leaf, torch.Tensor) or leaf.dtype != self.dtype:
            return False
        pairs = zip(self.sizes, leaf.shape, strict=False)
        return leaf.dim() == len(self.sizes) and all(
            # Dynamic sizes are traced as 2 or more: a 1 may broadcast or squeeze differently.
            size == given if isinstance(size, int) else 2 <= given == sizes.setdefault(size, given)
            for size, given in pairs
        )

    def __str__(self) -> str:
        if self.dtype is None:
            return repr(self.constant)
        return f"{self.dtype} ({', '.join(map(str, self.sizes))})"


class InputCheck(nn.Module):
    """A module in the graph that refuses inputs that the graph would compute wrong results for.

    A graph has constants where the model's code branched on a size, or on an argument that is not a
    tensor. torch.export says which inputs the graph is right for: by the sizes of its placeholders,
    and by its guards.

    Args:
        graph_module: made by torch.export, and not changed since.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        values = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
        self.expected = [_Expected.of(value) for value in values]
        self.guards: Any = getattr(graph_module, GUARDS, None)
        self.others: list[InputCheck] = []  # checks for further inputs that the graph is right for

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *leaves: Any) -> None:
        """Raise :class:`ModelError` for inputs that the graph is not right for.

        If the graph is exported again, comparisons with symbolic sizes in here become its guards.
        """
        if len(leaves) != len(self.expected) or not self.fits(leaves):
            given = ", ".join(str(_Expected.of(leaf)) for leaf in leaves)
            forms = [", ".join(map(str, one.expected)) for one in (self, *self.others)]
            raise ModelError(
                f"the quantized graph was made for inputs of [{'] or ['.join(forms)}], with every "
                f"open size at least 2, and is not right for [{given}]: its calibration had none "
                "of these sizes, types or values. Quantize the model again, with calibration "
                "batches like this input or of different sizes"
            )

    def put_into(self, graph_module: fx.GraphModule) -> None:
        """Insert the check at the start of the graph, in place of torch.export's own guards."""
        graph = graph_module.graph
        setattr(graph_module, GUARDS, self)
        for node in graph.find_nodes(op="call_module", target=GUARDS):
            graph.erase_node(node)
        inputs = graph.find_nodes(op="placeholder")
        if inputs:  # before any other node: nodes that quantize an input raise other errors
            with graph.inserting_after(inputs[-1]):
                graph.call_module(GUARDS, tuple(inputs))
        graph_module.recompile()

    def fits(self, leaves: tuple[Any, ...]) -> bool:
        """Whether the graph is right for these inputs."""
        return self._fits(leaves) or any(other.fits(leaves) for other in self.others)

    def _fits(self, leaves: tuple[Any, ...]) -> bool:
        sizes: dict[str, int] = {}
        if not all(e.fits(leaf, sizes) for e, leaf in zip(self.expected, leaves, strict=True)):
            return False
        try:
            if self.guards is not None:
                self.guards(*leaves)
        except AssertionError:  # raised by torch.export's guards
            return False
        return True


def still_read(graph_module: fx.GraphModule) -> set[int]:
    """The ids of the tensors that the graph reads unquantized."""
    return {id(tensor) for tensor in attributes(graph_module)}


def _keywords(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments to export with, in the order of ``forward``'s parameters.

    The graph can be called with them as positional arguments too, in this order.
    ``use_cache=False`` is left out: the cache is off during calibration anyway, and every later
    call would have to give the argument.
    """
    places = {name: at for at, name in enumerate(inspect.signature(model.forward).parameters)}
    names = sorted(kwargs, key=lambda name: places.get(name, len(places)))
    return {k: kwargs[k] for k in names if not (k == "use_cache" and kwargs[k] is False)}


def _form(batch: Batch) -> Any:
    leaves, spec = tree_flatten((batch.args, batch.kwargs))
    kinds = [
        (x.dtype, x.dim(), x.device) if isinstance(x, torch.Tensor) else repr(x) for x in leaves
    ]
    return kinds, spec
