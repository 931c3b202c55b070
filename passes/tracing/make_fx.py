"""One call of a model → its aten graph, by make_fx: what was run is what was traced.

Nothing in the model's Python code has to be understood, so that every model that runs is traced;
but what the code decided from the values of tensors is baked in. A graph is therefore right for the
very inputs it was made with, and for others only where it provably looked at no value.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from magr_fx.errors import TraceError, first_line
from magr_fx.machine.addresses import address
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.quiet import torch_unlogged
from magr_fx.passes.graphs.module_calls import CALLS
from magr_fx.passes.graphs.torch_private import TreeSpec, schema_of, tree_leaves
from magr_fx.passes.graphs.unsupported_weights import has_strides
from magr_fx.passes.graphs.vmap import in_transform, is_batched, run_inside, unwrapped
from magr_fx.passes.inputs.tensors_only import TensorsOnly
from magr_fx.passes.tracing.module_state import attributes_kept

# What reads values without an op that says so.
_READERS = frozenset(
    {
        "__array__",
        "__format__",
        "__repr__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__dlpack__",
        "__float__",
        "__index__",
        "__int__",
        "data_ptr",
        "is_nonzero",
        "item",
        "numpy",
        "storage",
        "tolist",
        "untyped_storage",
    }
)
_MAKERS = frozenset({"as_tensor", "asarray", "tensor"})  # which read what they are given
_READING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def run_and_trace(
    model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec
) -> tuple[fx.GraphModule, bool]:
    """The graph of ``model`` as a function of the tensors among ``leaves``, all else frozen.

    Args:
        model: its Parameter objects become the graph's own.
        index: the place of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Returns:
        The graph, and whether it holds for any inputs of the same shapes and dtypes: whether the
        model looked at no tensor's values on its way.

    Raises:
        TraceError: the model itself does not run, or works in a way that make_fx does not follow.
    """
    stored = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # What has no strides cannot be an argument: the graph has it as a constant.
    traced = {name: tensor for name, tensor in stored.items() if has_strides(tensor)}
    function = TensorsOnly(model, leaves, spec)
    function.training = False  # as the model is already
    # Copies: the model may work in place on its inputs, which are the caller's tensors.
    # One copy of each, since self-attention, for one, asks which are the same.
    copies = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    inputs = [copies[id(leaf)] for leaf in leaves if isinstance(leaf, torch.Tensor)]
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            compiled_parts_run(),
            torch_unlogged(),
            attributes_kept(model) as held,
            traceback.preserve_node_meta(),
            _module_paths(model),
            (seen := OpsSeen([*stored.values(), *held])).values_kept(),
            _FunctionsSeen(seen),
            seen,
        ):
            graph_module = _make_fx(function, list(traced.values()), inputs)
    except Exception as error:  # whatever the model's own code raises
        if is_out_of_memory(error):
            raise
        remedy = "check that the model itself runs on this batch"
        if "flex_attention" in str(error):
            remedy = 'take another attention: attn_implementation="sdpa" or "eager"'
        raise TraceError(
            f"{type(model).__name__} cannot be run and traced with calibration batch {index}: "
            f"{type(error).__name__}: {first_line(error)} — {remedy}"
        ) from error
    graph_module = _with_attributes(graph_module, traced)
    graph_module.meta[CALLS] = tuple(function.log.calls)
    return graph_module, not seen.reads_values


@contextlib.contextmanager
def nothing_kept(model: nn.Module) -> Iterator[OpsSeen]:
    """Run the model without a trace: its attributes and its tensors' values are as they were.

    What it yields sees the ops that read values; with :class:`ReadersSeen`, all that reads them.
    """
    with attributes_kept(model) as held:
        seen = OpsSeen([*model.parameters(), *model.buffers(), *held])
        with seen.values_kept(), seen:
            yield seen


def compiled_parts_run() -> contextlib.AbstractContextManager[Any]:
    """Let what is compiled inside a model run as it was written, where torch would refuse it."""
    from torch._dynamo import config

    patched: contextlib.AbstractContextManager[Any] = config.patch(error_on_nested_fx_trace=False)
    return patched


def _make_fx(
    function: Callable[..., Any], own: list[torch.Tensor], inputs: list[torch.Tensor]
) -> fx.GraphModule:
    """Everything private that this relies on: make_fx's arguments.

    Before dispatch, ops are those of torch.export (linear, not mm); what depends on data is
    baked in instead of refused. ``own`` are the tensors that the function reads by itself: as
    arguments they become placeholders, each once.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(_: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        return function(*inputs)

    trace = make_fx(
        run,
        tracing_mode="real",
        pre_dispatch=True,
        _error_on_data_dependent_ops=False,
    )
    graph_module: fx.GraphModule = trace(own, inputs)
    return graph_module


def _with_attributes(
    graph_module: fx.GraphModule, stored: dict[str, torch.Tensor]
) -> fx.GraphModule:
    """The graph with the model's tensors as attributes, where the trace has them as arguments."""
    graph = graph_module.graph
    _erase_vmapped(graph_module)
    attributes: dict[str, Any] = {
        str(node.target): getattr(graph_module, str(node.target))
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    placeholders = graph.find_nodes(op="placeholder")
    for node, (name, tensor) in zip(placeholders, stored.items(), strict=False):
        if node.users:
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", f"stored.{name}", name=node.name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            attributes[f"stored.{name}"] = tensor
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(attributes, graph)


def _erase_vmapped(graph_module: fx.GraphModule) -> None:
    """Erase what ran inside torch.vmap: its tensors are gone, and its result is a constant."""
    inside: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        value = getattr(graph_module, str(node.target)) if node.op == "get_attr" else None
        if is_batched(value) or not inside.keys().isdisjoint(node.all_input_nodes):
            inside[node] = None
    for node in reversed(inside):
        graph_module.graph.erase_node(node)


@contextlib.contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Note on each node the path of the module that it comes from, as torch.export does."""
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            enclosing: list[Any] = []

            def enter(
                module: nn.Module,
                args: Any,
                name: str = name,
                enclosing: list[Any] = enclosing,
            ) -> None:
                del args
                outer = traceback.current_meta.get("nn_module_stack")
                enclosing.append(outer)
                traceback.current_meta["nn_module_stack"] = {
                    **(outer or {}),
                    name: (name, type(module)),
                }

            def leave(
                module: nn.Module, args: Any, output: Any, enclosing: list[Any] = enclosing
            ) -> None:
                del module, args, output
                traceback.current_meta["nn_module_stack"] = enclosing.pop()

            before = module.register_forward_pre_hook(enter)
            after = module.register_forward_hook(leave)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


class OpsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every op: whether it reads values, and which stored tensor it writes to."""

    supports_higher_order_operators = True

    def __init__(self, stored: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads_values = False
        stored = [tensor for tensor in stored if tensor.layout is torch.strided]
        self.parameters = {address(t) for t in stored if isinstance(t, nn.Parameter)} - {None}
        self._stored: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in stored:
            at = address(tensor)
            if at is not None:
                self._stored[at].append(tensor)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.index.Tensor:  # tagged for what only a mask does
            masks = (torch.bool, torch.uint8)
            self.reads_values |= any(i is not None and i.dtype in masks for i in args[1])
        else:
            tags = getattr(func, "tags", ())
            self.reads_values |= any(tag in tags for tag in _READING_TAGS)
        if _may_write(func):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    self._keep(tensor)
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def values_kept(self) -> Iterator[None]:
        """Restore, at the end, what was written to."""
        try:
            yield
        finally:
            for tensor, values in self._kept:
                tensor.copy_(values)

    def _keep(self, written: torch.Tensor) -> None:
        at = address(written)
        for tensor in () if at is None else self._stored.pop(at, ()):
            self._kept.append((tensor, tensor.detach().clone()))


class ReadersSeen(TorchFunctionMode):
    """Sees what reads values without an op."""

    def __init__(self, seen: OpsSeen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = getattr(func, "__name__", "")
        given = name in _MAKERS and any(isinstance(x, torch.Tensor) for x in tree_leaves(args))
        self.seen.reads_values |= name in _READERS or given
        return func(*args, **(kwargs or {}))


class _FunctionsSeen(ReadersSeen):
    """Also takes care of what runs inside a transform of torch.func."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if in_transform():
            self.seen.reads_values = True  # what comes out of it is a constant of the graph
            self._refuse_weights((args, kwargs))
            result = run_inside(func, args)
            if result is not NotImplemented:
                return result
        return super().__torch_function__(func, types, args, kwargs)

    def _refuse_weights(self, arguments: Any) -> None:
        for leaf in tree_leaves(arguments):
            if not isinstance(leaf, torch.Tensor):
                continue
            if address(unwrapped(leaf)) in self.seen.parameters:
                raise TraceError(
                    "it reads a weight inside torch.vmap (or another transform of torch.func), "
                    "which make_fx does not follow"
                )


def _may_write(func: Any) -> bool:
    """Whether the op may write to an argument; batch_norm, which may, does not say so."""
    schema = schema_of(func)
    return schema is not None and (schema.is_mutable or "batch_norm" in schema.name)
