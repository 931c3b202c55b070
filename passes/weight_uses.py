"""graph → every read of every parameter: matmuls that can be rewritten, and everything else.

From each parameter the reader walks forward through the ops whose tensor inputs are all
weight-derived. Views, and copies such as casts, keep the way back to the stored weight; any other
op ends it. A matmul between such a weight and anything else is a call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from magr_fx.passes.trace import Trace, attribute, is_mutation
from magr_fx.passes.weight_views import COPIES, VIEWS, WeightView, matrices, replay

aten = torch.ops.aten

# op → positions of its left and right operand, and whether the right one is stored transposed.
MATMULS: dict[object, tuple[int, int, bool]] = {
    aten.linear.default: (0, 1, True),
    aten.mm.default: (0, 1, False),
    aten.bmm.default: (0, 1, False),
    aten.matmul.default: (0, 1, False),
    aten.addmm.default: (1, 2, False),
    aten.baddbmm.default: (1, 2, False),
}
EMBEDDINGS = frozenset({aten.embedding.default, aten.embedding_bag.default})
_STEPS = VIEWS | COPIES  # what a chain from parameter to weight may consist of
# Ops that look at a tensor's shape or type, never at its values.
_VALUE_FREE = frozenset({aten.sym_size.int, aten._assert_tensor_metadata.default})


@dataclass(frozen=True, eq=False)
class Call:
    """One matmul of a site: the weight meets the value of ``input`` in ``node``.

    The input's tokens are the rows of ``input`` ``[..., tokens, in]``, or its columns where
    ``columns``. ``batch`` picks what meets this matrix of a stack (see ``matrices``).
    """

    trace: Trace
    node: fx.Node
    input: fx.Node
    columns: bool
    batch: tuple[int, ...]
    direct: bool  # aten.linear on the parameter itself: what torchao's tensors can run
    epoch: int  # in-place ops before the call; a value may differ from one epoch to the next

    @property
    def input_key(self) -> tuple[object, ...]:
        """Calls with the same key see the same activations, and so share a gram."""
        return self.input, self.epoch, self.columns, self.batch


@dataclass(eq=False)
class Uses:
    """Everything that reads one parameter, over all traces."""

    calls: dict[WeightView, list[Call]] = field(default_factory=lambda: defaultdict(list))
    embedding: bool = False
    others: dict[str, None] = field(default_factory=dict)  # an ordered set of descriptions


@dataclass(frozen=True, eq=False)
class _Derived:
    """A value computed from parameters alone: a chain of views of one, or a computation."""

    parameters: tuple[nn.Parameter, ...]
    chain: tuple[fx.Node, ...] = ()
    computed_by: str | None = None


class Reader:
    """Reads one graph from its first node to its last, and adds what it finds to ``uses``."""

    def __init__(self, trace: Trace, uses: defaultdict[int, Uses]) -> None:
        self._trace = trace
        self._uses = uses  # by the parameter's id
        self._derived: dict[fx.Node, _Derived] = {}
        self._epoch = 0

    def read(self) -> None:
        for node in self._trace.graph_module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(self._trace, node)
                if isinstance(value, nn.Parameter):
                    self._derived[node] = _Derived((value,))
            elif node.target not in _VALUE_FREE:
                weights = [n for n in node.all_input_nodes if n in self._derived]
                if weights:
                    self._read(node, weights)
                self._epoch += is_mutation(node)

    def _read(self, node: fx.Node, weights: list[fx.Node]) -> None:
        """One node that reads weight-derived values: a longer chain, a call, or another use."""
        if self._only_weights(node):
            self._derived[node] = self._derive(node, weights)
            return
        if node.target in MATMULS:
            left, right, transposed = MATMULS[node.target]
            pair = (node.args[left], node.args[right])
            sides = [side for side in (0, 1) if pair[side] in self._derived]
            # Where the weight is the bias as well, the call is not its only use.
            if len(sides) == 1 and node.args.count(pair[sides[0]]) == 1:
                side = sides[0]
                self._call(node, pair[side], pair[1 - side], side, transposed)  # type: ignore[arg-type]
                for bias in weights:
                    if bias is not pair[side]:
                        self._other_use(bias, f"{_name(node)} as a bias")
                return
        for weight in weights:
            if node.target in EMBEDDINGS:
                for parameter in self._derived[weight].parameters:
                    self._uses[id(parameter)].embedding = True
            else:
                self._other_use(
                    weight, "the model's output" if node.op == "output" else _name(node)
                )

    def _only_weights(self, node: fx.Node) -> bool:
        """Whether the node's value is one more that is computed from parameters alone."""
        return (
            node.op != "output"
            and not is_mutation(node)
            and all(n in self._derived or not _is_tensor(n) for n in node.all_input_nodes)
        )

    def _derive(self, node: fx.Node, weights: list[fx.Node]) -> _Derived:
        parameters = tuple(dict.fromkeys(p for w in weights for p in self._derived[w].parameters))
        source = self._derived[weights[0]]
        if len(weights) == 1 and node.target in _STEPS and node.args[0] is weights[0]:
            return _Derived(parameters, (*source.chain, node), source.computed_by)
        return _Derived(parameters, (), source.computed_by or _name(node))

    def _call(
        self, node: fx.Node, weight: fx.Node, other: fx.Node, side: int, transposed: bool
    ) -> None:
        source = self._derived[weight]
        (parameter, *more) = source.parameters
        if source.computed_by is not None or more:
            self._other_use(
                weight, f"{_name(node)}, after {source.computed_by} computed the weight"
            )
            return
        result = node.meta.get("val", parameter)
        if not (parameter.is_floating_point() and result.is_floating_point()):
            self._other_use(
                weight, f"{_name(node)} in {result.dtype}, of a {parameter.dtype} weight"
            )
            return
        matrix = replay(parameter, source.chain)
        what = "no view of the stored parameter" if matrix is None else _unfit(matrix)
        if matrix is None or what is not None:
            self._other_use(weight, f"{_name(node)}, whose operand is {what}")
            return
        # Y = A·B. As B the weight is stored [in, out], or [out, in] where the op transposes it. As
        # A it is [out, in], and the tokens are B's columns, or its rows where the op transposes B.
        if side == 1 and not transposed:
            matrix = matrix.mT
        columns = side == 0 and not transposed
        direct = node.target is aten.linear.default and side == 1 and not source.chain
        for batch, view in matrices(matrix):
            self._uses[id(parameter)].calls[view].append(
                Call(self._trace, node, other, columns, batch, direct, self._epoch)
            )

    def _other_use(self, weight: fx.Node, what: str) -> None:
        for parameter in self._derived[weight].parameters:
            self._uses[id(parameter)].others[what] = None


def _unfit(matrix: torch.Tensor) -> str | None:
    """Why a view of a parameter cannot be rewritten as a matrix, or None where it can."""
    if matrix.dim() < 2:
        return "a vector"
    repeated = any(
        size > 1 and stride == 0
        for size, stride in zip(matrix.shape[-2:], matrix.stride()[-2:], strict=True)
    )
    return "a matrix that repeats its elements" if repeated else None


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"the module {node.target}"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"the sub-graph of {node.target}"
    if isinstance(node.target, torch._ops.OperatorBase):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))
