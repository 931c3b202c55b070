"""Tiny models with Conv1D or fused experts, whose weights are large enough to matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny_models import VOCABULARY
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_KV = {"num_key_value_heads": 2}
_TOP_2 = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _made(config: str, model: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        with torch.no_grad():
            for parameter in made.parameters():  # those of experts would add next to nothing
                noise = torch.randn(parameter.shape)
                if parameter.dim() > 1:
                    parameter.copy_(noise * 0.2)
                else:
                    parameter.add_(noise * 0.1)
        return made.eval()

    return make


def _causal(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    return _made(f"{kind}Config", f"{kind}ForCausalLM", **{**_SIZES, **sizes})


# name → a model with, beside other layers, one layer of experts (gpt2: four Conv1D; falcon: four of
# its own linears, which write x @ W.T).
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _made(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=64,
        tie_word_embeddings=False,
    ),
    "falcon": _causal("Falcon", new_decoder_architecture=False, ffn_hidden_size=48),
    "mixtral": _causal("Mixtral", **_KV, **_TOP_2),
    "qwen3_moe": _causal(
        "Qwen3Moe",
        **_KV,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    ),
    "gpt_oss": _causal("GptOss", **_KV, **_TOP_2, head_dim=8, sliding_window=4),
    "deepseek_v3": _causal(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        n_shared_experts=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=0,
    ),
    "granitemoe": _causal("GraniteMoe", **_KV, **_TOP_2),
    "llama4": _made(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        **_SIZES,
        **_KV,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        moe_layers=[0],
        attention_chunk_size=64,
    ),
    "dbrx": _made(
        "DbrxConfig",
        "DbrxForCausalLM",
        d_model=32,
        n_heads=4,
        n_layers=1,
        max_seq_len=64,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        tie_word_embeddings=False,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
}
# Its experts are slices of one parameter, and nothing makes linears of them.
JETMOE = _causal("JetMoe", **_KV, **_TOP_2, kv_channels=8)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with stacks of matrices, as transformers makes them."""
    return [m for m in model.modules() if any(p.dim() > 2 for p in m.parameters(recurse=False))]


def fused(model: nn.Module) -> list[str]:
    """The parameters that a quantizer for nn.Linear passes by, or whose module it breaks."""
    names = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            kind = type(module).__name__
            passed_by = kind in ("Conv1D", "FalconLinear", "DbrxExpertGLU")
            if parameter.dim() > 2 or (parameter.dim() == 2 and passed_by):
                names.append(key)
    return names
