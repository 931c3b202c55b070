"""What does compare take above its models, with a large vocabulary and long windows?

    python benchmarks/compare_memory.py                  # a minute on 2 CPU cores

A Llama of random weights with two layers and a vocabulary of 262,144, its copy, and one batch of
2,048 tokens. The logits of one model for it are 2 GiB in float32.
"""

from __future__ import annotations

import copy
import sys

import torch
from resident import measured, resident
from transformers import LlamaConfig, LlamaForCausalLM

from magr_fx import compare

VOCABULARY, TOKENS = 262_144, 2048


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    compare(model, other, [torch.randint(0, VOCABULARY, (1, 16))], progress=False)  # warm-up
    before = resident("VmRSS")
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    found, cost = measured(lambda: compare(model, other, [ids], progress=False))
    assert found.text is not None
    above = cost.peak - before
    sys.stdout.write(
        f"{TOKENS:,} tokens, vocabulary {VOCABULARY:,}: {above:,.0f} MiB above the models "
        f"({before:,.0f} MiB before), {cost.cpu_seconds:.0f} CPU seconds; "
        f"KL divergence {found.text.divergence.value:.2e}\n"
    )


if __name__ == "__main__":
    main()
