"""Rows that are picked from the tokens, or lie between dimensions of 1: padding counts for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import Formula, analyse, assert_gram, collect, gram_of, hooked
from tiny_models import activations
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, NllbMoeConfig, NllbMoeModel

WIDTH = 8
REAL = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]


def places(x: Tensor) -> Tensor:
    """Of some rows ``[rows, in]``, in another order."""
    return (x[:, 0] > 0).nonzero().squeeze(1).flip(0)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a one between": lambda x, mask: x[:, None],
    "a one before": lambda x, mask: x[None],
    "ones everywhere": lambda x, mask: x[None, :, None, :, None],
    "a one behind rows": lambda x, mask: x.flatten(0, 1)[:, None],
    "a one before rows": lambda x, mask: x.flatten(0, 1)[None],
    "picked": lambda x, mask: x.flatten(0, 1)[places(x.flatten(0, 1))],
    "picked behind a one": lambda x, mask: x.flatten(0, 1)[None, places(x.flatten(0, 1))],
    "picked, and the one gone": lambda x, mask: x.flatten(0, 1)[
        None, places(x.flatten(0, 1))
    ].reshape(-1, x.shape[-1]),
    "unpadded": lambda x, mask: x[mask != 0],
    "unpadded rows": lambda x, mask: x.flatten(0, 1)[mask.flatten() != 0],
    "unpadded, tokens first": lambda x, mask: x.transpose(0, 1)[mask.T != 0],
    "by their values": lambda x, mask: x[x[..., 0] > 0],
    "by their values, twice": lambda x, mask: x[x[..., 0] > 0][places(x[x[..., 0] > 0])],
}


class Picks(Formula):
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return super().forward(inputs_embeds, attention_mask)


@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("batch", [3, 1])
def test_forms(form: str, tracer: str, batch: int) -> None:
    """The last input is 1 in each real token, and 0 in padding: so the oracle tells them apart."""
    real = REAL[1:2] if batch == 1 else REAL
    x = activations(batch, 7, WIDTH)
    x[..., -1] = real
    torch.manual_seed(0)
    model = Picks(lambda m, e, mask: m.a(FORMS[form](e, mask)), a=nn.Linear(WIDTH, 4))
    seen: list[Tensor] = []
    with hooked(model, lambda name, rows: seen.append(rows)):
        model(x, real.long())
    rows = seen[0].flatten(0, -2)
    analysis = analyse(model, [(x, real.long())], tracer=tracer)
    shared = collect(analysis)["a.weight"]
    assert not shared.padding_counted
    assert shared.tokens == int(rows[:, -1].sum())
    assert_gram(shared.gram, gram_of(rows[rows[:, -1] != 0]))


@pytest.mark.slow
def test_latent_attention() -> None:
    """DeepSeek's keys and values are of ``[batch, 1, tokens, latent]``."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    model: Any = DeepseekV3ForCausalLM(config).eval()
    ids = torch.arange(21).view(3, 7)
    latents: list[Tensor] = []
    with hooked(model, lambda name, x: latents.append(x) if "kv_b" in name else None):
        model(ids, attention_mask=REAL.long())
    collected = collect(analyse(model, [{"input_ids": ids, "attention_mask": REAL.long()}]))
    assert {shared.tokens for shared in collected.values()} == {int(REAL.sum())}
    assert not any(shared.padding_counted for shared in collected.values())
    assert_gram(
        collected["model.layers.0.self_attn.kv_b_proj.weight"].gram,
        gram_of(latents[0].reshape(3, 7, -1)[REAL]),
    )


@pytest.mark.slow
def test_experts_of_their_own_modules() -> None:
    """NLLB's are given ``hidden_states[None, rows].reshape(-1, in)``, in a loop."""
    torch.manual_seed(0)
    config = NllbMoeConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_experts=4,
        expert_capacity=64,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    )
    model: Any = NllbMoeModel(config).eval()
    ids = torch.arange(21).view(3, 7) + 3
    item = {"input_ids": ids, "attention_mask": REAL.long(), "decoder_input_ids": ids[:, :5]}
    layer = "encoder.layers.0."
    states: list[Tensor] = []
    handle = model.get_submodule(f"{layer}ffn.experts").register_forward_pre_hook(
        lambda _, args: states.append(args[0].flatten(0, -2))
    )
    seen: dict[str, Tensor] = {}
    with hooked(model, seen.__setitem__):
        model(**item)
    handle.remove()
    collected = collect(analyse(model, [item]))
    real = states[0][REAL.flatten()]
    reached = [name for name in seen if name.startswith(layer) and name.endswith("fc1")]
    left_out = 0
    for name in reached:
        x = seen[name]
        counts = x[(x[:, None] == real[None]).all(-1).any(1)]  # rows of real tokens, by value
        left_out += len(x) - len(counts)
        shared = collected[f"{name}.weight"]
        assert not shared.padding_counted
        assert shared.tokens == len(counts)
        assert_gram(shared.gram, gram_of(counts))
    assert left_out > 0
