"""graph → sites: every matmul with exactly one weight-derived operand, and what was rejected.

From each parameter the finder walks forward through the ops whose tensor inputs are all
weight-derived. Views, and copies such as casts, keep the way back to the stored weight; any other
op ends it. A matmul between such a weight and anything else is a call of a site. A weight that
more than its own matmuls read is left alone: rewriting it would change what the others compute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from magr_fx.errors import ConfigError, ModelError
from magr_fx.passes.trace import Trace, attribute, is_mutation
from magr_fx.passes.weight_views import COPIES, VIEWS, WeightView, matrices, overlap, replay

aten = torch.ops.aten

FilterFn = Callable[[nn.Module, str], bool]

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


def is_linear_weight(owner: nn.Module, parameter: nn.Parameter) -> bool:
    return isinstance(owner, nn.Linear) and owner.weight is parameter


UNREACHED = "no calibration input reaches it"


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


@dataclass(frozen=True, eq=False)
class Rejection:
    """A parameter, or a part of one, that is no site, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    parameter: nn.Parameter
    owner: nn.Module


@dataclass(eq=False)
class Site:
    """One weight ``[out, in]`` and every matmul that reads it."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    owner_name: str
    view: WeightView
    calls: list[Call] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.shape

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]``, sharing the parameter's memory."""
        return self.view.on(self.parameter)

    @property
    def is_linear_weight(self) -> bool:
        """Whether this is the whole weight of an nn.Linear (or a subclass of it)."""
        return is_linear_weight(self.owner, self.parameter)

    def rejected(self, reason: str) -> Rejection:
        return Rejection(self.name, self.shape, reason, self.parameter, self.owner)


@dataclass(frozen=True, eq=False)
class Found:
    sites: list[Site]
    rejections: list[Rejection]


@dataclass(frozen=True, eq=False)
class _Derived:
    """A value computed from parameters alone: a chain of views of one, or a computation."""

    parameters: tuple[nn.Parameter, ...]
    chain: tuple[fx.Node, ...] = ()
    computed_by: str | None = None


@dataclass(eq=False)
class _Uses:
    """Everything that reads one parameter, over all traces."""

    calls: dict[WeightView, list[Call]] = field(default_factory=lambda: defaultdict(list))
    embedding: bool = False
    others: dict[str, None] = field(default_factory=dict)  # an ordered set of descriptions


def find_linears(
    traces: Iterable[Trace], model: nn.Module, filter_fn: FilterFn | None = None
) -> Found:
    """Find every weight matmul of the traced graphs.

    Args:
        traces: graphs whose parameters are ``model``'s own.
        model: names the parameters and their owners.
        filter_fn: ``(module, fqn) -> bool`` for the module that owns a parameter; False leaves
            its sites out, with that as the reported reason.

    Raises:
        ModelError: no graph has a weight matmul.
        ConfigError: ``filter_fn`` leaves nothing to work on.
    """
    owners = _owners(model)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    uses: dict[int, _Uses] = defaultdict(_Uses)
    for trace in traces:
        _walk(trace, uses)

    tables = [p for p in owners if id(p) in embedded or uses[id(p)].embedding]
    candidates: list[Site] = []
    rejections: list[Rejection] = []
    for parameter, (owner, owner_name, name) in owners.items():
        use = uses[id(parameter)]
        reason = _why_not(use, any(_same_memory(parameter, table) for table in tables))
        if reason is None:
            for view, calls in use.calls.items():
                site_name = name + view.name(parameter)
                candidates.append(Site(site_name, parameter, owner, owner_name, view, calls))
        elif parameter.dim() >= 2:
            rejections.append(Rejection(name, tuple(parameter.shape), reason, parameter, owner))
    sites = _disjoint(candidates, rejections)
    if not sites:
        raise ModelError(_nothing_found(model, rejections))
    return Found(_filtered(sites, filter_fn, rejections), rejections)


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Module, str, str]]:
    """parameter → its module, the module's name and its own name; the first of several names."""
    owners: dict[nn.Parameter, tuple[nn.Module, str, str]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}" if module_name else key
            owners.setdefault(parameter, (module, module_name, name))
    return owners


def _walk(trace: Trace, uses: dict[int, _Uses]) -> None:
    """Record every read of every parameter in one graph."""
    derived: dict[fx.Node, _Derived] = {}
    epoch = 0
    for node in trace.graph_module.graph.nodes:
        if node.op == "get_attr":
            value = attribute(trace, node)
            if isinstance(value, nn.Parameter):
                derived[node] = _Derived((value,))
            continue
        if node.target in _VALUE_FREE:
            continue
        reads = [n for n in node.all_input_nodes if n in derived]
        if node.op == "output":
            for read in reads:
                _other_use(derived[read], "the model's output", uses)
        elif reads:
            _read(trace, node, reads, derived, uses, epoch)
        epoch += is_mutation(node)


def _read(
    trace: Trace,
    node: fx.Node,
    reads: list[fx.Node],
    derived: dict[fx.Node, _Derived],
    uses: dict[int, _Uses],
    epoch: int,
) -> None:
    """One node that reads weight-derived values: a longer chain, a call, or another use."""
    parameters = tuple(dict.fromkeys(p for n in reads for p in derived[n].parameters))
    only_weights = all(n in derived or not _is_tensor(n) for n in node.all_input_nodes)
    if only_weights and not is_mutation(node):
        source = derived[reads[0]]
        if len(reads) == 1 and node.target in _STEPS and node.args[0] is reads[0]:
            derived[node] = _Derived(parameters, (*source.chain, node), source.computed_by)
        else:
            derived[node] = _Derived(parameters, (), source.computed_by or _op_name(node))
        return
    operands = MATMULS.get(node.target)
    if operands is not None:
        left, right, transposed = operands
        pair = (node.args[left], node.args[right])
        sides = [side for side in (0, 1) if pair[side] in derived]
        if len(sides) == 1 and reads.count(pair[sides[0]]) == 1:  # type: ignore[arg-type]
            weight, other = pair[sides[0]], pair[1 - sides[0]]
            bias = [n for n in reads if n is not weight]
            for read in bias:
                _other_use(derived[read], f"{_op_name(node)} as a bias", uses)
            _call(trace, node, (weight, other), (sides[0], transposed), derived, uses, epoch)  # type: ignore[arg-type]
            return
    for read in reads:
        if node.target in EMBEDDINGS:
            for parameter in derived[read].parameters:
                uses[id(parameter)].embedding = True
        else:
            _other_use(derived[read], _op_name(node), uses)


def _call(
    trace: Trace,
    node: fx.Node,
    pair: tuple[fx.Node, fx.Node],
    form: tuple[int, bool],
    derived: dict[fx.Node, _Derived],
    uses: dict[int, _Uses],
    epoch: int,
) -> None:
    weight, other = pair
    side, transposed = form
    source = derived[weight]
    (parameter, *more) = source.parameters
    if source.computed_by is not None or more:
        what = f"{_op_name(node)}, after {source.computed_by} computed the weight"
        _other_use(source, what, uses)
        return
    matrix = replay(parameter, source.chain)
    if matrix is None or matrix.dim() < 2:
        what = "a vector" if matrix is not None else "no view of the stored parameter"
        _other_use(source, f"{_op_name(node)}, whose operand is {what}", uses)
        return
    # Y = A·B. As B the weight is stored [in, out], or [out, in] where the op transposes it. As A
    # it is [out, in], and the tokens are B's columns, or its rows where the op transposes B.
    if side == 1 and not transposed:
        matrix = matrix.mT
    columns = side == 0 and not transposed
    direct = node.target is aten.linear.default and side == 1 and not source.chain
    for batch, view in matrices(matrix):
        uses[id(parameter)].calls[view].append(
            Call(trace, node, other, columns, batch, direct, epoch)
        )


def _other_use(source: _Derived, what: str, uses: dict[int, _Uses]) -> None:
    for parameter in source.parameters:
        uses[id(parameter)].others[what] = None


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _op_name(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"the module {node.target}"
    if isinstance(node.target, torch._ops.OperatorBase):
        return node.target.name().replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def _same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two parameters, which may be two objects, start at the same element."""
    return first is second or (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() == second.storage_offset()
    )


def _why_not(use: _Uses, is_table: bool) -> str | None:
    """Why a parameter has no site, or None where it has."""
    others = ", ".join(use.others)
    if use.calls:
        if is_table:
            return "tied: an embedding shares this weight, and would change with it"
        if use.others:
            return f"also read by {others}, whose result would change"
        return None
    if is_table:
        return "an embedding table, not a matmul"
    if use.others:
        return f"read by {others}: no matmul that can be rewritten"
    return UNREACHED


def _disjoint(candidates: list[Site], rejections: list[Rejection]) -> list[Site]:
    """The sites that share no element with another; the others cannot be solved one by one."""
    by_storage: dict[int, list[Site]] = defaultdict(list)
    for site in candidates:
        by_storage[site.view.storage].append(site)
    sites = []
    for site in candidates:
        same = [other for other in by_storage[site.view.storage] if other is not site]
        twin = next((o for o in same if o.view == site.view), None)
        if twin is not None and twin in sites:
            twin.calls.extend(site.calls)  # another Parameter object over the same memory
            continue
        clash = next((o for o in same if o is not twin and overlap(o.view, site.view)), None)
        if clash is None:
            sites.append(site)
        else:
            reason = f"overlaps {clash.name}, which is multiplied with other inputs"
            rejections.append(site.rejected(reason))
    return sites


def _filtered(
    sites: list[Site], filter_fn: FilterFn | None, rejections: list[Rejection]
) -> list[Site]:
    if filter_fn is None:
        return sites
    kept = []
    for site in sites:
        if filter_fn(site.owner, site.owner_name):
            kept.append(site)
        else:
            rejections.append(site.rejected("left out by filter_fn"))
    if not kept:
        some = ", ".join(site.owner_name or site.name for site in sites[:3])
        raise ConfigError(
            f"filter_fn matches none of the {len(sites)} weights (the first are owned by {some}); "
            "it is called with the module that owns the parameter and that module's name"
        )
    return kept


def _nothing_found(model: nn.Module, rejections: list[Rejection]) -> str:
    reasons = "; ".join(f"{r.name}: {r.reason}" for r in rejections[:3])
    return f"{type(model).__name__} has no weight matmul that can be rewritten" + (
        f" ({reasons})" if reasons else ": it has no parameter of two dimensions"
    )
