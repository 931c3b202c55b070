"""Every private name of other packages that is used: what is relied on, and that it still holds.

A release that changes one of them fails here, by its name, before it makes a model wrong. A new
use fails here too, until it is in one file and has its test in PROMISES.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from private_names import private_names
from tiny_models import tiny_llama, tiny_mixtral
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.utils import recommended_inductor_config_setter
from transformers import TorchAoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from magr_fx.config import MagRConfig
from magr_fx.passes.collecting import spill
from magr_fx.passes.entries.torchao_flow import prepare_or_convert
from magr_fx.passes.graphs import trace, vmap
from magr_fx.passes.graphs.torch_private import (
    GetAttrKey,
    HigherOrderOperator,
    MappingKey,
    OperatorBase,
    OpOverload,
    expression_of,
    schema_of,
    statically_known_true,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
    version_of,
)
from magr_fx.passes.graphs.torchao_private import apply_config, takes_parameter_names
from magr_fx.passes.handover import torchao_rounding
from magr_fx.passes.inputs.dataclass_inputs import dataclasses_open
from magr_fx.passes.known_layers import all_experts
from magr_fx.passes.known_layers.transformers_private import activated, has_expert_interface
from magr_fx.passes.tracing import read_exported
from magr_fx.passes.tracing.make_fx import compiled_parts_run

aten = torch.ops.aten
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]


# torch: nested values, ops, tensors


class Pair(NamedTuple):
    first: Any
    second: Any


def test_pytree() -> None:
    nested = {"b": [1, (2, None)], "a": Pair(3, {"c": 4})}
    leaves, spec = tree_flatten(nested)
    assert leaves == tree_leaves(nested) == [1, 2, None, 3, 4]  # a mapping in its own order
    assert tree_unflatten(leaves, spec) == nested
    assert tree_map_only(int, lambda x: -x, nested) == {
        "b": [-1, (-2, None)],
        "a": Pair(-3, {"c": -4}),
    }
    kept = tree_map(lambda x: x, nested, is_leaf=lambda x: isinstance(x, list))
    assert kept["b"] is nested["b"]
    path = tree_flatten_with_path(nested)[0][-1][0]
    assert [key.key for key in path if isinstance(key, MappingKey)] == ["a", "c"]


def test_tree_spec() -> None:
    _, spec = tree_flatten(((1, 2), {"x": 3}))
    positional, keyword = spec.children()
    assert (positional.type, keyword.type) == (tuple, dict)
    assert (positional.num_children, list(keyword.context)) == (2, ["x"])
    assert spec.flatten_up_to(((4, 5), {"x": 6})) == [4, 5, 6]
    with pytest.raises(ValueError, match="mismatch"):
        spec.flatten_up_to(((4, 5, 6), {"x": 7}))
    assert tree_flatten(((7, 8), {"x": 9}))[1] == spec


def test_ops() -> None:
    assert schema_of(aten.linear.default).name == "aten::linear"
    assert not schema_of(aten.linear.default).is_mutable
    assert schema_of(aten.add_.Tensor).is_mutable
    assert schema_of(torch.ops.higher_order.cond) is schema_of(torch.relu) is None
    assert isinstance(aten.linear.default, OpOverload)
    assert aten.view.default.is_view
    assert not aten.linear.default.is_view
    assert isinstance(torch.ops.higher_order.cond, HigherOrderOperator)
    assert issubclass(OpOverload, OperatorBase)
    assert issubclass(HigherOrderOperator, OperatorBase)


def test_version() -> None:
    tensor = torch.zeros(4)
    before = version_of(tensor)
    tensor[:2].add_(1)
    assert version_of(tensor) > before


def test_storage_weak_ref() -> None:
    tensor = torch.zeros(4)
    at = spill.memory_of(tensor)
    assert at == spill.memory_of(tensor[2:])
    assert hash(at) == hash(spill.memory_of(tensor[2:]))
    assert at != spill.memory_of(torch.zeros(4))
    assert not at.expired()  # type: ignore[no-untyped-call]
    del tensor
    assert at.expired()  # type: ignore[no-untyped-call]


def test_module_registries() -> None:
    """What a module holds is in three dicts, and is read from there."""
    module, inner = nn.Linear(2, 2), nn.ReLU()
    module.register_buffer("mask", torch.ones(2))
    module.add_module("inner", inner)
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module._buffers) == ["mask"]
    assert list(module._modules) == ["inner"]
    other = nn.Parameter(torch.zeros(2, 2))
    module._parameters["weight"], module._buffers["mask"] = other, torch.zeros(2)
    module._modules["inner"] = nn.Identity()
    assert module.weight is dict(module.named_parameters())["weight"] is other
    assert not module.mask.any()  # type: ignore[operator]
    assert isinstance(module.inner, nn.Identity)


def test_module_hooks() -> None:
    module, calls = nn.Identity(), list[str]()
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    assert [len(module._forward_pre_hooks), len(module._forward_hooks)] == [1, 1]
    module(1)
    module._forward_pre_hooks, module._forward_hooks = type(module._forward_hooks)(), {}
    module(1)
    assert calls == ["before", "after"]


def test_linear_of_multihead_attention() -> None:
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    assert type(nn.MultiheadAttention(4, 2).out_proj) is NonDynamicallyQuantizableLinear


# torch: tracing


class Whole(nn.Module):
    """A branch on a size, autocast, and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y * scale  # type: ignore[no-any-return]


def exported(model: nn.Module, *args: Any, check_guards: bool = True, **kwargs: Any) -> Any:
    auto = torch.export.Dim.AUTO
    shapes = {
        name: {0: auto} if isinstance(value, torch.Tensor) and value.dim() > 1 else None
        for name, value in inspect.signature(model.forward).bind(*args, **kwargs).arguments.items()
    }
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return program.module(check_guards=check_guards)


def test_input_spec_of_an_exported_graph() -> None:
    graph = exported(Whole().eval(), torch.ones(3, 4), scale=torch.ones(4))
    assert isinstance(graph.graph._codegen, read_exported._PyTreeCodeGen)  # type: ignore[attr-defined]
    spec = graph.graph._codegen.pytree_info.in_spec
    positional, keyword = spec.children()
    assert (positional.type, positional.num_children) == (tuple, 1)
    assert (keyword.type, list(keyword.context)) == (dict, ["scale"])


def test_guards() -> None:
    values = torch.ones(3, 4), torch.ones(4)
    graph = exported(Whole().eval(), values[0], scale=values[1])
    guards = getattr(graph, trace.GUARDS)
    guards(*values)
    guards(torch.ones(5, 4), values[1])
    with pytest.raises(AssertionError):
        guards(torch.ones(3, 5), values[1])
    free = exported(Whole().eval(), values[0], scale=values[1], check_guards=False)
    assert not hasattr(free, trace.GUARDS)


def test_sizes_that_are_symbols() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    graph = exported(Sum(), torch.ones(3, 4), torch.ones(3, 4))
    x, y = (node.meta["val"].shape[0] for node in graph.graph.find_nodes(op="placeholder"))
    assert isinstance(x, torch.SymInt)
    assert expression_of(x) == expression_of(y)
    assert expression_of(2 * x).free_symbols == expression_of(x).free_symbols != set()
    assert statically_known_true(x >= 2)
    assert not statically_known_true(x >= 100)
    assert statically_known_true(True)


def targets_of(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    made: fx.GraphModule = make_fx(
        function,
        tracing_mode="real",
        pre_dispatch=True,
        _error_on_data_dependent_ops=False,
    )(*inputs)
    return made


def test_make_fx() -> None:
    def decide(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, w)
        return y + 1 if bool(x.sum() > 0) else y

    targets = targets_of(traced(decide, torch.ones(2, 3), torch.ones(4, 3)))
    assert aten.linear.default in targets
    assert aten.add.Tensor in targets


def test_autocast_and_gradient_mode_in_graphs() -> None:
    from magr_fx.passes.graphs.inline import (
        _AUTOCAST_REGION,
        _ENTER,
        _EXIT,
        _GRAD_MODE,
        _GRAD_REGION,
    )

    def both(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            x = x @ x
        with torch.enable_grad():
            return x * 2

    with torch.no_grad():
        graph = traced(both, torch.ones(3, 3))
    nodes = {node.target: node for node in graph.graph.nodes}
    assert nodes[_ENTER].args[:4] == ("cpu", torch.bfloat16, True, False)
    assert _EXIT in nodes
    assert _GRAD_MODE in nodes

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return both(x)

    with torch.no_grad():
        graph = exported(Both(), torch.ones(3, 3))
    nodes = {node.target: node for node in graph.graph.nodes}
    region = nodes[_AUTOCAST_REGION].args
    assert region[:4] == ("cpu", torch.bfloat16, True, False)
    assert region[4].op == "get_attr"
    assert isinstance(getattr(graph, region[4].target), fx.GraphModule)
    enabled, inner = nodes[_GRAD_REGION].args[:2]
    assert enabled is True
    assert inner.op == "get_attr"


def test_module_paths_of_traced_nodes() -> None:
    def noted(x: torch.Tensor) -> torch.Tensor:
        fx.traceback.current_meta["nn_module_stack"] = {"layer": ("layer", nn.Linear)}
        try:
            return x + 1
        finally:
            del fx.traceback.current_meta["nn_module_stack"]

    with fx.traceback.preserve_node_meta():
        graph = traced(noted, torch.ones(2))
    (node,) = (node for node in graph.graph.nodes if node.target is aten.add.Tensor)
    assert node.meta["nn_module_stack"] == {"layer": ("layer", nn.Linear)}


def test_dispatch_mode() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            ops.append(func)
            return func(*args, **(kwargs or {}))

    ops: list[Any] = []
    tensor = torch.zeros(2)
    with Seen():  # type: ignore[no-untyped-call]
        tensor.add_(1)
    assert ops == [aten.add_.Tensor]


def test_functorch() -> None:
    seen: list[tuple[bool, bool]] = []

    def row(x: torch.Tensor) -> torch.Tensor:
        seen.append((vmap.in_transform(), vmap.is_batched(x)))
        assert vmap.unwrapped(x).shape == (3, 2)
        return x * 2

    rows = torch.ones(3, 2)
    torch.vmap(row)(rows)
    assert seen == [(True, True)]
    assert not vmap.in_transform()
    assert not vmap.is_batched(rows)

    class Mapped(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.vmap(lambda one: one * 2)(x)

    graph = exported(Mapped(), rows)
    assert [d for node in graph.graph.nodes if (d := vmap.vmap_depth(node))] == [1, -1]


def test_compiled_modules() -> None:
    from magr_fx.errors import ModelError
    from magr_fx.passes.rewriting.check_model import check_not_frozen

    model: Any = nn.Sequential(nn.Linear(2, 2))
    wrapper: Any = torch.compile(model)
    assert trace.unwrap(wrapper) is model
    check_not_frozen(wrapper)
    with pytest.raises(ModelError, match="freezing"):
        check_not_frozen(torch.compile(model, options={"freezing": True}))  # type: ignore[arg-type]
    model[0].compile(options={"freezing": True})  # type: ignore[index]
    assert model[0]._compiled_call_impl is not None  # type: ignore[index]
    with pytest.raises(ModelError, match="0 is compiled with inductor's freezing"):
        check_not_frozen(model)


# torchao


def test_handlers() -> None:
    made: Any = apply_config(nn.Linear(8, 4), INT4)
    assert isinstance(made, nn.Linear)
    assert torchao_rounding.has_grid(made.weight)
    assert takes_parameter_names(INT4)
    holder = nn.Module()
    holder.other = nn.Parameter(torch.randn(4, 8), requires_grad=False)
    quantize_(holder, FqnToConfig({"other": INT4}), filter_fn=None)
    assert torchao_rounding.has_grid(holder.other)


def test_own_config_is_registered() -> None:
    from magr_fx.passes.graphs.torchao_private import _QUANTIZE_CONFIG_HANDLER  # type: ignore[attr-defined]

    assert _QUANTIZE_CONFIG_HANDLER[MagRConfig] is prepare_or_convert


def test_code_bounds() -> None:
    for bits in range(1, 9):
        bounds = torchao_rounding._DTYPE_TO_QVALUE_BOUNDS[getattr(torch, f"int{bits}")]  # type: ignore[attr-defined]
        assert tuple(bounds) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_reduced_range() -> None:
    """A tensor tells whether its codes use half of their range."""
    linear = nn.Linear(8, 4)
    config = Int8DynamicActivationInt8WeightConfig(reduce_range=True, set_inductor_config=False)
    quantize_(linear, config)
    weight: Any = linear.weight
    assert isinstance(weight, Int8Tensor)
    assert weight.reduce_range is True
    assert int(weight.qdata.abs().max()) <= 64


def test_quantized_tensors_have_one_base() -> None:
    from magr_fx.passes.graphs.torchao_private import is_quantized

    for config in (INT4, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)):
        linear = nn.Linear(32, 4)
        quantize_(linear, config)
        assert is_quantized(linear.weight)
    assert not is_quantized(nn.Linear(4, 4).weight)


def test_inductor_settings() -> None:
    assert not inspect.signature(recommended_inductor_config_setter).parameters


def test_stored_form_of_quantized_tensors() -> None:
    """Tensors by plain names, and what tells them apart; transformers reads it back."""
    linear = nn.Linear(8, 4)
    quantize_(linear, INT4)
    weight: Any = linear.weight
    state = {"a.weight": weight.detach(), "a.bias": torch.ones(4)}
    flat, metadata = flatten_tensor_state_dict(state)
    assert all(type(tensor) is torch.Tensor for tensor in flat.values())
    assert "a.bias" in flat
    assert set(json.loads(metadata["tensor_names"])) == set(state)
    back, left = unflatten_tensor_state_dict(flat, metadata)
    assert not left
    assert torch.equal(back["a.weight"].dequantize(), weight.dequantize())
    assert torch.equal(back["a.bias"], state["a.bias"])


# transformers


def test_names_that_are_stored() -> None:
    """A model's tensors by the names that its files have, stacks of experts taken apart."""
    llama = tiny_llama()
    assert revert_weight_conversion(llama, llama.state_dict()).keys() == llama.state_dict().keys()
    mixtral = tiny_mixtral()
    (name,) = (n for n in mixtral.state_dict() if n.endswith("layers.0.mlp.experts.down_proj"))
    stack = mixtral.state_dict()[name]
    parts = revert_weight_conversion(mixtral, {name: stack})
    assert len(parts) == len(stack)
    assert all(torch.equal(part, one) for part, one in zip(parts.values(), stack, strict=True))


def test_what_is_left_unquantized() -> None:
    assert HfQuantizer.get_modules_to_not_convert(tiny_llama()) == ["lm_head"]
    assert should_convert_module("model.layers.0.mlp.up_proj", ["lm_head"])
    assert not should_convert_module("lm_head", ["lm_head"])
    assert not should_convert_module("model.layers.1.mlp.up_proj", ["model.layers.1"])
    assert should_convert_module("model.layers.11.mlp.up_proj", ["model.layers.1"])
    assert should_convert_module("lm_head", [])


def test_quantizer_of_transformers() -> None:
    model = tiny_llama()
    quantizer = AutoHfQuantizer.from_config(TorchAoConfig(INT4), pre_quantized=False)
    quantizer.preprocess_model(model)
    wanted = {
        n for n, _ in model.named_parameters() if quantizer.param_needs_quantization(model, n)
    }
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert wanted == linears - {"lm_head.weight"}


def test_expert_interface() -> None:
    model = tiny_mixtral().eval()
    stacks: list[Any] = [m for m in model.modules() if has_expert_interface(m)]
    assert len(stacks) == model.config.num_hidden_layers
    assert all(all_experts.is_experts(stack) for stack in stacks)
    assert not has_expert_interface(nn.Linear(2, 2))
    first = stacks[0]
    assert (first.has_gate, first.is_transposed, first.has_bias) == (True, False, False)
    assert first.has_post_expert_norm is False
    inner = torch.randn(3, first.gate_up_proj.shape[1])
    gate, up = inner.chunk(2, dim=-1)
    torch.testing.assert_close(activated(first, inner), first.act_fn(gate) * up)


def test_table_of_expert_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dense = all_experts.dense_forward

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return dense(*args)

    monkeypatch.setattr(all_experts, "dense_forward", counted)
    model = tiny_mixtral().eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with all_experts.all_experts(model):
            found = model(ids).logits
        again = model(ids).logits
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected)
    assert torch.equal(again, expected)


def test_conv1d() -> None:
    layer = Conv1D(5, 3)  # out, in
    assert layer.weight.shape == (3, 5)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_model_of_a_config() -> None:
    config = tiny_llama().config
    with torch.device("meta"):
        model = type(tiny_llama())._from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tied_weights() -> None:
    assert tiny_llama(tie_word_embeddings=True).all_tied_weights_keys == {
        "lm_head.weight": "model.embed_tokens.weight"
    }


# accelerate


def test_hooks_of_accelerate(tmp_path: Any) -> None:
    from accelerate import cpu_offload, disk_offload

    inputs = torch.randn(3, 4)
    for offload in (cpu_offload, disk_offload):
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        expected, weight = model(inputs), model[0].weight.detach().clone()
        options = {"offload_dir": tmp_path} if offload is disk_offload else {}
        offload(model, execution_device=torch.device("cpu"), offload_buffers=True, **options)
        assert model[0].weight.is_meta
        hook = next(one for one in _hooks(model[0]) if getattr(one, "offload", False))
        assert torch.device(hook.execution_device) == torch.device("cpu")
        assert hook.place_submodules is False
        values = hook.weights_map
        assert torch.equal(values["weight"], weight)
        if offload is disk_offload:
            assert values.prefix == "0."
            kept = values.dataset
            assert torch.equal(kept["0.weight"], weight)
            assert set(kept.index["0.weight"]) >= {"dtype", "shape"}
            assert str(kept.save_folder) == str(tmp_path)
            assert not kept.state_dict
        assert callable(model[0]._old_forward)
        torch.testing.assert_close(model(inputs), expected)


def test_a_whole_model_can_be_on_the_disk(tmp_path: Any) -> None:
    """What transformers asks of accelerate for ``device_map={"": "disk"}``; before 1.15 refused."""
    from accelerate import dispatch_model
    from accelerate.utils import offload_state_dict

    model = nn.Sequential(nn.Linear(4, 4))
    expected, inputs = model[0].weight.detach().clone(), torch.randn(3, 4)  # type: ignore[operator]
    outputs = model(inputs)
    offload_state_dict(tmp_path, model.state_dict())
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    assert model[0].weight.is_meta
    hook = next(one for m in model.modules() for one in _hooks(m) if getattr(one, "offload", False))
    assert torch.equal(hook.weights_map.dataset["0.weight"], expected)
    torch.testing.assert_close(model(inputs), outputs)


def _hooks(module: nn.Module) -> Any:
    hook: Any = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


# The list

PYTREE = (
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "MappingKey",
)


def test_types_are_taken_out_of_trees_again() -> None:
    @dataclass
    class Pair:
        first: int
        second: int

    with dataclasses_open([Pair(1, 2)]):
        assert tree_leaves(Pair(1, 2)) == [1, 2]
        (path, _), _ = tree_flatten_with_path(Pair(1, 2))[0]
        assert isinstance(path[0], GetAttrKey)
        assert path[0].name == "first"
    assert tree_leaves(Pair(1, 2)) == [Pair(1, 2)]


def test_fake_tensors_are_told() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(torch.ones(2), FakeTensor)
    assert not isinstance(torch.ones(2), FakeTensor)


def test_compiled_functions_run_as_they_were_written_in_make_fx() -> None:
    compiled = torch.compile(torch.relu)
    with compiled_parts_run():
        graph = make_fx(compiled)(torch.ones(2)).graph
    assert any(node.target is aten.relu.default for node in graph.nodes)
    with pytest.raises(RuntimeError, match="FX to symbolically trace a dynamo-optimized"):
        make_fx(compiled)(torch.ones(2))


@pytest.mark.filterwarnings("ignore:Config Deprecation:UserWarning")
def test_default_config_of_torchao() -> None:
    """FqnToConfig's config for linears that no name and no pattern takes."""
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
    quantize_(model, FqnToConfig({"1": None, "_default": INT4}), filter_fn=None)
    kinds = [type(layer.weight).__name__ for layer in model]
    assert kinds == ["IntxUnpackedToInt8Tensor", "Parameter"]


PROMISES: dict[str, Callable[..., None]] = {
    "torch.utils._pytree": test_types_are_taken_out_of_trees_again,
    "torch.utils._pytree.GetAttrKey": test_types_are_taken_out_of_trees_again,
    "_deregister_pytree_node": test_types_are_taken_out_of_trees_again,
    "_private_register_pytree_node": test_types_are_taken_out_of_trees_again,
    "torch._subclasses.fake_tensor.FakeTensor": test_fake_tensors_are_told,
    "torch._dynamo.config": test_compiled_functions_run_as_they_were_written_in_make_fx,
    **{f"torch.utils._pytree.{name}": test_pytree for name in PYTREE},
    "torch.utils._pytree.TreeSpec": test_tree_spec,
    "torch._ops.HigherOrderOperator": test_ops,
    "torch._ops.OpOverload": test_ops,
    "torch._ops.OperatorBase": test_ops,
    "_schema": test_ops,
    "_version": test_version,
    "torch.multiprocessing.reductions.StorageWeakRef": test_storage_weak_ref,
    "_parameters": test_module_registries,
    "_modules": test_module_registries,
    "_buffers": test_module_registries,
    "_forward_hooks": test_module_hooks,
    "_forward_pre_hooks": test_module_hooks,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": test_linear_of_multihead_attention,
    "torch.fx.graph._PyTreeCodeGen": test_input_spec_of_an_exported_graph,
    "_codegen": test_input_spec_of_an_exported_graph,
    "_guards_fn": test_guards,
    "torch.fx.experimental.symbolic_shapes.statically_known_true": test_sizes_that_are_symbols,
    "expr": test_sizes_that_are_symbols,
    "torch.fx.experimental.proxy_tensor.make_fx": test_make_fx,
    "_error_on_data_dependent_ops": test_make_fx,
    "_enter_autocast": test_autocast_and_gradient_mode_in_graphs,
    "_exit_autocast": test_autocast_and_gradient_mode_in_graphs,
    "_set_grad_enabled": test_autocast_and_gradient_mode_in_graphs,
    "torch.fx.traceback": test_module_paths_of_traced_nodes,
    "torch.utils._python_dispatch.TorchDispatchMode": test_dispatch_mode,
    "_functorch": test_functorch,
    "_vmap_increment_nesting": test_functorch,
    "_vmap_decrement_nesting": test_functorch,
    "_orig_mod": test_compiled_modules,
    "_compiled_call_impl": test_compiled_modules,
    "dynamo_ctx": test_compiled_modules,
    "compiler_config": test_compiled_modules,
    "get_compiler_config": test_compiled_modules,
    "torchao.quantization.transform_module._QUANTIZE_CONFIG_HANDLER": test_handlers,
    "torchao.quantization.transform_module.register_quantize_module_handler": (
        test_own_config_is_registered
    ),
    "torchao.quantization.quant_primitives._DTYPE_TO_QVALUE_BOUNDS": test_code_bounds,
    "reduce_range": test_reduced_range,
    "_default": test_default_config_of_torchao,
    "torchao.utils.TorchAOBaseTensor": test_quantized_tensors_have_one_base,
    "torchao.quantization.utils.recommended_inductor_config_setter": test_inductor_settings,
    "torchao.prototype.safetensors.safetensors_support.flatten_tensor_state_dict": (
        test_stored_form_of_quantized_tensors
    ),
    "transformers.core_model_loading.revert_weight_conversion": test_names_that_are_stored,
    "transformers.quantizers.HfQuantizer": test_what_is_left_unquantized,
    "transformers.quantizers.quantizers_utils.should_convert_module": test_what_is_left_unquantized,
    "transformers.quantizers.AutoHfQuantizer": test_quantizer_of_transformers,
    "_apply_gate": test_expert_interface,
    "has_bias": test_expert_interface,
    "has_gate": test_expert_interface,
    "has_post_expert_norm": test_expert_interface,
    "is_transposed": test_expert_interface,
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS": test_table_of_expert_functions,
    "_experts_implementation_internal": test_table_of_expert_functions,
    "transformers.pytorch_utils.Conv1D": test_conv1d,
    "_from_config": test_model_of_a_config,
    "all_tied_weights_keys": test_tied_weights,
    "_hf_hook": test_hooks_of_accelerate,
    "_old_forward": test_hooks_of_accelerate,
    "dataset": test_hooks_of_accelerate,
    "place_submodules": test_hooks_of_accelerate,
    "weights_map": test_hooks_of_accelerate,
}
# What several files read, each of another object: nn.Module's registries, and what tells how the
# stacks of a layer of experts are laid out.
ANYWHERE = {
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_modules",
    "_parameters",
    "has_bias",
    "has_gate",
    "has_post_expert_norm",
    "is_transposed",
}


def test_every_private_name_is_in_one_file_and_has_its_test() -> None:
    used = private_names()
    del used["_C"]  # a module: what is used of it has a name of its own
    assert used.keys() - PROMISES.keys() == set(), "write a test of what is relied on"
    assert PROMISES.keys() - used.keys() == set(), "no longer used: take it off the list"
    scattered = {n: sorted(f) for n, f in used.items() if len(f) > 1 and n not in ANYWHERE}
    assert scattered == {}, "import it from one file: passes/graphs/torch_private.py, for one"
