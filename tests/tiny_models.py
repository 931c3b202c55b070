"""Tiny models with random weights, built from config: the real architectures, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def tiny_qwen2(**changes: Any) -> Qwen2ForCausalLM:
    """Its head is tied to its embedding, and its q, k and v have biases."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
    return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()


def tiny_gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)).eval()


def tiny_mixtral(**changes: Any) -> MixtralForCausalLM:
    """Each of its two layers has 4 experts, fused in two parameters."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {**_SIZES, "num_key_value_heads": 2, **experts, **changes}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**_SIZES)).eval()


def tiny_vit() -> ViTModel:
    torch.manual_seed(0)
    sizes = {key: size for key, size in _SIZES.items() if key != "vocab_size"}
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes)).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length] ids, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values, the same for the same arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_calib() -> list[Tensor]:
    """Uneven batches of token ids."""
    return [token_ids(2, 7, seed=1), token_ids(3, 9, seed=2), token_ids(2, 5, seed=3)]


def t5_calib() -> list[dict[str, Tensor]]:
    return [
        {"input_ids": token_ids(2, 7, 1), "decoder_input_ids": token_ids(2, 5, 2)},
        {"input_ids": token_ids(3, 6, 3), "decoder_input_ids": token_ids(3, 4, 4)},
    ]


def vit_calib() -> list[Tensor]:
    return [activations(2, 3, 16, 16, seed=1), activations(3, 3, 16, 16, seed=2)]


# name → (model, calibration, how many sites it has, how many distinct inputs those read)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], int, int]] = {
    "llama": (tiny_llama, text_calib, 15, 9),
    "qwen2": (tiny_qwen2, text_calib, 14, 8),
    "gpt_neox": (tiny_gpt_neox, text_calib, 9, 9),
    "bert": (tiny_bert, text_calib, 13, 9),
    "vit": (tiny_vit, vit_calib, 13, 9),
    # Encoder: 2 layers x (q, k, v / o / wi / wo). Decoder: the same, and cross-attention, whose k
    # and v of both layers read the one output of the encoder.
    "t5": (tiny_t5, t5_calib, 32, 21),
}
