"""Padding in models that send each token to some experts: it counts for none of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, assert_gram, call, collect
from tiny_models import VOCABULARY, token_ids
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from magr_fx.passes.finding.find_linears import find_linears
from magr_fx.passes.graphs.trace import calibration_mode
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.tracing.read_exported import trace_or_read
from magr_fx.passes.tracing.trace_batches import Tracing

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def spread_out(model: nn.Module) -> nn.Module:
    """Weights that send tokens to all experts, and activations that are not all alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tiny_mixtral() -> nn.Module:
    return spread_out(MixtralForCausalLM(MixtralConfig(**_SIZES, **_EXPERTS)))


def tiny_qwen3_moe() -> nn.Module:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3MoeConfig(**_SIZES, **sizes, head_dim=8, decoder_sparse_step=1)
    return spread_out(Qwen3MoeForCausalLM(config))


def tiny_gpt_oss() -> nn.Module:
    """Its experts are stored transposed, and have biases."""
    config = GptOssConfig(**_SIZES, **_EXPERTS, head_dim=8, sliding_window=4, pad_token_id=0)
    return spread_out(GptOssForCausalLM(config))


MODELS = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe, "gpt_oss": tiny_gpt_oss}


def text(*lengths: int, seed: int, left: bool = False) -> dict[str, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = token_ids(len(lengths), max(lengths), seed)
    return {"input_ids": ids, "attention_mask": mask.flip(1) if left else mask}


def padded() -> list[dict[str, Tensor]]:
    """Uneven batches, padded on either side, one of them not at all."""
    return [
        text(9, 4, seed=1),
        text(2, 8, 5, seed=2, left=True),
        text(6, 6, seed=3),
        text(1, 7, seed=4),
    ]


def inner(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """What meets the expert's down_proj, in float64."""
    first = experts.gate_up_proj[expert].double()
    both = rows @ (first if experts.is_transposed else first.T)
    if experts.has_bias:
        both = both + experts.gate_up_proj_bias[expert].double()
    result: Tensor = experts._apply_gate(both)
    return result


class WithoutPadding:
    """Each matrix's gram and its tokens, from what hooks see, with the padded rows dropped."""

    def __init__(self, model: nn.Module, calib: list[dict[str, Tensor]]) -> None:
        self.grams: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = defaultdict(int)
        self._mask = torch.ones(0)
        handles = [
            module.register_forward_pre_hook(self._see(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        for item in calib:
            self._mask = item["attention_mask"].bool()
            call(model, item)
        for handle in handles:
            handle.remove()

    def _see(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if hasattr(module, "gate_up_proj"):
                hidden, chosen = (*args, *kwargs.values())[:2]
                self._see_experts(name, module, self._real(hidden), self._real(chosen))
            elif isinstance(module, nn.Linear) or name.endswith((".gate", ".router")):
                self._add(f"{name}.weight", self._real(args[0]))

        return hook

    def _real(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, rows.shape[-1])[self._mask.flatten()].double()

    def _see_experts(self, name: str, module: Any, rows: Tensor, chosen: Tensor) -> None:
        for expert in range(4):
            own = rows[(chosen == expert).any(1)]
            self._add(f"{name}.gate_up_proj[{expert}]", own)
            self._add(f"{name}.down_proj[{expert}]", inner(module, expert, own))

    def _add(self, name: str, rows: Tensor) -> None:
        if len(rows):
            self.grams[name] = self.grams.get(name, 0) + rows.T @ rows
            self.tokens[name] += len(rows)


def analysed(model: nn.Module, calib: list[Any], tracer: str) -> Analysis:
    batches = read_calib(calib, model)
    with calibration_mode(model):
        traced = trace_or_read(model, batches, Tracing(tracer))
    found = find_linears(dict.fromkeys(batch.trace for batch in traced), model)
    return Analysis(model, calib, batches, traced, found)


def assert_padding_is_dropped(analysis: Analysis) -> None:
    seen = WithoutPadding(analysis.model, analysis.calib)
    expected, tokens = seen.grams, seen.tokens
    collected = collect(analysis)
    measured = {name for name, shared in collected.items() if shared.tokens}
    assert measured == set(expected)
    for name in measured:
        assert not collected[name].padding_counted, name
        assert collected[name].tokens == tokens[name], name
        assert_gram(collected[name].gram, expected[name], 1e-4)
    assert not any(shared.padding_counted for shared in collected.values())
    real = sum(int(item["attention_mask"].sum()) for item in analysis.calib)
    stacks = {name.split("[")[0] for name in measured if "[" in name}
    assert len(stacks) == 4
    for stack in stacks:  # each token goes to two experts
        assert sum(tokens[f"{stack}[{expert}]"] for expert in range(4)) == 2 * real


CASES = [(n, e) for n in sorted(MODELS) for e in ("grouped_mm", "batched_mm", "eager")]


@pytest.mark.parametrize(("name", "experts"), CASES)
@pytest.mark.slow_unless("mixtral-batched_mm")
def test_padding_reaches_no_expert(name: str, experts: str) -> None:
    model: Any = MODELS[name]()
    model.set_experts_implementation(experts)
    assert_padding_is_dropped(analysed(model, padded(), "auto"))


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.slow_unless("grouped_mm")
def test_by_make_fx(experts: str) -> None:
    model: Any = tiny_mixtral()
    model.set_experts_implementation(experts)
    assert_padding_is_dropped(analysed(model, padded(), "make_fx"))


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.slow
def test_a_batch_of_one_sequence(experts: str) -> None:
    model: Any = tiny_mixtral()
    model.set_experts_implementation(experts)
    calib = [text(9, seed=1), text(5, 9, seed=2)]
    calib[0]["attention_mask"][:, 6:] = 0
    assert_padding_is_dropped(analysed(model, calib, "auto"))


def test_the_oracle_drops_something() -> None:
    """With the padding, the grams are others."""
    model: Any = tiny_mixtral()
    calib = padded()
    seen = WithoutPadding(model, calib)
    expected, tokens = seen.grams, seen.tokens
    bare = [{**item, "attention_mask": torch.ones_like(item["input_ids"])} for item in calib]
    more = WithoutPadding(model, bare).tokens
    assert all(more[name] > tokens[name] for name in tokens if name.endswith("q_proj.weight"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for counts, real in ((tokens, 48), (more, 68)):
        assert sum(counts.get(f"{name}[{expert}]", 0) for expert in range(4)) == 2 * real
    assert {len(gram) for key, gram in expected.items() if "down_proj" in key} == {48}
