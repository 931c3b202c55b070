"""Find the sites of traced graphs: matmuls with exactly one operand that derives from a weight.

A weight is rejected if anything but its own matmuls reads it, because rewriting it would change
other results. So is a weight that shares its memory with such a weight.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from magr_fx.errors import ConfigError, ModelError
from magr_fx.passes.finding.weight_uses import Call, Reader, Uses
from magr_fx.passes.graphs.trace import Trace, attribute
from magr_fx.passes.graphs.unsupported_weights import is_plain, shape_of, why_unsupported
from magr_fx.passes.graphs.weight_views import WeightView, overlap, unread_parts

FilterFn = Callable[[nn.Module, str], bool]
UNREACHED = "no calibration input reaches it"
EMPTY = "has no elements, so there is nothing to rewrite"


def check_filter(filter_fn: FilterFn | None) -> None:
    """Raise :class:`ConfigError` unless ``filter_fn`` is None or takes ``(module, fqn)``."""
    if filter_fn is None:
        return
    try:
        inspect.signature(filter_fn).bind(nn.Identity(), "name")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"filter_fn must be a function (module, fqn) -> bool, as in torchao's quantize_; got "
            f"{filter_fn!r}: {error}"
        ) from error


def is_linear_weight(owner: nn.Module, parameter: nn.Parameter) -> bool:
    return isinstance(owner, nn.Linear) and owner.weight is parameter


@dataclass(frozen=True, eq=False)
class Rejection:
    """A parameter, or a part of one, that is not a site, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str
    parameter: nn.Parameter
    owner: nn.Module
    owner_name: str
    matmul: bool = True  # whether it is multiplied with inputs nevertheless


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
        return Rejection(self.name, self.shape, reason, self.parameter, self.owner, self.owner_name)


@dataclass(frozen=True, eq=False)
class Found:
    """The sites, in the order in which the model runs them, and the rejected weights."""

    sites: list[Site]
    rejections: list[Rejection]


def find_linears(
    traces: Iterable[Trace], model: nn.Module, filter_fn: FilterFn | None = None
) -> Found:
    """Find the sites of the traced graphs, and the weights that are no sites.

    Args:
        traces: graphs whose parameters are ``model``'s own.
        model: names the parameters and their owners.
        filter_fn: ``(module, fqn) -> bool``, called with the module that owns a parameter. If it
            returns False, the parameter's sites are rejected for that reason.

    Raises:
        ModelError: no graph has a weight matmul that can be rewritten, or a graph reads a weight on
            the meta device.
        ConfigError: ``filter_fn`` returns False for every site.
    """
    owners = _owners(model)
    uses: defaultdict[int, Uses] = defaultdict(Uses)
    traces = list(dict.fromkeys(traces))  # several batches may share a trace
    order: dict[fx.Node, int] = {}
    for trace in traces:
        Reader(trace, uses).read()
        order.update((node, len(order)) for node in trace.graph_module.graph.nodes)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            uses[id(module.weight)].embedding = True

    fixed = _fixed_tensors(traces, model)
    candidates: list[Site] = []
    rejections: list[Rejection] = []
    for parameter, sharing in _sharing_memory(owners).items():
        owner, owner_name, name = owners[parameter]
        use = uses[id(parameter)]
        if parameter.is_meta and use.is_read:
            raise ModelError(
                f"{name} is on the meta device, without values, and the model reads it; load the "
                "weights first"
            )
        reason = why_unsupported(parameter)
        reason = reason or _why_not(use, [uses[id(other)] for other in sharing])
        reason = reason or _why_memory_is_shared(parameter, fixed)
        if reason is None:
            for view, calls in use.calls.items():
                site_name = name + (view.name(parameter) if parameter.numel() else "")
                site = Site(site_name, parameter, owner, owner_name, view, calls)
                if 0 in site.shape:
                    rejections.append(replace(site.rejected(EMPTY), matmul=False))
                else:
                    candidates.append(site)
            rejections += [
                Rejection(f"{name}{part}", shape, UNREACHED, parameter, owner, owner_name)
                for part, shape in unread_parts(parameter, use.calls)
            ]
        elif parameter.dim() >= 2:
            shape, matmul = shape_of(parameter), any(uses[id(p)].matmul for p in sharing)
            matmul |= not use.is_read and is_linear_weight(owner, parameter)
            rejections.append(Rejection(name, shape, reason, parameter, owner, owner_name, matmul))
    sites = _disjoint(candidates, rejections)
    sites.sort(key=lambda site: order[site.calls[0].node])  # as the model runs
    if not sites:
        raise ModelError(_nothing_found(model, rejections))
    return Found(_filtered(sites, filter_fn, rejections), rejections)


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Module, str, str]]:
    """parameter → its module, that module's name, its own name; the first if it has several."""
    owners: dict[nn.Parameter, tuple[nn.Module, str, str]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}" if module_name else key
            owners.setdefault(parameter, (module, module_name, name))
    return owners


def _sharing_memory(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, list[nn.Parameter]]:
    """parameter → all parameters that share some of its memory, itself included."""
    parameters = list(parameters)
    by_storage: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in filter(is_plain, parameters):
        by_storage[parameter.untyped_storage().data_ptr()].append(parameter)
    return {
        parameter: [
            other
            for other in by_storage[parameter.untyped_storage().data_ptr()]
            if other is parameter or _share(parameter, other)
        ]
        if is_plain(parameter)
        else [parameter]
        for parameter in parameters
    }


def _share(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the memory of two tensors, each from its first to its last element, overlaps."""
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    one, two = _bytes(first), _bytes(second)
    return max(one.start, two.start) < min(one.stop, two.stop)


def _bytes(tensor: torch.Tensor) -> range:
    """The range of bytes in its storage that a tensor lies in."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((n - 1) * step for n, step in steps)
    size = tensor.element_size()
    return range(int(tensor.storage_offset()) * size, (last + 1) * size)


def _fixed_tensors(
    traces: Iterable[Trace], model: nn.Module
) -> dict[int, list[tuple[str, torch.Tensor]]]:
    """storage → the buffers and constants in it, which rewriting a weight there would change.

    Also those that no graph reads: other code may read them.
    """
    tensors = [(f"buffer {name}", buffer) for name, buffer in model.named_buffers()]
    for trace in traces:
        for node in trace.graph_module.graph.find_nodes(op="get_attr"):
            tensor = attribute(trace, node)
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensors.append((f"constant {node.target}", tensor))
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for what, tensor in tensors:
        if is_plain(tensor):  # others, such as sparse tensors, have no such storage
            by_storage[tensor.untyped_storage().data_ptr()].append((what, tensor))
    return by_storage


def _why_memory_is_shared(
    parameter: nn.Parameter, fixed: dict[int, list[tuple[str, torch.Tensor]]]
) -> str | None:
    """Why a parameter has no site: a buffer or constant is in its memory; None if none is."""
    near = fixed.get(parameter.untyped_storage().data_ptr(), ())
    held = next((what for what, tensor in near if _share(parameter, tensor)), None)
    return None if held is None else f"shares its memory with the {held}, which would change"


def _why_not(use: Uses, sharing: list[Uses]) -> str | None:
    """Why a parameter has no site; None if it has one.

    ``sharing`` are the uses of all parameters that share its memory, itself included.
    """
    is_table = any(other.embedding for other in sharing)
    if use.calls:
        if is_table:
            return "tied: an embedding shares this weight, and would change with it"
        others = ", ".join(dict.fromkeys(what for other in sharing for what in other.others))
        return f"also read by {others}, whose result would change" if others else None
    if is_table:
        return "an embedding table, not a matmul"
    if use.others:
        return f"read by {', '.join(use.others)}: no matmul that can be rewritten"
    return UNREACHED


def _disjoint(candidates: list[Site], rejections: list[Rejection]) -> list[Site]:
    """The sites that share no element with another; the others are added to ``rejections``."""
    by_storage: dict[int, dict[WeightView, Site]] = defaultdict(dict)
    for site in candidates:
        twin = by_storage[site.view.storage].setdefault(site.view, site)
        if twin is not site:  # another Parameter object over the same memory
            twin.calls.extend(site.calls)
    sites = []
    for same in by_storage.values():
        for site in same.values():
            others = (other for other in same.values() if other is not site)
            clash = next((other for other in others if overlap(other.view, site.view)), None)
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
            rejections.append(replace(site.rejected("left out by filter_fn"), matmul=False))
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
