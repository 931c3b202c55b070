"""The families of models that users bring: tiny, random weights, built from config in milliseconds.

Real architectures of transformers, and plain modules with the habits of research code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from tiny_models import VOCABULARY, activations, token_ids
from torch import Tensor, nn
from torch.nn import functional

WIDTH, INNER, HEADS = 32, 48, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
}
VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    **{key: TEXT[key] for key in ("hidden_size", "intermediate_size")},
    **{key: TEXT[key] for key in ("num_hidden_layers", "num_attention_heads")},
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KV = {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Family(NamedTuple):
    """How a model is made, and what it is calibrated with."""

    make: Callable[[], nn.Module]
    calib: Callable[[], list[Any]]
    # Weights that meet an input and cannot be rewritten, or not be quantized: an embedding's, or
    # parameters outside of nn.Linear. Everything else has to be.
    tied: tuple[str, ...] = ()
    unquantizable: tuple[str, ...] = ()


def text() -> list[Any]:
    return [token_ids(2, 7, seed=1), token_ids(3, 9, seed=2), token_ids(2, 5, seed=3)]


def images() -> list[Any]:
    return [activations(2, 3, 16, 16, seed=1), activations(3, 3, 16, 16, seed=2)]


def vectors() -> list[Any]:
    return [activations(3, 7, WIDTH, seed=1), activations(2, 5, WIDTH, seed=2)]


def causal(family: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A decoder with a head, by the name of its config."""
    return built(f"{family}ForCausalLM", f"{family}Config", **{**TEXT, **IDS, **sizes})


def built(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return made.eval()

    return make


def clip() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, **IDS}, vision_config=VISION, projection_dim=24
    )
    model: nn.Module = transformers.CLIPModel(config)
    return model.eval()


def clip_calib() -> list[Any]:
    return [
        {"input_ids": ids, "pixel_values": pixels}
        for ids, pixels in zip(text()[:2], images(), strict=True)
    ]


def translation() -> list[Any]:
    return [
        {"input_ids": token_ids(2, 7, 1), "decoder_input_ids": token_ids(2, 5, 2)},
        {"input_ids": token_ids(3, 6, 3), "decoder_input_ids": token_ids(3, 4, 4)},
    ]


def speech() -> list[Any]:
    return [
        {"input_features": activations(2, 8, 32, seed=1), "decoder_input_ids": token_ids(2, 5, 2)},
        {"input_features": activations(3, 8, 32, seed=3), "decoder_input_ids": token_ids(3, 4, 4)},
    ]


# ---- plain modules


class RawParameters(nn.Module):
    """Weights that no nn.Linear holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, INNER) / 6)  # [in, out]
        self.second = nn.Parameter(torch.randn(WIDTH, INNER) / 7)  # [out, in]
        self.third = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(functional.silu(x @ self.first) @ self.second.T)  # type: ignore[no-any-return]


class Einsum(nn.Module):
    """Attention-like heads, written with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(HEADS, WIDTH, 8) / 6)
        self.out = nn.Parameter(torch.randn(HEADS, 8, WIDTH) / 6)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bsd,hdk->bshk", x, self.heads).tanh()
        return self.head(torch.einsum("bshk,hkd->bsd", heads, self.out))  # type: ignore[no-any-return]


class IfOnData(nn.Module):
    """Control flow that depends on values: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if x.mean() > 0 else self.second(x)
        while x.norm() > 5:
            x = x / 2
        return self.last(x)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second, self.last = self.first, nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Slices of one in_proj for other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.last = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(1).tanh()
        return self.last(self.attention(x, memory, memory)[0])  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Convolutions, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, WIDTH, 3, stride=2)
        self.last = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def plain(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return seeded


_PROJECTIONS = ("layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.weight")
ZOO: dict[str, Family] = {
    "Llama": Family(causal("Llama", **KV), text),
    "Llama 4": Family(
        built(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **{**TEXT, **IDS, **KV, "num_local_experts": 4, "num_experts_per_tok": 1},
            intermediate_size_mlp=INNER,
            head_dim=8,
            moe_layers=[1],
            attention_chunk_size=64,
        ),
        text,
    ),
    "Qwen2": Family(causal("Qwen2", **KV), text),
    "Qwen3": Family(causal("Qwen3", **KV, head_dim=8), text),
    "Mistral": Family(causal("Mistral", **KV, sliding_window=4), text),
    "Gemma 2": Family(
        causal("Gemma2", **KV, head_dim=8, sliding_window=4),
        text,
        tied=("model.embed_tokens.weight",),
    ),
    "Gemma 3": Family(
        built(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **{**TEXT, **IDS, **KV, "head_dim": 8, "sliding_window": 4},
        ),
        text,
        tied=("model.embed_tokens.weight",),
    ),
    "Phi-3": Family(causal("Phi3", **KV), text),
    "GPT-2": Family(
        built(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=HEADS,
            n_positions=64,
            **IDS,
        ),
        text,
        tied=("transformer.wte.weight",),
    ),
    "OPT": Family(
        causal("OPT", ffn_dim=INNER, word_embed_proj_dim=WIDTH),
        text,
        tied=("model.decoder.embed_tokens.weight",),
    ),
    "GPT-NeoX": Family(causal("GPTNeoX"), text),
    "Falcon": Family(
        causal("Falcon", ffn_hidden_size=INNER),
        text,
        tied=("transformer.word_embeddings.weight",),
    ),
    "BERT": Family(built("BertModel", "BertConfig", **TEXT), text),
    "ViT": Family(built("ViTModel", "ViTConfig", **VISION), images),
    "CLIP": Family(clip, clip_calib),
    "T5": Family(
        built(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=INNER,
            num_layers=2,
            num_heads=HEADS,
            decoder_start_token_id=0,
        ),
        translation,
        tied=("shared.weight",),
    ),
    "Whisper": Family(
        built(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            max_source_positions=16,
            max_target_positions=32,
            decoder_start_token_id=1,
            **IDS,
        ),
        speech,
        tied=("model.decoder.embed_tokens.weight",),
    ),
    "Mixtral": Family(causal("Mixtral", **KV, **EXPERTS), text),
    "Qwen3-MoE": Family(
        causal(
            "Qwen3Moe",
            **KV,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
        ),
        text,
    ),
    "gpt-oss": Family(
        causal("GptOss", **KV, **EXPERTS, head_dim=8, sliding_window=4, rope_scaling=None), text
    ),
    "DeepSeek-V3": Family(
        causal(
            "DeepseekV3",
            num_key_value_heads=HEADS,
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
            first_k_dense_replace=1,
        ),
        text,
        unquantizable=("model.layers.1.mlp.gate.weight",),  # its router works in float32
    ),
    "GraniteMoE": Family(causal("GraniteMoe", **KV, **EXPERTS), text),
    "JetMoE": Family(
        causal("JetMoe", **KV, **EXPERTS, kv_channels=8),
        text,
        tied=("model.embed_tokens.weight",),
        unquantizable=tuple(  # stacks, of which nothing makes linears
            f"model.layers.{layer}.{part}put_linear.weight"
            for layer in (0, 1)
            for part in (
                "mlp.in",
                "mlp.out",
                "self_attention.experts.in",
                "self_attention.experts.out",
            )
        ),
    ),
    "DBRX": Family(
        built(
            "DbrxForCausalLM",
            "DbrxConfig",
            d_model=WIDTH,
            n_heads=HEADS,
            n_layers=2,
            max_seq_len=64,
            vocab_size=VOCABULARY,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
            **IDS,
        ),
        text,
    ),
    "Mamba": Family(
        built(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            state_size=8,
            num_hidden_layers=2,
            **IDS,
        ),
        lambda: text()[:1],
        tied=("backbone.embeddings.weight",),
        unquantizable=(
            "backbone.layers.0.mixer.dt_proj.weight",
            "backbone.layers.1.mixer.dt_proj.weight",
        ),
    ),
    "raw parameters": Family(plain(RawParameters), vectors, unquantizable=("first", "second")),
    "einsum": Family(plain(Einsum), vectors, unquantizable=("heads", "out")),
    "`if` on data": Family(plain(IfOnData), vectors),
    "a shared module": Family(plain(Shared), vectors),
    "TransformerEncoder": Family(
        plain(encoder),
        vectors,
        unquantizable=tuple(
            name.replace("0", str(layer), 1) for layer in range(2) for name in _PROJECTIONS
        ),
    ),
    "cross-attention": Family(
        plain(CrossAttention),
        vectors,
        unquantizable=("attention.in_proj_weight", "attention.out_proj.weight"),
    ),
    "convolutions": Family(plain(ConvNet), images),
}
