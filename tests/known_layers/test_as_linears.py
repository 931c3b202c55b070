"""as_linears: Conv1D and fused experts as linears, which compute what the model computed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from expert_models import MODELS, expert_modules, fused, logits
from graph_helpers import Formula
from tiny_models import activations, tiny_llama, token_ids
from torch import Tensor, nn
from toys import changed, mlp, state
from transformers.pytorch_utils import Conv1D

from magr_fx.passes.known_layers.as_linears import as_linears, rebuildable, replace_module
from magr_fx.passes.known_layers.expert_modules import UnfusedExperts

IDS = token_ids(3, 9, seed=1)
every_model = pytest.mark.parametrize("name", list(MODELS))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * scale)


# The same model.


@every_model
def test_the_outputs_and_the_number_of_parameters_stay_and_nothing_fused_is_left(name: str) -> None:
    model = MODELS[name]()
    wanted, parameters = logits(model, IDS), size(model)
    assert fused(model)
    assert as_linears(model) is model
    assert fused(model) == []
    assert size(model) == parameters
    assert_close(logits(model, IDS), wanted)


@every_model
def test_in_float64_the_outputs_are_equal_to_its_rounding(name: str) -> None:
    model = MODELS[name]().double()
    if name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"):
        model.set_experts_implementation("eager")  # type: ignore[operator]
    wanted = logits(model, IDS)
    got = logits(as_linears(model), IDS)
    assert got.dtype is torch.float64
    assert_close(got, wanted, 1e-14)


@every_model
def test_every_weight_of_the_list_decides_the_outputs_and_is_a_linears_weight_afterwards(
    name: str,
) -> None:
    model = MODELS[name]()
    wanted, names = logits(model, IDS), set(fused(model))
    own = {id(model.get_parameter(key)) for key in names}
    listed = list(rebuildable(model))
    assert {id(held.parameter) for one in listed for held in one.weights} == own
    for one in listed:
        held = [(h.path, h.matrix.clone(), h.matrix.data_ptr()) for h in one.weights]
        assert sum(matrix.numel() for _, matrix, _ in held) == sum(
            p.numel() for p in one.module.parameters() if id(p) in own
        )
        assert len({pointer for *_, pointer in held}) == len(held)  # no two are one
        assert len({path for path, *_ in held}) == len(held)
        new = replace_module(model, one)
        assert model.get_submodule(one.name) is new
        for path, matrix, _ in held:
            linear = new.get_submodule(path)
            assert type(linear) is nn.Linear
            assert torch.equal(linear.weight, matrix), path
            assert linear.weight.is_contiguous()
            assert (linear.out_features, linear.in_features) == tuple(matrix.shape)
    for one in listed:  # the same places, emptied
        new = model.get_submodule(one.name)
        for path in [h.path for h in one.weights]:
            new.get_parameter(f"{path}.weight" if path else "weight").detach().zero_()
    assert not torch.allclose(logits(model, IDS), wanted, atol=0.1)


def test_experts_keep_their_gradients() -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model(IDS, use_cache=False).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before = MODELS["gpt_oss"]()
    after = as_linears(copy.deepcopy(before))
    wanted, got = gradients(before), gradients(after)
    prefix = "model.layers.0.mlp.experts"
    for expert in range(4):
        for old, new in (("gate_up_proj", "up_proj"), ("down_proj", "down_proj")):
            stack = wanted[f"{prefix}.{old}"][expert].T
            bias = wanted[f"{prefix}.{old}_bias"][expert]
            assert stack.abs().max() > 1e-3
            assert_close(got[f"{prefix}.{new}.{expert}.weight"], stack, 1e-5)
            assert_close(got[f"{prefix}.{new}.{expert}.bias"], bias, 1e-5)
    others = [name for name in wanted if prefix not in name]
    assert len(others) > 5
    for name in others:
        assert_close(got[name], wanted[name], 1e-5)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "llama4", "dbrx"])
def test_experts_without_any_token_are_no_obstacle(name: str, length: int) -> None:
    model = MODELS[name]()
    ids = token_ids(1, length)
    wanted = logits(model, ids)
    assert_close(logits(as_linears(model), ids), wanted)


# What it is applied to.


def test_what_is_no_such_module_stays_as_it_is() -> None:
    for model in (mlp(), tiny_llama()):
        before, modules = state(model), list(model.modules())
        assert as_linears(model) is model
        assert list(model.modules()) == modules
        assert changed(model, before) == []


def test_other_parameters_stay_the_same_objects() -> None:
    model = MODELS["mixtral"]()
    others = [(n, p) for n, p in model.named_parameters() if "experts" not in n]
    as_linears(model)
    now = dict(model.named_parameters())
    assert len(others) > 5
    assert all(now[name] is parameter for name, parameter in others)


def test_a_conv1d_that_is_the_model_is_returned_as_a_linear() -> None:
    torch.manual_seed(0)
    conv, x = Conv1D(6, 5), activations(7, 5)
    conv.bias.detach().normal_()
    bias = conv.bias
    linear: Any = as_linears(conv)
    assert type(linear) is nn.Linear
    assert linear.bias is bias
    assert_close(linear(x), conv(x))


def test_experts_that_are_the_model_are_returned_as_the_new_ones() -> None:
    (experts,) = expert_modules(MODELS["mixtral"]())
    x, index = activations(5, 32), torch.tensor([[0, 1], [2, 1], [3, 0], [1, 0], [2, 3]])
    shares = torch.tensor([[0.7, 0.3]]).expand(5, 2)
    wanted = experts(x, index, shares)
    new = as_linears(experts)
    assert isinstance(new, UnfusedExperts)
    assert_close(new(x, index, shares), wanted)


def test_what_is_routed_to_nobody_counts_for_nothing_compiled_or_not() -> None:
    (experts,) = expert_modules(MODELS["mixtral"]())
    new = as_linears(experts)
    x = activations(3, 32)
    index, shares = torch.tensor([[0, 4], [4, 4], [2, 1]]), torch.full((3, 2), 0.5)
    got = new(x, index, shares)
    assert torch.equal(got[1], torch.zeros(32))
    assert_close(got[:1], 0.5 * new(x[:1], torch.tensor([[0]]), torch.ones(1, 1)))
    torch.compiler.reset()
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    assert_close(compiled(x, index, shares), got)


def assert_a_second_time_changes_nothing(name: str) -> None:
    model = as_linears(MODELS[name]())
    modules, before = list(model.modules()), state(model)
    assert as_linears(model) is model
    assert list(model.modules()) == modules
    assert changed(model, before) == []


def test_a_second_time_it_finds_nothing_to_do_with_conv1d_llama4_and_dbrx() -> None:
    for name in ("gpt2", "llama4", "dbrx"):
        assert_a_second_time_changes_nothing(name)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_second_time_it_finds_nothing_to_do(name: str) -> None:
    assert_a_second_time_changes_nothing(name)


# Modules that the model holds more than once.


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama4", "dbrx"])
def test_a_module_that_is_held_twice_is_replaced_in_both_places(name: str) -> None:
    class Twice(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.again = nn.ModuleList(one.module for one in rebuildable(model))

    model = MODELS[name]()
    wanted, whole = logits(model, IDS), Twice(model)
    places = [one.name for one in rebuildable(model)]
    as_linears(whole)
    assert fused(whole) == []
    for place, again in zip(places, whole.again, strict=True):
        assert model.get_submodule(place) is again
    assert_close(logits(model, IDS), wanted)


def test_a_module_that_its_parent_holds_twice_is_replaced_in_both_places() -> None:
    torch.manual_seed(0)
    conv = Conv1D(8, 8)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    x = activations(5, 8)
    wanted = model(x)
    as_linears(model)
    assert model[0] is model[2]
    assert type(model[0]) is nn.Linear
    assert_close(model(x), wanted)


# What is kept.


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "dbrx"])
def test_training_modes_are_kept(name: str) -> None:
    model = MODELS[name]()
    listed = [one.name for one in rebuildable(model)]
    for at, place in enumerate(listed):
        model.get_submodule(place).train(at % 2 == 0)
    before = {key: module.training for key, module in model.named_modules()}
    as_linears(model)
    after = {key: module.training for key, module in model.named_modules()}
    assert [after[key] for key in before if key in after] == [
        before[key] for key in before if key in after
    ]
    for at, place in enumerate(listed):
        modes = {module.training for module in model.get_submodule(place).modules()}
        assert modes == {at % 2 == 0}


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama4", "dbrx"])
def test_requires_grad_is_kept_for_each_weight(name: str) -> None:
    model = MODELS[name]()
    frozen = fused(model)[::2]
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    wanted = [
        (h.parameter.requires_grad, one.name, h.path)
        for one in rebuildable(model)
        for h in one.weights
    ]
    assert {grad for grad, *_ in wanted} == {True, False}
    as_linears(model)
    for grad, place, path in wanted:
        linear = model.get_submodule(place).get_submodule(path)
        assert linear.weight.requires_grad == grad


def test_a_bias_keeps_its_own_requires_grad() -> None:
    model = MODELS["gpt_oss"]()
    (experts,) = expert_modules(model)
    experts.get_parameter("gate_up_proj").requires_grad_(False)
    experts.get_parameter("down_proj_bias").requires_grad_(False)
    as_linears(model)
    for at in range(4):
        prefix = "model.layers.0.mlp.experts"
        up = model.get_submodule(f"{prefix}.up_proj.{at}")
        down = model.get_submodule(f"{prefix}.down_proj.{at}")
        assert (up.weight.requires_grad, up.bias.requires_grad) == (False, True)
        assert (down.weight.requires_grad, down.bias.requires_grad) == (True, False)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama4", "dbrx"])
def test_dtypes_are_kept(name: str) -> None:
    model = as_linears(MODELS[name]().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, IDS).dtype is torch.bfloat16


@every_model
def test_copies_and_pickles_compute_the_same_on_weights_of_their_own(name: str) -> None:
    model = as_linears(MODELS[name]())
    wanted = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, IDS), wanted)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert torch.equal(logits(model, IDS), wanted)


@every_model
def test_a_state_dict_fits_another_model_after_as_linears(name: str) -> None:
    model, other = as_linears(MODELS[name]()), as_linears(MODELS[name]())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, IDS), logits(model, IDS))


# Compiled.


@every_model
@pytest.mark.slow_if("deepseek_v3", "llama4")
def test_the_whole_compiles_to_one_graph_that_computes_the_same(name: str) -> None:
    torch.compiler.reset()
    model = as_linears(MODELS[name]())
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(logits(compiled, IDS), logits(model, IDS))
    ids = token_ids(3, 9, seed=2)  # other tokens go to other experts
    assert_close(logits(compiled, ids), logits(model, ids))


def test_one_compiled_graph_serves_every_routing() -> None:
    torch.compiler.reset()
    (experts,) = expert_modules(MODELS["gpt_oss"]())
    new = as_linears(experts)
    graphs: list[Any] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(new, backend=backend, fullgraph=True)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        index = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(6)])
        shares, x = torch.rand(6, 2, generator=g), activations(6, 32, seed=seed)
        with torch.no_grad():
            assert_close(compiled(x, index, shares), new(x, index, shares))
    assert len(graphs) == 1


def test_a_conv1d_inside_any_module_is_found() -> None:
    torch.manual_seed(0)
    model = Formula(lambda m, x: m.deep["a"](x).relu(), deep=nn.ModuleDict({"a": Conv1D(4, 6)}))
    x = activations(3, 6)
    wanted = model(x)
    assert [one.name for one in rebuildable(model)] == ["deep.a"]
    assert_close(as_linears(model)(x), wanted)
