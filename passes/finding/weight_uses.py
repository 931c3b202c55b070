"""Find every use of every parameter in a graph: matmuls that can be rewritten, and all others.

From each parameter the reader goes forward through the ops whose tensor inputs all derive from
weights. Through views, and through copies such as casts, a value can be traced back to the stored
weight; through other ops it cannot. A matmul of such a weight and anything else is a call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from magr_fx.passes.finding.operands import Route, Rows
from magr_fx.passes.finding.products import Product, is_product, product_of
from magr_fx.passes.graphs.torch_private import HigherOrderOperator, OperatorBase
from magr_fx.passes.graphs.trace import Trace, attribute, attributes, is_mutation, stored
from magr_fx.passes.graphs.unsupported_weights import why_unsupported
from magr_fx.passes.graphs.vmap import vmap_depth
from magr_fx.passes.graphs.weight_views import (
    COPIES,
    VIEWS,
    WeightView,
    matrices,
    picked_matrices,
    replay,
)

aten = torch.ops.aten

EMBEDDINGS = frozenset(
    {aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx}
)
_STEPS = VIEWS | COPIES  # the ops of a chain from parameter to weight
_PICKS = frozenset({aten.select.int, aten.unbind.int})  # ops that take one matrix of a stack
# Ops that read a tensor's shape or type, never its values.
_VALUE_FREE = frozenset({aten.sym_size.int, aten._assert_tensor_metadata.default})


@dataclass(frozen=True, eq=False)
class Call:
    """One matmul of a site: ``node`` multiplies the weight with the value of ``input``.

    The input's tokens are the rows of ``rows.of(input)``, ``[..., tokens, in]``. ``batch`` is the
    index of the input's part that is multiplied with this matrix of a stack (see ``matrices``).
    With a ``route`` it is the position of the matrix, and the route tells which rows go to it.
    """

    trace: Trace
    node: fx.Node
    input: fx.Node
    rows: Rows
    batch: tuple[int, ...]
    direct: bool  # aten.linear on the parameter itself, which torchao supports
    epoch: int  # number of in-place ops before the call: each may change the input
    route: Route | None = None
    stacked: bool = False  # one of the matrices of a stack, such as an expert

    @property
    def activation(self) -> tuple[object, ...]:
        """For calls with the same key, the input's value is read once."""
        return self.input, self.epoch, self.rows, self.route, None if self.route else self.batch

    @property
    def input_key(self) -> tuple[object, ...]:
        """Calls with the same key have the same activations, and so share a gram."""
        return *self.activation, self.batch

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose values are needed for the activations."""
        return (self.input,) if self.route is None else (self.input, self.route.node)


@dataclass(eq=False)
class Uses:
    """Everything that reads one parameter, over all traces."""

    calls: dict[WeightView, list[Call]] = field(default_factory=lambda: defaultdict(list))
    embedding: bool = False
    matmul: bool = False  # a matmul reads it, rewritable or not
    others: dict[str, None] = field(default_factory=dict)  # an ordered set of descriptions

    @property
    def is_read(self) -> bool:
        return bool(self.calls or self.embedding or self.others)


@dataclass(frozen=True, eq=False)
class _Derived:
    """A value computed from parameters alone: a chain of views of one, or a computation.

    ``index`` is the node whose value picks matrices from a stack. Then ``stack`` is the chain from
    the parameter to the stack, and ``chain`` starts from the picked matrices.
    """

    parameters: tuple[nn.Parameter, ...]
    chain: tuple[fx.Node, ...] = ()
    computed_by: str | None = None
    index: fx.Node | None = None
    stack: tuple[fx.Node, ...] = ()


class Reader:
    """Reads one graph from its first node to its last, and adds what it finds to ``uses``."""

    def __init__(self, trace: Trace, uses: defaultdict[int, Uses]) -> None:
        self._trace = trace
        self._uses = uses  # by the parameter's id
        self._derived: dict[fx.Node, _Derived] = {}
        self._fixed: set[fx.Node] = set()  # depend on neither weights nor inputs
        # Computed from weights and such values, or a weight after an in-place op. It cannot be
        # rewritten as a weight, but an input may be multiplied with it.
        self._mixed: dict[fx.Node, _Derived] = {}
        self._objects: set[fx.Node] = (
            set()
        )  # constants that are no tensors: a TreeSpec, a Generator
        self._epoch = 0
        self._vmaps = 0  # how many regions of torch.vmap the node is in

    def read(self) -> None:
        for node in self._trace.graph_module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(self._trace, node)
                if isinstance(value, nn.Parameter):
                    self._derived[node] = _Derived((value,))
                elif value is None and not self._read_inside(node):
                    self._objects.add(node)
                elif value is not None:
                    self._fixed.add(node)
            elif node.target not in _VALUE_FREE:
                weights = [n for n in node.all_input_nodes if n in self._derived]
                if weights:
                    self._read(node, weights)
                if node not in self._derived:
                    self._read_mixed(node, weights)
                self._epoch += is_mutation(node)
                self._vmaps += vmap_depth(node)

    def _read_mixed(self, node: fx.Node, weights: list[fx.Node]) -> None:
        """Follow values that depend on weights but not on inputs, up to a product with an input."""
        tensors = [n for n in node.all_input_nodes if _is_tensor(n) and n not in self._objects]
        mixed = [n for n in tensors if n in self._mixed]
        inputs = [n for n in tensors if not (n in self._mixed or n in self._fixed or n in weights)]
        if mixed and inputs and is_product(node):
            for weight in mixed:
                how = f"{_name(node)}, after {self._mixed[weight].computed_by} computed the weight"
                for parameter in self._mixed[weight].parameters:
                    self._uses[id(parameter)].matmul = True
                    self._uses[id(parameter)].others[how] = None
        if inputs or node.op != "call_function" or node.target in EMBEDDINGS:
            return
        if mixed or (weights and (is_mutation(node) or not is_product(node))):
            sources = [self._derived.get(n) or self._mixed[n] for n in (*weights, *mixed)]
            parameters = tuple(dict.fromkeys(p for s in sources for p in s.parameters))
            first = next((s.computed_by for s in sources if s.computed_by), _name(node))
            self._mixed[node] = _Derived(parameters, computed_by=first)
        else:
            self._fixed.add(node)

    def _read_inside(self, node: fx.Node) -> bool:
        """Record the parameters that a sub-graph, such as that of a loop, reads by itself.

        They are not followed in it, and so cannot be rewritten.

        Returns:
            Whether the node is a sub-graph.
        """
        inside = stored(self._trace, node)
        if not isinstance(inside, nn.Module):
            return False
        reader = next(iter(node.users), None)
        if reader is None:  # it is never run
            return True
        for module in inside.modules():
            for tensor in attributes(module) if isinstance(module, fx.GraphModule) else ():
                if isinstance(tensor, nn.Parameter):
                    self._uses[id(tensor)].matmul = True
                    self._uses[id(tensor)].others[_name(reader)] = None
        return True

    def _read(self, node: fx.Node, weights: list[fx.Node]) -> None:
        """Read a node with weight-derived inputs: it extends a chain, is a call, or another use."""
        if self._only_weights(node) and not self._of_learned_input(node):
            self._derived[node] = self._derive(node, weights)
            return
        index = _index_of(node)
        if index is not None and len(weights) == 1 and node.args[0] is weights[0]:
            source = self._derived[weights[0]]
            if source.computed_by is None and source.index is None and _dims(weights[0]) > 2:
                self._derived[node] = _Derived(source.parameters, index=index, stack=source.chain)
                return
        learned = self._of_learned_input(node)
        product = product_of(node, node.args[1:2] if learned else self._derived)  # type: ignore[arg-type]
        if product is not None and not self._vmaps:
            self._call(node, product)
            for other in weights:
                if other is not product.weight:
                    how = "its input" if other is product.input else "a bias"
                    self._other_use(other, f"{_name(node)} as {how}")
            return
        # In a region of vmap the input has a batch dimension that its shape does not show.
        where = " inside torch.vmap" if self._vmaps else ""
        for weight in weights:
            for parameter in self._derived[weight].parameters:
                self._uses[id(parameter)].matmul |= is_product(node) or _is_region(node)
            if node.target in EMBEDDINGS:
                for parameter in self._derived[weight].parameters:
                    self._uses[id(parameter)].embedding = True
            else:
                self._other_use(
                    weight, "the model's output" if node.op == "output" else _name(node) + where
                )

    def _only_weights(self, node: fx.Node) -> bool:
        """Whether the node's value, too, is computed from parameters alone."""
        return (
            node.op != "output"
            and not is_mutation(node)
            and all(
                n in self._derived or n in self._objects or not _is_tensor(n)
                for n in node.all_input_nodes
            )
        )

    def _of_learned_input(self, node: fx.Node) -> bool:
        """Whether a linear's input is made of other parameters alone, such as learned queries.

        In other matmuls of two parameters it is unknown which one is the input.
        """
        if node.target is not aten.linear.default:
            return False
        input, weight = (self._derived.get(n) for n in node.args[:2])  # type: ignore[arg-type]
        if input is None or weight is None or weight.computed_by or weight.index:
            return False
        return set(input.parameters).isdisjoint(weight.parameters)

    def _derive(self, node: fx.Node, weights: list[fx.Node]) -> _Derived:
        parameters = tuple(dict.fromkeys(p for w in weights for p in self._derived[w].parameters))
        source = self._derived[weights[0]]
        step = node.target in _STEPS and (source.index is None or _keeps_picks(node, source.index))
        if len(weights) == 1 and step and node.args[0] is weights[0]:
            return replace(source, chain=(*source.chain, node))
        return _Derived(parameters, (), source.computed_by or _name(node))

    def _call(self, node: fx.Node, product: Product) -> None:
        weight = product.weight
        source = self._derived[weight]
        (parameter, *more) = source.parameters
        for read in source.parameters:
            self._uses[id(read)].matmul = True
        if source.computed_by is not None or more:
            self._other_use(
                weight, f"{_name(node)}, after {source.computed_by} computed the weight"
            )
            return
        result = node.meta.get("val", parameter)
        unsupported = why_unsupported(parameter)
        if unsupported is not None:
            self._other_use(weight, f"{_name(node)}, of a weight that {unsupported}")
            return
        if not result.is_floating_point():
            self._other_use(
                weight, f"{_name(node)} in {result.dtype}, of a {parameter.dtype} weight"
            )
            return
        route = product.route
        picked: list[tuple[tuple[int, ...], torch.Tensor | None]]
        if source.index is None:
            picked = [((), replay(parameter, source.chain))]
        else:
            dims = _dims(source.index)
            picked = picked_matrices(parameter, source.stack, source.chain, dims)
            route = Route(source.index, ends=False, count=len(picked))
            if not product.stacks_like(dims):
                picked = [((), None)]  # the index does not pick along the input's rows
        found = []
        for place, value in picked:
            matrix = None if value is None else product.layout.of(value)
            what = "no view of the stored parameter" if matrix is None else _unfit_reason(matrix)
            if matrix is None or what is not None:
                self._other_use(weight, f"{_name(node)}, whose operand is {what}")
                return
            several = matrices(matrix)
            if place and len(several) > 1:
                self._other_use(weight, f"{_name(node)}, which picks stacks of matrices from it")
                return
            found += [(place or batch, view) for batch, view in several]
        stacked = len(found) > 1 or any(n.target in _PICKS for n in source.chain)
        direct = product.direct and not source.chain and route is None
        for batch, view in found:
            self._uses[id(parameter)].calls[view].append(
                Call(
                    trace=self._trace,
                    node=node,
                    input=product.input,
                    rows=product.rows,
                    batch=batch,
                    direct=direct,
                    epoch=self._epoch,
                    route=route,
                    stacked=stacked,
                )
            )

    def _other_use(self, weight: fx.Node, what: str) -> None:
        for parameter in self._derived[weight].parameters:
            self._uses[id(parameter)].others[what] = None


def _unfit_reason(matrix: torch.Tensor) -> str | None:
    """Why a view of a parameter cannot be rewritten as a matrix; None if it can."""
    if matrix.dim() < 2:
        return "a vector"
    repeated = any(
        size > 1 and stride == 0
        for size, stride in zip(matrix.shape[-2:], matrix.stride()[-2:], strict=True)
    )
    return "a matrix that repeats its elements" if repeated else None


def _keeps_picks(node: fx.Node, index: fx.Node) -> bool:
    """Whether a step leaves unchanged the leading dimensions, which are those of the index."""
    if node.target in COPIES or node.target is aten.mT.default:
        return True
    dims = node.args[1:3] if node.target is aten.transpose.int else node.args[1:2]
    turned = node.target in (aten.transpose.int, aten.slice.Tensor)
    return turned and all(
        isinstance(dim, int) and dim % _dims(node) >= _dims(index) for dim in dims
    )


def _index_of(node: fx.Node) -> fx.Node | None:
    """The node whose value, indices along the first dimension, picks matrices of a stack."""
    index: object = None
    if node.target is aten.index.Tensor and isinstance(node.args[1], (list, tuple)):
        index = node.args[1][0] if len(node.args[1]) == 1 else None
    elif node.target is aten.index_select.default and node.args[1] == 0:
        index = node.args[2]
    if not isinstance(index, fx.Node):
        return None
    value = index.meta.get("val")
    masks = (torch.bool, torch.uint8)
    return index if isinstance(value, torch.Tensor) and value.dtype not in masks else None


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _is_region(node: fx.Node) -> bool:
    """Whether the node has sub-graphs, which may use what it reads in any way."""
    return isinstance(node.target, HigherOrderOperator)


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"the module {node.target}"
    if _is_region(node):
        return f"the sub-graph of {node.target}"
    if isinstance(node.target, OperatorBase):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))
