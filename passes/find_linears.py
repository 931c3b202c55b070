"""graph → sites: every matmul with exactly one weight-derived operand, and what was rejected.

A weight that more than its own matmuls read is left alone: rewriting it would change what the
others compute. So is one that shares its memory with such a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from magr_fx.errors import ConfigError, ModelError
from magr_fx.passes.trace import Trace
from magr_fx.passes.weight_uses import Call, Reader, Uses
from magr_fx.passes.weight_views import WeightView, overlap

FilterFn = Callable[[nn.Module, str], bool]
UNREACHED = "no calibration input reaches it"


def is_linear_weight(owner: nn.Module, parameter: nn.Parameter) -> bool:
    return isinstance(owner, nn.Linear) and owner.weight is parameter


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
    uses: defaultdict[int, Uses] = defaultdict(Uses)
    order: dict[fx.Node, int] = {}
    for trace in traces:
        Reader(trace, uses).read()
        order.update((node, len(order)) for node in trace.graph_module.graph.nodes)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            uses[id(module.weight)].embedding = True

    candidates: list[Site] = []
    rejections: list[Rejection] = []
    for parameter, sharing in _sharing_memory(owners).items():
        owner, owner_name, name = owners[parameter]
        use = uses[id(parameter)]
        reason = _why_not(use, [uses[id(other)] for other in sharing])
        if reason is None:
            for view, calls in use.calls.items():
                site_name = name + view.name(parameter)
                candidates.append(Site(site_name, parameter, owner, owner_name, view, calls))
        elif parameter.dim() >= 2:
            rejections.append(Rejection(name, tuple(parameter.shape), reason, parameter, owner))
    sites = _disjoint(candidates, rejections)
    sites.sort(key=lambda site: order[site.calls[0].node])  # as the model runs, however it is named
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


def _sharing_memory(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, list[nn.Parameter]]:
    """parameter → all that hold some of its memory, itself included: two objects may be one."""
    by_storage: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        by_storage[parameter.untyped_storage().data_ptr()].append(parameter)

    def bytes_of(parameter: nn.Parameter) -> range:
        steps = zip(parameter.shape, parameter.stride(), strict=True)
        last = parameter.storage_offset() + sum((n - 1) * step for n, step in steps)
        size = parameter.element_size()
        return range(parameter.storage_offset() * size, (last + 1) * size)

    def share(first: nn.Parameter, second: nn.Parameter) -> bool:
        one, two = bytes_of(first), bytes_of(second)
        return first is second or max(one.start, two.start) < min(one.stop, two.stop)

    return {
        parameter: [
            other
            for other in by_storage[parameter.untyped_storage().data_ptr()]
            if share(parameter, other)
        ]
        for parameter in parameters
    }


def _why_not(use: Uses, sharing: list[Uses]) -> str | None:
    """Why a parameter has no site, or None where it has.

    ``sharing`` is how its memory is used, under whatever parameter.
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
    """The sites that share no element with another; the others cannot be solved one by one."""
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
