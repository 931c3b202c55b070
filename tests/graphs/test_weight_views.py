"""Views of a parameter, against NumPy: which elements they are, how they are written and named."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import fx, nn

from magr_fx.passes.graphs.weight_views import COPIES, VIEWS, WeightView, matrices, overlap, replay

aten = torch.ops.aten
Array = NDArray[np.float32]
Step = tuple[Any, tuple[Any, ...]]  # an aten op and its arguments after the first

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def chain_of(steps: list[Step]) -> tuple[fx.Node, ...]:
    """The steps as the nodes of a graph, one after another."""
    graph = fx.Graph()
    node = graph.get_attr("weight")
    nodes = []
    for target, args in steps:
        node = graph.call_function(target, (node, *args))
        nodes.append(node)
    return tuple(nodes)


def pieces(values: Array, size: int, dim: int) -> list[Array]:
    starts = range(0, values.shape[dim], size)
    return [values.take(range(a, min(a + size, values.shape[dim])), dim) for a in starts]


# What each op does, in NumPy. A chunk is one ceil(size / chunks) long; the last may be shorter.
NUMPY: dict[Any, Callable[..., Any]] = {
    aten.transpose.int: lambda v, a, b: v.swapaxes(a, b),
    aten.permute.default: lambda v, dims: v.transpose(dims),
    aten.slice.Tensor: lambda v, dim, a, b, step: v.take(
        range(*slice(a, b, step).indices(v.shape[dim])), dim
    ),
    aten.narrow.default: lambda v, dim, start, size: v.take(range(start, start + size), dim),
    aten.select.int: lambda v, dim, at: v.take(at, dim),
    aten.unbind.int: lambda v, dim: [v.take(at, dim) for at in range(v.shape[dim])],
    aten.unsqueeze.default: np.expand_dims,
    aten.squeeze.dim: lambda v, dim: v.squeeze(dim),
    aten.chunk.default: lambda v, n, dim: pieces(v, -(-v.shape[dim] // n), dim),
    aten.split.Tensor: pieces,
    operator.getitem: lambda v, at: v[at],
    aten.expand.default: np.broadcast_to,
    aten.reshape.default: lambda v, shape: v.reshape(shape),
    aten.view.default: lambda v, shape: v.reshape(shape),
    aten.flatten.using_ints: lambda v, a, b: v.reshape(*v.shape[:a], -1, *v.shape[b + 1 :]),
    aten.unflatten.int: lambda v, dim, sizes: v.reshape(
        *v.shape[:dim], *sizes, *v.shape[dim + 1 :]
    ),
    aten.mT.default: lambda v: v.swapaxes(-1, -2),
    aten.detach.default: lambda v: v,
    aten.alias.default: lambda v: v,
    aten.clone.default: lambda v: v,
    aten.to.dtype: lambda v, dtype: v,
}


def apply(values: Array, steps: list[Step]) -> Array:
    for target, args in steps:
        values = NUMPY[target](values, *args)
    return values


@st.composite
def parameters(draw: st.DrawFn) -> nn.Parameter:
    """Every element another value; any order of strides, gaps between elements, any offset."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    gaps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    offset = draw(st.integers(0, 3))
    order = draw(st.permutations(list(range(len(shape)))))
    whole = [shape[dim] * gaps[dim] for dim in order]
    storage = torch.arange(float(offset + np.prod(whole)))
    strided = storage[offset:].view(whole)[tuple(slice(None, None, gaps[dim]) for dim in order)]
    return nn.Parameter(strided.permute(np.argsort(order).tolist()))


@st.composite
def steps_on(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    """A chain of up to six views that are legal on a tensor of this shape."""
    values = np.zeros(shape, dtype=np.float32)
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 6))):
        kinds = [_resized, _ordered, _part, _one_of_parts, _copied, _repeated]
        kind: Callable[..., list[Step]] = draw(st.sampled_from(kinds if values.ndim else kinds[:1]))
        new = kind(draw, values.shape)
        values = apply(values, new)
        steps.extend(new)
    return steps


def _resized(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    singles = [at for at, size in enumerate(shape) if size == 1]
    if draw(st.booleans()) and singles:
        return [(aten.squeeze.dim, (draw(st.sampled_from(singles)),))]
    return [(aten.unsqueeze.default, (draw(st.integers(0, len(shape))),))]


def _ordered(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    dims = st.integers(0, len(shape) - 1)
    if draw(st.booleans()):
        return [(aten.transpose.int, (draw(dims), draw(dims)))]
    return [(aten.permute.default, (draw(st.permutations(list(range(len(shape))))),))]


def _part(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    dim = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    if draw(st.booleans()):
        return [(aten.select.int, (dim, start))]
    end = draw(st.integers(start + 1, shape[dim]))
    return [(aten.slice.Tensor, (dim, start, end, draw(st.integers(1, 2))))]


def _one_of_parts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    dim = draw(st.integers(0, len(shape) - 1))
    size = draw(st.integers(1, shape[dim]))
    target = draw(st.sampled_from([aten.chunk.default, aten.split.Tensor]))
    longest = -(-shape[dim] // size) if target is aten.chunk.default else size
    parts = -(-shape[dim] // longest)
    return [(target, (size, dim)), (operator.getitem, (draw(st.integers(0, parts - 1)),))]


def _copied(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    return [draw(st.sampled_from([(aten.clone.default, ()), (aten.to.dtype, (torch.float64,))]))]


def _repeated(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    size = draw(st.integers(1, 3))
    return [(aten.unsqueeze.default, (0,)), (aten.expand.default, ([size, *shape],))]


@repeatable
@given(st.data())
def test_a_chain_of_views_is_followed_and_written_through(data: st.DataObject) -> None:
    parameter = data.draw(parameters())
    steps = data.draw(steps_on(tuple(parameter.shape)))
    expected = apply(parameter.detach().numpy().copy(), steps)
    assume(expected.ndim >= 2)

    weight = replay(parameter, chain_of(steps))
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), expected)

    storage = torch.empty(0).set_(parameter.untyped_storage())
    before = storage.clone()
    seen: set[tuple[int, ...]] = set()
    found = matrices(weight)
    assert len({view for _, view in found}) == len(found), "a matrix is there once"
    for index, view in found:
        assert len(index) == expected.ndim - 2
        at = tuple(max(i, 0) for i in index)
        np.testing.assert_array_equal(view.on(parameter).numpy(), expected[at])
        assert view == WeightView.of(weight[at])

        # -1 stands for every place where the same matrix is met.
        places = [range(n) if i < 0 else [i] for i, n in zip(index, expected.shape, strict=False)]
        for place in itertools.product(*places):
            np.testing.assert_array_equal(expected[place], expected[at])
            assert place not in seen
            seen.add(place)
        if len(set(expected[at].ravel())) < expected[at].size:
            continue  # a matrix that repeats its elements cannot be written
        view.on(parameter).copy_(-1 - view.on(parameter))
        changed = {int(value) for value in before[storage != before]}
        assert changed == {int(value) for value in expected[at].ravel()}
        storage.copy_(before)
    assert len(seen) == int(np.prod(expected.shape[:-2]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "step",
    [
        (aten.view.default, ([2, 12],)),
        (aten.reshape.default, ([2, 3, 4],)),
        (aten.flatten.using_ints, (0, 1)),
        (aten.unflatten.int, (0, [2, -1])),
        (aten.narrow.default, (1, 1, 1)),
        (aten.mT.default, ()),
        (aten.detach.default, ()),
        (aten.alias.default, ()),
    ],
)
def test_other_views(step: Step, transposed: bool) -> None:
    """On a transposed parameter a merged dimension is a copy, or no view: no way back."""
    parameter = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    steps = [(aten.permute.default, ([2, 0, 1],)), step] if transposed else [step]
    expected = apply(parameter.detach().numpy().copy(), steps)
    weight = replay(parameter, chain_of(steps))
    merges = step[0] in (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
    if transposed and merges:
        assert weight is None
    else:
        assert weight is not None
        np.testing.assert_array_equal(weight.numpy(), expected)
        weight.fill_(-1)
        assert int((parameter == -1).sum()) == expected.size


def test_unbind_and_its_items() -> None:
    parameter = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    weight = replay(parameter, chain_of([(aten.unbind.int, (1,)), (operator.getitem, (2,))]))
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), parameter.detach().numpy()[:, 2])
    assert replay(parameter, chain_of([(aten.unbind.int, (1,))])) is None  # a list, no tensor


def test_a_chain_that_ends_in_another_type_has_no_way_back() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    assert replay(parameter, chain_of([(aten.view.dtype, (torch.int32,))])) is None
    assert replay(parameter, chain_of([(aten.select.int, (0, 9))])) is None


def test_views_return_views_and_copies_do_not_change_which_element_is_which() -> None:
    """The tables of ops are what their names say."""
    assert not VIEWS & COPIES
    targets: set[Any] = {*VIEWS} - {operator.getitem}
    for target in targets - {aten.reshape.default, aten.flatten.using_ints}:
        returns = target._schema.returns
        alias = returns[0].alias_info
        implicit = torch.Tag.maybe_aliasing_or_mutating in target.tags
        assert alias is not None or implicit or target is aten._unsafe_view.default, target
    values = torch.arange(6.0).view(2, 3)
    targets = {*COPIES}
    for target in targets - {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other}:
        assert torch.equal(target(values), values)


# ---- names


@st.composite
def blocks_of(draw: st.DrawFn) -> tuple[nn.Parameter, list[Step]]:
    """A parameter stored without gaps and a chain that takes a box out of it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    order = draw(st.permutations(list(range(len(shape)))))
    values = torch.arange(float(np.prod(shape))).view([shape[dim] for dim in order])
    parameter = nn.Parameter(values.permute(np.argsort(order).tolist()))
    steps: list[Step] = []
    for dim in reversed(range(len(shape))):
        start = draw(st.integers(0, shape[dim] - 1))
        end = draw(st.integers(start + 1, shape[dim]))
        if dim < len(shape) - 2 and draw(st.booleans()):
            steps.append((aten.select.int, (dim, start)))
        else:
            steps.append((aten.slice.Tensor, (dim, start, end, 1)))
    return parameter, steps


@repeatable
@given(blocks_of())
def test_a_name_is_the_index_of_the_part(drawn: tuple[nn.Parameter, list[Step]]) -> None:
    parameter, steps = drawn
    weight = replay(parameter, chain_of(steps))
    assert weight is not None
    for _, view in matrices(weight):
        name = view.name(parameter)
        assert (name == "") == (view.shape[0] * view.shape[1] == parameter.numel())
        index = name or "[...]"
        named = eval(f"parameter.detach(){index}", {"parameter": parameter})
        assert sorted(named.ravel().tolist()) == sorted(view.on(parameter).ravel().tolist())


@pytest.mark.parametrize(
    ("shape", "part", "name"),
    [
        ((6, 4), lambda w: w, ""),
        ((6, 4), lambda w: w.T, ""),
        ((6, 4), lambda w: w[2:4], "[2:4]"),
        ((6, 4), lambda w: w[:, 1:3], "[:, 1:3]"),
        ((6, 4), lambda w: w[:, 1:3].T, "[:, 1:3]"),
        ((6, 4), lambda w: w.view(3, 2, 4)[1], "[2:4]"),
        ((5, 6, 4), lambda w: w[3], "[3]"),
        ((5, 6, 4), lambda w: w[3].T, "[3]"),
        ((5, 6, 4), lambda w: w[3, 2:4], "[3, 2:4]"),
        ((5, 6, 4), lambda w: w[:, 3], "[:, 3]"),
        ((1, 6, 4), lambda w: w[0], ""),
        ((24,), lambda w: w.view(6, 4), ""),
        ((24,), lambda w: w[8:16].view(2, 4), "[8:16]"),
    ],
)
def test_names(shape: tuple[int, ...], part: Callable[[Any], Any], name: str) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    assert WeightView.of(part(parameter.detach())).name(parameter) == name


def test_names_of_parameters_with_an_offset_or_repeated_elements() -> None:
    storage = torch.zeros(100)
    offset = nn.Parameter(storage[7:31].view(6, 4))
    assert WeightView.of(offset.detach()[2:4]).name(offset) == "[2:4]"
    repeated = nn.Parameter(torch.zeros(6, 4).expand(3, 6, 4))
    assert WeightView.of(repeated.detach()[1]).name(repeated) == "[0]"


def test_covers_the_parameter_as_it_is_stored_only() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    assert WeightView.of(parameter).covers(parameter)
    assert not WeightView.of(parameter.T).covers(parameter)
    assert not WeightView.of(parameter[:3]).covers(parameter)
    assert not WeightView.of(parameter).covers(nn.Parameter(torch.zeros(4, 4)))
    stack = nn.Parameter(torch.zeros(1, 4, 4))
    assert not WeightView.of(stack[0]).covers(stack)


def test_on_shares_memory_and_needs_no_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(6, 4))
    view = WeightView.of(parameter.detach()[2:4].T)
    view.on(parameter).fill_(1)
    assert not view.on(parameter).requires_grad
    assert parameter.requires_grad
    assert parameter.sum(1).tolist() == [0, 0, 4, 4, 0, 0]


# ---- overlap

strided = st.builds(
    WeightView,
    storage=st.sampled_from([0, 0, 0, 1]),
    offset=st.integers(0, 12),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)


def elements(view: WeightView) -> set[tuple[int, int]]:
    (rows, columns), (down, right) = view.shape, view.stride
    return {
        (view.storage, view.offset + i * down + j * right)
        for i in range(rows)
        for j in range(columns)
    }


@repeatable
@given(strided, strided)
def test_overlap_is_a_shared_element(first: WeightView, second: WeightView) -> None:
    assert overlap(first, second) == bool(elements(first) & elements(second))
    assert overlap(first, second) == overlap(second, first)


def test_overlap_needs_no_more_memory_than_the_views_span() -> None:
    """Far inside a large storage, such as that of flattened parameters."""
    far = 10**15
    first, second = (WeightView(0, far + at, (4, 4), (8, 1)) for at in (0, 4))
    assert not overlap(first, second)
    assert overlap(first, WeightView(0, far + 3, (4, 4), (8, 1)))
