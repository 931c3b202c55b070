"""How many bytes does a weight take, in memory and on disk, with each target?

    python benchmarks/target_sizes.py      # a minute; writes a table into README.md

One transformer block of Llama's shapes in bfloat16 is quantized by torchao with each target, so the
figures hold for wide layers: everything that is stored for a weight counts, scales and zero points
too. A target that does not run here says why.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from quality import config
from readme import put_table
from safetensors import safe_open
from solver import align
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    MappingType,
    PerGroup,
    quantize_,
)
from torchao.utils import get_model_size_in_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from magr_fx import MagRError, save_packed, save_quantized

WIDTH = 1024


def quantizable(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


TARGETS: dict[str, Any] = {
    "`IntxWeightOnlyConfig`, int2, groups of 64": config(2, 64),
    "`IntxWeightOnlyConfig`, int3, rows": config(3, 0),
    "`IntxWeightOnlyConfig`, int4, groups of 64": config(4, 64),
    "`IntxWeightOnlyConfig`, int4, groups of 64, symmetric": replace(
        config(4, 64), mapping_type=MappingType.SYMMETRIC
    ),
    "`Int8WeightOnlyConfig`": Int8WeightOnlyConfig(version=2),
    "`Int8DynamicActivationIntxWeightConfig`, int4, groups of 32": (
        Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=PerGroup(32),
        )
    ),
    "`PrototypeInt4WeightOnlyConfig`, groups of 64": PrototypeInt4WeightOnlyConfig(group_size=64),
}


def block() -> Any:
    """One block of a Llama, with nearly no embedding."""
    torch.manual_seed(0)
    shapes = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(shapes).to(torch.bfloat16).eval()


def linears(model: nn.Module) -> int:
    """The number of weights that are quantized."""
    return sum(
        module.weight.numel() for name, module in model.named_modules() if quantizable(module, name)
    )


def stored(folder: Path) -> int:
    """The bytes of all tensors in a directory."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return total


def row(name: str, target: Any, original: Any) -> list[str]:
    model, count = copy.deepcopy(original), linears(original)
    others = get_model_size_in_bytes(original) - 2 * count  # bfloat16
    try:
        quantize_(model, target, filter_fn=quantizable)
    except Exception as error:  # torchao raises anything for what this machine has not
        return [name, f"does not run here: {str(error).splitlines()[0][:60]}", "", ""]
    cells = [f"{(get_model_size_in_bytes(model) - others) / count:.3f}"]
    for save in (lambda m, d: save_quantized(m, d, target), save_packed):
        with TemporaryDirectory() as folder:
            try:
                save(model, folder)
                cells.append(f"{(stored(Path(folder)) - others) / count:.3f}")
            except MagRError:
                cells.append("not held")
    return [name, *cells]


def main() -> None:
    original = block()
    rows = [["bfloat16", "2", "2", "2"]]
    rows += [row(name, target, original) for name, target in TARGETS.items()]
    put_table(
        "sizes",
        align(["bytes per weight", "in memory", "`save_quantized`", "`save_packed`"], rows),
    )


if __name__ == "__main__":
    main()
