"""Which streams are rotated, what becomes of the weights, and that the outputs stay."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ZOO
from targets import ASYMMETRIC, intx
from tiny_models import (
    activations,
    t5_calib,
    text_calib,
    tiny_bert,
    tiny_gpt_neox,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    tiny_t5,
    tiny_vit,
    vit_calib,
)
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from toys import changed, state

from magr_fx import (
    ConfigError,
    MagRPass,
    MagRReport,
    ModelError,
    RotatePass,
    magr_quantize,
    rotate_transform,
)
from magr_fx.passes.rotating import rotate_model
from magr_fx.passes.rotating.rotate_weights import rotate_weights
from magr_fx.reporting.report_files import read_report, write_report

WIDTH, HEADS = 16, 4


class Block(nn.Module):
    """A pre-norm transformer block with every choice that a model may make."""

    def __init__(self, norm: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = norm, copy.deepcopy(norm)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 24, bias=bias), nn.Linear(24, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (
            one(y).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.o(mixed.reshape(x.shape))
        inner: Tensor = self.down(functional.silu(self.up(self.second(x))))
        return x + inner


class Rms(nn.Module):
    """LlamaRMSNorm, or Gemma's, which multiplies with 1 + weight."""

    def __init__(self, *, plus_one: bool = False) -> None:
        super().__init__()
        self.weight, self.plus_one = nn.Parameter(torch.randn(WIDTH)), plus_one

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight) if self.plus_one else self.weight * x


class Model(nn.Module):
    """An embedding, blocks, a norm and a head."""

    def __init__(self, norm: Callable[[], nn.Module], *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, WIDTH)
        self.positions = nn.Parameter(torch.randn(6, WIDTH))
        self.blocks = nn.Sequential(Block(norm(), bias=bias), Block(norm(), bias=bias))
        self.norm, self.head = norm(), nn.Linear(WIDTH, 20, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "Llama's": Rms,
    "Gemma's": lambda: Rms(plus_one=True),
    "nn.RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "nn.LayerNorm": layer_norm,
    "without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
}
IDS = [torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def rotated(model: nn.Module) -> dict[str, int]:
    """The streams that were rotated, with their blocks."""
    found: Any = model.magr_rotations
    return {one.name: one.block for one in found if not one.reason}


def reasons(model: nn.Module) -> dict[str, str]:
    found: Any = model.magr_rotations
    return {one.name: one.reason for one in found if one.reason}


def assert_same_outputs(model: nn.Module, other: nn.Module, batches: Any, within: float) -> None:
    with torch.no_grad():
        for batch in batches:
            arguments = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            args = (batch,) if isinstance(batch, Tensor) else ()
            one, two = (m(*args) if args else m(**arguments) for m in (model, other))
            for a, b in zip(leaves(one), leaves(two), strict=True):
                assert (a - b).norm() <= within * b.norm()


def leaves(outputs: Any) -> list[Tensor]:
    found = tree_leaves(outputs)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("norm", NORMS)
def test_both_kinds_of_streams_are_rotated_and_the_outputs_stay(norm: str) -> None:
    model = Model(NORMS[norm]).double()
    before = copy.deepcopy(model)
    assert rotate_transform(model, IDS) is model
    heads = {f"blocks.{i}.o.weight": WIDTH // HEADS for i in range(2)}
    (residual,) = [name for name, block in rotated(model).items() if block == WIDTH]
    assert rotated(model) == {residual: WIDTH, **heads}
    assert_same_outputs(model, before, IDS, 1e-12)
    touched = changed(model, state(before))
    assert "positions" in touched
    assert not [name for name in touched if name.endswith(("q.bias", "up.bias"))] or "Layer" in norm
    for name, parameter in model.named_parameters():
        if "norm" in name or "first" in name or "second" in name:
            neutral = float("weight" in name and norm != "Gemma's")
            assert bool((parameter == neutral).all()), name


def test_the_weights_are_those_of_the_formula() -> None:
    model: Any = Model(Rms).double()
    before: Any = copy.deepcopy(model)
    rotate_transform(model, IDS)
    q = torch.linalg.lstsq(before.table.weight, model.table.weight).solution
    torch.testing.assert_close(q @ q.T, torch.eye(WIDTH).double(), rtol=0, atol=1e-10)
    old, new = before.blocks[0], model.blocks[0]
    wanted = {
        new.q.weight: old.q.weight * old.first.weight @ q,
        new.up.weight: old.up.weight * old.second.weight @ q,
        new.down.weight: q.T @ old.down.weight,
        new.down.bias: old.down.bias @ q,
        model.positions: before.positions @ q,
        model.head.weight: before.head.weight * before.norm.weight @ q,
    }
    for got, want in wanted.items():
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    # R2: per head, between v and o.
    turned = (old.v.weight * old.first.weight @ q).view(HEADS, -1, WIDTH)
    r = torch.linalg.lstsq(turned[0].T, new.v.weight.view(HEADS, -1, WIDTH)[0].T).solution
    torch.testing.assert_close(r @ r.T, torch.eye(4).double(), rtol=0, atol=1e-10)
    for head in range(HEADS):
        made = new.v.weight.view(HEADS, -1, WIDTH)[head]
        torch.testing.assert_close(made, r.T @ turned[head], rtol=0, atol=1e-10)


def test_a_norms_shift_needs_a_bias_to_go_to() -> None:
    model = Model(layer_norm, bias=False).double()
    before = copy.deepcopy(model)
    rotate_transform(model, IDS)
    assert sorted(rotated(model)) == ["blocks.0.o.weight", "blocks.1.o.weight"]
    assert "a norm's shift has no bias to go to" in reasons(model).values()
    assert_same_outputs(model, before, IDS, 1e-12)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    "llama": (tiny_llama, text_calib, 3),
    "qwen2": (tiny_qwen2, text_calib, 2),
    "mixtral": (tiny_mixtral, text_calib, 2),
    "gpt_neox": (tiny_gpt_neox, text_calib, 0),
    "bert": (tiny_bert, text_calib, 2),
    "vit": (tiny_vit, vit_calib, 2),
    "t5": (tiny_t5, t5_calib, 6),
}


def varied(model: nn.Module) -> nn.Module:
    """With norms and biases that are not 1 and 0."""
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * activations(*parameter.shape, seed=at))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_compute_the_same(name: str) -> None:
    make, calib, count = FAMILIES[name]
    model: Any = varied(make())
    before, batches = copy.deepcopy(model), calib()
    rotate_transform(model, batches)
    assert len(rotated(model)) == count
    assert_same_outputs(model, before, batches, 1e-5)


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.slow_unless("gemma", "gpt2")
def test_no_family_of_the_zoo_computes_something_else(family: str) -> None:
    model = varied(ZOO[family].make().eval())
    before = copy.deepcopy(model)
    batches = ZOO[family].calib()
    rotate_transform(model, batches)
    with torch.no_grad():
        for batch in batches:
            named: dict[str, Any] = batch if isinstance(batch, dict) else {}
            args = batch if isinstance(batch, (tuple, list)) else () if named else (batch,)
            one, two = (m(*args, **named) for m in (model, before))
            for a, b in zip(leaves(one), leaves(two), strict=True):
                if a.is_floating_point():
                    assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_tied_head_is_untied_when_asked() -> None:
    tied: Any = tiny_qwen2()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    model, before = varied(copy.deepcopy(tied)), varied(copy.deepcopy(tied))
    rotate_transform(model, text_calib())
    assert any("untie=True" in reason for reason in reasons(model).values())
    free: Any = varied(tied)
    rotate_transform(free, text_calib(), untie=True)
    assert 32 in rotated(free).values()
    assert free.lm_head.weight is not free.model.embed_tokens.weight
    assert free.config.tie_word_embeddings is False
    assert_same_outputs(free, before, text_calib(), 1e-5)


class Touched(nn.Module):
    """A stream that something other than linears, additions and norms reads."""

    def __init__(self, touch: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.inner = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.leave, self.norm = nn.Linear(WIDTH, 4), Rms()
        self.gate, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("table", torch.randn(WIDTH))
        self.touch = touch

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.enter(x)
        hidden = hidden + self.inner(self.norm(hidden))
        out: Tensor = self.leave(self.norm(self.touch(self, hidden)))
        return out


def touched(touch: Callable[[Any, Tensor], Tensor], x: Tensor) -> nn.Module:
    """A ``Touched`` without the parameters that it does not use, which would be in the way."""
    model = Touched(touch).double()
    model(x).sum().backward()
    for name, parameter in list(model.named_parameters()):
        if parameter.grad is None:
            first = name.partition(".")[0]
            if hasattr(model, first):
                delattr(model, first)
        parameter.grad = None
    return model


TOUCHES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda _, x: functional.relu(x),
    "gated": lambda m, x: x * m.gate(x).sigmoid(),
    "its own weight": lambda m, x: x + m.scale * x,
    "a buffer": lambda m, x: x + m.table,
    "a mean": lambda _, x: x - x.mean(-1, keepdim=True),
    "a maximum": lambda _, x: x / x.abs().amax(-1, keepdim=True),
    "a slice": lambda _, x: torch.cat([x[..., :4], x[..., 4:]], -1),
    "a roll": lambda _, x: x.roll(1, -1),
    "a transpose": lambda _, x: x.unsqueeze(-1).transpose(-1, -2).squeeze(-2).flip(-1),
    "a constant": lambda _, x: x + 1.0,
    "squares": lambda _, x: x + x.pow(2),
    "a power": lambda _, x: x * x.pow(4).mean(-1, keepdim=True).sqrt(),
    "a mask": lambda _, x: x.masked_fill(x > 1, 0.0),
    "einsum": lambda m, x: torch.einsum("bi,ij->bj", x, m.inner.weight.tril()),
    "cumulative": lambda _, x: x.cumsum(-1),
    "softmax": lambda _, x: x.softmax(-1),
    "in place": lambda _, x: x.clone().clamp_(-1, 1),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_anything_else_touches_is_left_alone(touch: str) -> None:
    batches = [activations(n, 8, seed=n).double() for n in (3, 5)]
    model = touched(TOUCHES[touch], batches[0])
    before = copy.deepcopy(model)
    rotate_transform(model, batches)
    assert WIDTH not in rotated(model).values()
    assert all(reasons(model).values())
    with torch.no_grad():
        for x in batches:
            assert torch.allclose(model(x), before(x), rtol=1e-10, atol=1e-12)


HARMLESS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a factor": lambda _, x: 3.0 * x / 2,
    "a factor by token": lambda _, x: x * x.pow(2).mean(-1, keepdim=True).sqrt(),
    "its norm": lambda _, x: x / (x * x).sum(-1, keepdim=True).add(1.0).sqrt(),
    "another order": lambda _, x: x.flip(0)[torch.tensor([0, 2, 1])],
    "more axes": lambda _, x: x.unsqueeze(1).expand(-1, 2, -1).reshape(-1, WIDTH)[::2],
    "parts": lambda _, x: torch.cat([x[:2], x[2:]], 0),
    "a sum of tokens": lambda _, x: x + x.mean(0, keepdim=True).expand_as(x),
    "attention": lambda _, x: (x.sum(-1) * 0).unsqueeze(0).expand(3, 3).softmax(-1) @ x,
}


@pytest.mark.parametrize("touch", HARMLESS)
def test_what_commutes_with_a_rotation_is_no_obstacle(touch: str) -> None:
    x = activations(3, 8).double()
    model = touched(HARMLESS[touch], x)
    before = copy.deepcopy(model)
    rotate_transform(model, [x])
    if touch != "attention":  # whose weights read the stream otherwise
        assert WIDTH in rotated(model).values()
    with torch.no_grad():
        assert torch.allclose(model(x), before(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_compute_the_same(seed: int) -> None:
    """Ops in a random order, harmless and harmful ones: nothing may change the outputs."""
    chance = random.Random(seed)
    harmless = seed % 2 == 0
    ops = [one for name, one in HARMLESS.items() if name != "attention"]
    ops += [lambda m, x: m.inner(m.norm(x)) + x] * 12
    if not harmless:
        ops += TOUCHES.values()
    chosen = [chance.choice(ops) for _ in range(chance.randint(1, 4))]

    def touch(m: Any, x: Tensor) -> Tensor:
        for op in chosen:
            x = op(m, x)
        return x

    x = activations(3, 8, seed=seed).double()
    model = touched(touch, x)
    before = copy.deepcopy(model)
    rotate_transform(model, [x])
    assert WIDTH in rotated(model).values() or not harmless
    with torch.no_grad():
        assert torch.allclose(model(x), before(x), rtol=1e-9, atol=1e-10)


def test_a_stream_that_is_returned_is_left_alone() -> None:
    class Returns(Model):
        def forward(self, ids: Tensor) -> Any:
            hidden = self.blocks(self.table(ids) + self.positions)
            return self.head(self.norm(hidden)), hidden

    model = Returns(Rms).double()
    before = copy.deepcopy(model)
    rotate_transform(model, IDS)
    assert "it is an output of the model" in reasons(model).values()
    assert_same_outputs(model, before, IDS, 1e-12)


def test_every_trace_counts() -> None:
    """With labels, say, the model does something else with the stream."""

    class Two(Model):
        def forward(self, ids: Tensor, relu: bool = False) -> Tensor:
            hidden: Tensor = self.blocks(self.table(ids) + self.positions)
            logits: Tensor = self.head(self.norm(hidden.relu() if relu else hidden))
            return logits

    model = Two(Rms).double()
    rotate_transform(model, [{"ids": IDS[0]}, {"ids": IDS[1], "relu": True}])
    assert WIDTH not in rotated(model).values()
    only = Two(Rms).double()
    rotate_transform(only, [{"ids": IDS[0]}])
    assert WIDTH in rotated(only).values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_any_dtype_parameters_stay_the_same_objects(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    kept = dict(model.named_parameters())
    rotate_transform(model, text_calib())
    assert len(rotated(model)) == 3
    for name, parameter in model.named_parameters():
        assert parameter is kept[name]
        assert parameter.dtype == dtype


def test_a_rotation_that_goes_wrong_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = state(model)
    real = rotate_weights

    def wrong(streams: Any, biases: Any) -> None:
        real(streams, biases)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)

    monkeypatch.setattr(rotate_model, "rotate_weights", wrong)
    with pytest.raises(ModelError, match=r"computes something else .*It is as it was"):
        rotate_transform(model, text_calib())
    assert changed(model, before) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_a_rotation_that_is_interrupted_is_undone(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    before = state(model)
    runs: list[None] = []

    def fails_the_second_time(*args: Any) -> Any:
        runs.append(None)
        if len(runs) > 1:
            assert changed(model, before)
            raise error("in the rotated model")
        return outputs(*args)

    outputs = rotate_model._outputs
    monkeypatch.setattr(rotate_model, "_outputs", fails_the_second_time)
    with pytest.raises(error, match="in the rotated model"):
        rotate_transform(model, text_calib())
    assert changed(model, before) == []


def test_the_graph_is_the_same_node_for_node() -> None:
    model = tiny_llama(use_cache=False)
    (ids, *_) = text_calib()
    exported: Any = torch.export.export(model, (ids,), strict=False).module()
    nodes = [(node.op, str(node.target)) for node in exported.graph.nodes]
    result = RotatePass([ids])(exported)
    assert result is not None
    assert result.modified
    assert [(node.op, str(node.target)) for node in exported.graph.nodes] == nodes
    found = exported.meta["magr_rotations"]
    assert {one.block for one in found if not one.reason} == {32, 8}
    torch.testing.assert_close(exported(ids).logits, tiny_llama()(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=r"takes a torch\.fx GraphModule"):
        RotatePass([ids]).call(model)
    after = MagRPass([ids])(exported)
    assert after is not None
    assert after.graph_module.meta["magr"].rotations == found


def test_a_seed_is_a_rotation() -> None:
    one, two, other = tiny_llama(), tiny_llama(), tiny_llama()
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        rotate_transform(model, text_calib(), seed=seed)
    assert changed(one, state(two)) == []
    assert changed(one, state(other)) != []
    with pytest.raises(ConfigError, match="seed must be an int from 0"):
        rotate_transform(one, text_calib(), seed=-1)


def test_what_is_rotated_can_be_quantized_and_is_in_the_report(tmp_path: Path) -> None:
    model = rotate_transform(tiny_llama(), text_calib())
    magr_quantize(model, text_calib(), intx(4, ASYMMETRIC, 16), rounding="gptq")
    report: MagRReport = model.magr_report
    assert report.rotations == model.magr_rotations
    done = [one for one in report.rotations if not one.reason]
    line = f"{len(done)} of {len(report.rotations)} streams rotated"
    assert line in report.totals()
    write_report(report, tmp_path)
    assert read_report(tmp_path).rotations == report.rotations
    plain = magr_quantize(tiny_llama(), text_calib(), intx(4, ASYMMETRIC, 16)).magr_report
    assert plain.rotations == []
    assert "rotated" not in plain.totals()
    with torch.no_grad():
        logits = model(text_calib()[0]).logits
    assert bool(logits.isfinite().all())
    assert isinstance(model, nn.Module)
    assert not isinstance(model, fx.GraphModule)
