"""How each library is called. Every function takes a float32 model and gives the quantized one.

Each imports its library itself: they live in environments of their own. Options that are not named
here are the library's defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

# (model, calibration batches [4, 512], bits, group size or 0 for rows, tokenizer) → model
Method = Callable[[nn.Module, list[Tensor], int, int, Any], nn.Module]


def quantized_linears(model: nn.Module) -> list[str]:
    """The linears of the blocks; the head keeps its weight everywhere."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def auto_round(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any, *, best: bool
) -> nn.Module:
    """200 iterations a block with batches of 8, its defaults.

    ``best``: its recipe for 2 bits, SignRoundV2 (``--enable_alg_ext``), with as many iterations;
    the command auto-round-best asks for 1,000.
    """
    from auto_round import AutoRound

    found = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=bits,
        group_size=group or -1,
        sym=False,
        dataset=_rows(calib),
        seqlen=calib[0].shape[1],
        nsamples=sum(map(len, calib)),
        device_map="cpu",
        enable_alg_ext=best,
    )
    done: nn.Module = found.quantize()[0]
    return done


def gptqmodel(
    model: nn.Module,
    calib: list[Tensor],
    bits: int,
    group: int,
    tokenizer: Any,
    *,
    variant: str = "",
) -> nn.Module:
    """GPTQ, or its GPTAQ (alpha .25) or FOEM (beta .2) with their recommended settings.

    Packed and loaded again, as its users do.
    """
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    options: dict[str, Any] = {} if group else {"act_group_aware": False}  # refused for rows
    if variant:
        options[variant] = GPTAQConfig() if variant == "gptaq" else FOEMConfig()
    with TemporaryDirectory() as folder:  # it loads models from directories only
        origin, packed = f"{folder}/origin", f"{folder}/packed"
        model.save_pretrained(origin)  # type: ignore[operator]
        tokenizer.save_pretrained(origin)
        settings = QuantizeConfig(bits=bits, group_size=group or -1, sym=False, **options)
        found = GPTQModel.load(origin, settings, device="cpu", dtype=torch.float32)
        found.quantize(_rows(calib), batch_size=1)
        found.save(packed)
        # On a CPU its layers are right in float16; in float32 perplexity is that of noise.
        done: nn.Module = GPTQModel.load(
            packed, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH
        ).model
    return done


def llmcompressor(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any, *, awq: bool
) -> nn.Module:
    """GPTQ (damping 0.01, static activation order), or AWQ (duo scaling, 20 grid points)."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

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
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe: Any = GPTQModifier(config_groups=scheme, ignore=["lm_head"])
    if awq:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]
    with TemporaryDirectory() as folder:  # it reads the config once more from where it came
        model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        model.config._name_or_path = folder  # type: ignore[union-attr]
        oneshot(
            model=model,
            dataset=data,
            processor=tokenizer,
            recipe=recipe,
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
        )
    return model


@torch.no_grad()
def brevitas(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any, *, qronos: bool
) -> nn.Module:
    """MagR and then GPTQ, or Qronos; block by block, inputs by activation as its README has it."""
    del tokenizer
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.magr import magr_mode
    from brevitas.graph.qronos import Qronos
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
        if qronos:
            algorithm = partial(Qronos, alpha=1e-6)
            mode = gpfq_mode(
                block, create_weight_orig=True, act_order=True, algorithm_impl=algorithm
            )
            _update(block, inputs, mode, once=False)
        else:
            _update(block, inputs, magr_mode(block, create_weight_orig=False), once=True)
            mode = gptq_mode(block, create_weight_orig=False, act_order=True)
            _update(block, inputs, mode, once=False)
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


@torch.no_grad()
def hqq(model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any) -> nn.Module:
    """HQQ, without calibration; its zero points are floats, but for 4 bits."""
    del calib, tokenizer
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group or None, axis=1)
    return _replaced(
        model,
        lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"),
    )


@torch.no_grad()
def sinq(
    model: nn.Module, calib: list[Tensor], bits: int, group: int, tokenizer: Any, *, inputs: bool
) -> nn.Module:
    """SINQ, without calibration, or A-SINQ: a float for each column beside the scales and zeros."""
    del tokenizer
    from sinq.sinqlinear import BaseQuantizeConfig, SINQLinear

    config = BaseQuantizeConfig(
        nbits=bits, group_size=group or None, tiling_mode="1D", method="asinq" if inputs else "sinq"
    )
    seen = _linear_inputs(model, calib) if inputs else {}
    return _replaced(
        model,
        lambda layer: SINQLinear(
            layer,
            config,
            compute_dtype=torch.float32,
            device="cpu",
            layer_activations=seen.get(layer),
        ),
    )


def _replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name in quantized_linears(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, make(layer))
    return model


def _linear_inputs(model: nn.Module, calib: list[Tensor]) -> dict[nn.Module, Tensor]:
    """The inputs ``[tokens, in]`` of every linear for the first batch."""
    found: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        found[layer] = args[0].flatten(0, -2)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(keep)
        for name in quantized_linears(model)
    ]
    model(input_ids=calib[0])
    for handle in handles:
        handle.remove()
    return found


def _rows(calib: list[Tensor]) -> list[dict[str, Tensor]]:
    """The windows one by one, as dictionaries of tokenizers are."""
    return [
        {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        for ids in torch.cat(calib)
    ]


METHODS: dict[str, tuple[str, Method]] = {
    "auto-round": ("AutoRound 0.16", partial(auto_round, best=False)),
    "auto-round-best": ("AutoRound 0.16, SignRoundV2", partial(auto_round, best=True)),
    "gptq": ("gptqmodel 7.6.0, GPTQ", gptqmodel),
    "gptaq": ("gptqmodel 7.6.0, GPTAQ", partial(gptqmodel, variant="gptaq")),
    "foem": ("gptqmodel 7.6.0, FOEM", partial(gptqmodel, variant="foem")),
    "llmc-gptq": ("llmcompressor 0.14.0.1, GPTQ", partial(llmcompressor, awq=False)),
    "llmc-awq": ("llmcompressor 0.14.0.1, AWQ", partial(llmcompressor, awq=True)),
    "magr-gptq": ("brevitas 0.13.4, MagR + GPTQ", partial(brevitas, qronos=False)),
    "qronos": ("brevitas 0.13.4, Qronos", partial(brevitas, qronos=True)),
    "hqq": ("HQQ 0.2.8", hqq),
    "sinq": ("SINQ 0.2.0", partial(sinq, inputs=False)),
    "asinq": ("SINQ 0.2.0, A-SINQ", partial(sinq, inputs=True)),
}
