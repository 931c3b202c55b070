"""Trace one call of a model to its aten graph, by make_fx: it records the ops that run.

make_fx does not analyse the model's Python code, so that it traces almost every model that runs.
But whatever the code decided from the values of tensors is fixed in the graph. A graph is therefore
right for the inputs that it was made with. It is right for others only if the model provably read
no tensor's values.
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

# Functions that read a tensor's values without an op that is tagged so.
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
_MAKERS = frozenset({"as_tensor", "asarray", "tensor"})  # which read the values of their arguments
_READING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def run_and_trace(
    model: nn.Module, index: int, leaves: list[Any], spec: TreeSpec
) -> tuple[fx.GraphModule, bool]:
    """Trace ``model`` as a function of the tensors in ``leaves``; other leaves are constants.

    Args:
        model: the graph uses its Parameter objects, not copies of them.
        index: the position of the batch in the calibration, for the error message.
        leaves, spec: the bound arguments of ``forward``, flattened.

    Returns:
        The graph, and whether it is right for all inputs of the same shapes and dtypes. It is if
        the model read no tensor's values.

    Raises:
        TraceError: the model itself does not run, or make_fx cannot trace it.
    """
    stored = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # A tensor without strides cannot be an argument of the graph: it becomes a constant.
    traced = {name: tensor for name, tensor in stored.items() if has_strides(tensor)}
    function = TensorsOnly(model, leaves, spec)
    function.training = False  # the model is in evaluation mode already
    # The inputs are the caller's tensors, and the model may write to them: it gets copies.
    # One copy of each object: self-attention, for example, checks which inputs are the same.
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
    except Exception as error:  # the model's own code may raise anything
        if is_out_of_memory(error):
            raise
        remedy = "check that the model itself runs on this batch"
        if "flex_attention" in str(error):
            remedy = 'use another attention: attn_implementation="sdpa" or "eager"'
        raise TraceError(
            f"{type(model).__name__} cannot be run and traced with calibration batch {index}: "
            f"{type(error).__name__}: {first_line(error)} — {remedy}"
        ) from error
    graph_module = _with_attributes(graph_module, traced)
    graph_module.meta[CALLS] = tuple(function.log.calls)
    return graph_module, not seen.reads_values


@contextlib.contextmanager
def side_effects_undone(model: nn.Module) -> Iterator[OpsSeen]:
    """Run the model without tracing it, and restore its attributes and its tensors' values.

    The mode that it yields notices ops that read values. Together with :class:`ReadersSeen` it
    notices every read of values.
    """
    with attributes_kept(model) as held:
        seen = OpsSeen([*model.parameters(), *model.buffers(), *held])
        with seen.values_kept(), seen:
            yield seen


def compiled_parts_run() -> contextlib.AbstractContextManager[Any]:
    """Let compiled functions in a model run uncompiled under make_fx; torch would refuse them."""
    from torch._dynamo import config

    patched: contextlib.AbstractContextManager[Any] = config.patch(error_on_nested_fx_trace=False)
    return patched


def _make_fx(
    function: Callable[..., Any], own: list[torch.Tensor], inputs: list[torch.Tensor]
) -> fx.GraphModule:
    """Call make_fx with its private arguments.

    With ``pre_dispatch`` the ops are those of torch.export (linear, not mm). Results that depend on
    data become constants instead of errors. ``own`` are the tensors that the function reads without
    being given them. They are passed as arguments, so that each becomes one placeholder.
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
    """The graph with the model's tensors as attributes; in the trace they are arguments."""
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
    """Erase nodes that ran inside torch.vmap: their result is a constant of the graph."""
    inside: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        value = getattr(graph_module, str(node.target)) if node.op == "get_attr" else None
        if is_batched(value) or not inside.keys().isdisjoint(node.all_input_nodes):
            inside[node] = None
    for node in reversed(inside):
        graph_module.graph.erase_node(node)


@contextlib.contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Record on each node the path of the module that it comes from, as torch.export does."""
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
    """Notices for every op whether it reads values, and which stored tensor it writes to."""

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
        if func is torch.ops.aten.index.Tensor:  # its tag holds for masks only
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
        """Restore, at the end, the stored tensors that an op wrote to."""
        try:
            yield
        finally:
            with torch.no_grad():  # whatever the caller's mode is
                for tensor, values in self._kept:
                    tensor.copy_(values)

    def _keep(self, written: torch.Tensor) -> None:
        at = address(written)
        for tensor in () if at is None else self._stored.pop(at, ()):
            self._kept.append((tensor, tensor.detach().clone()))


class ReadersSeen(TorchFunctionMode):
    """Notices functions that read values without an op."""

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
    """Also handles functions that run inside a transform of torch.func."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if in_transform():
            self.seen.reads_values = True  # its result becomes a constant of the graph
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
                    "the model reads a weight inside torch.vmap (or another transform of "
                    "torch.func), which make_fx cannot trace"
                )


def _may_write(func: Any) -> bool:
    """Whether the op may write to an argument; batch_norm may, but not by its schema."""
    schema = schema_of(func)
    return schema is not None and (schema.is_mutable or "batch_norm" in schema.name)
