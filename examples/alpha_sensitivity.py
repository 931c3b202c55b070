"""How much does alpha matter, and what does ``alpha="auto"`` choose? One picture.

    python examples/alpha_sensitivity.py                          # SmolLM2-135M, 3 bits
    python examples/alpha_sensitivity.py --bits 2 --layers model.layers.5.mlp.down_proj

For each layer a curve: its output error after torchao's quantization, if all rows take the same
alpha. The star is what every row choosing for itself gives, at the rows' median alpha; the dotted
line is torchao alone. Writes ``alpha_sensitivity.png`` to ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from language_model import bundled_model, load, token_batches
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from quickstart import DATA, per_channel
from torch import Tensor, nn
from torchao.quantization import quantize_

from magr_fx import magr_quantize, solve_magr_path
from magr_fx.solver.row_scale import row_scale

LAYERS = (
    "model.layers.3.self_attn.q_proj",
    "model.layers.12.self_attn.o_proj",
    "model.layers.20.mlp.down_proj",
)
ALPHAS = [10 ** (-k / 3) for k in range(13)]  # 1 to 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="a Hub name, a local directory or a .gguf file (default: SmolLM2-135M)")
    add("--layers", nargs="+", default=list(LAYERS), metavar="NAME", help="linear layers")
    add("--bits", type=int, choices=range(2, 9), default=3, help="default: 3")
    add("--calib", type=Path, default=DATA / "sotu_calibration.txt", metavar="FILE")
    add("--tokens", type=int, default=8192, help="to calibrate on (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens per window (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


class Inputs:
    """The gram of what a linear layer reads, and the tokens themselves."""

    def __init__(self, layer: nn.Linear) -> None:
        self.tokens: list[Tensor] = []
        self.handle = layer.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        self.tokens.append(args[0].detach().flatten(0, -2))

    def gram(self) -> Tensor:
        self.handle.remove()
        return sum((x.T @ x for x in self.tokens), start=torch.zeros(()))


def quantized(weight: Tensor, bits: int) -> Tensor:
    """What torchao makes of a weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    quantize_(linear, per_channel(bits))
    return linear.weight.dequantize()


def error(change: Tensor, weight: Tensor, gram: Tensor) -> float:
    """‖XΔᵀ‖ / ‖XWᵀ‖."""
    return float((((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()).sqrt())


def main() -> None:
    args = parse_arguments()
    try:
        model, tokenizer = load(args.model or bundled_model(), device="cpu", dtype=torch.float32)
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in args.layers}
        calib = token_batches(
            tokenizer, args.calib, tokens=args.tokens, length=args.length, device="cpu"
        )
        args.out.mkdir(parents=True, exist_ok=True)
    except (AttributeError, ImportError, OSError, ValueError) as problem:
        sys.exit(f"alpha_sensitivity: {problem}")

    inputs = {name: Inputs(layer) for name, layer in layers.items()}
    with torch.no_grad():
        for ids in calib:
            model(input_ids=ids)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, (name, layer) in enumerate(layers.items()):
        color = f"C{at}"
        gram, weight = inputs[name].gram(), layer.weight.detach().clone()
        path = solve_magr_path(weight, gram, ALPHAS, row_scale=row_scale(weight))
        curve = [error(quantized(s.weight, args.bits) - weight, weight, gram) for s in path]
        alone = error(quantized(weight, args.bits) - weight, weight, gram)
        # The layer by itself is a model too: its calibration is what it reads.
        linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        magr_quantize(linear, inputs[name].tokens, per_channel(args.bits), holdout=0.0)
        chosen = error(linear.weight.dequantize() - weight, weight, gram)
        rows = linear.magr_report.rewritten[0].quantization.alphas
        each = sorted(a for alpha, count in rows.items() for a in [float(alpha)] * count)
        median = max(each[len(each) // 2], ALPHAS[-1])
        axes.semilogx(ALPHAS, [100 * e for e in curve], ".-", color=color, label=name)
        axes.axhline(100 * alone, color=color, linestyle=":", linewidth=1)
        axes.plot(median, 100 * chosen, "*", color=color, markersize=16, markeredgecolor="black")
        best = min(curve)
        print(
            f"{name}: torchao alone {alone:.1%}, best single alpha {best:.1%} "
            f"(alpha {ALPHAS[curve.index(best)]:.0e}), each row its own {chosen:.1%}"
        )
    axes.plot([], [], "k:", linewidth=1, label="torchao alone")
    axes.plot([], [], "k*", markersize=12, label='each row its own alpha and clip ("auto")')
    axes.set(
        title=f"Output error after int{args.bits}, per channel",
        xlabel="alpha, the same for all rows",
        ylabel="‖X(V−W)ᵀ‖ / ‖XWᵀ‖ (%)",
    )
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    file = args.out / "alpha_sensitivity.png"
    figure.savefig(file, dpi=130)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
