"""MagR as one pass among others: torch.export, a PassManager, torch.compile.

    python examples/fx_pipeline.py                       # needs no C++ compiler
    python examples/fx_pipeline.py --backend inductor    # the default backend of torch.compile

The model mixes what quantization tools look for (``nn.Linear``) with what they overlook: weights
that are plain parameters, used through ``functional.linear`` and ``@``. The graph shows them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional

from magr_fx import MagRPass


class Block(nn.Module):
    """Attention whose weights are plain parameters, then a two-layer MLP."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # x: [batch, tokens, width]
        q = functional.linear(self.norm(x), self.query)
        k = functional.linear(self.norm(x), self.key)
        v = functional.linear(self.norm(x), self.value)
        x = x + functional.scaled_dot_product_attention(q, k, v) @ self.out.T
        hidden: Tensor = self.down(functional.gelu(self.up(x)))
        return x + hidden


class MergeRepeats(PassBase):
    """Compute once what the graph computes several times from the same inputs.

    Run before MagRPass it spares work there too: the three ``norm(x)`` become one node, so query,
    key and value share one input, and one input needs one gram.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        first: dict[object, fx.Node] = {}
        modified = False
        for node in graph.nodes:
            if node.op != "call_function" or node.is_impure():
                continue
            kept = first.setdefault((node.target, repr((node.args, node.kwargs))), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)
                modified = True
        graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, modified)


@torch.no_grad()
def run(module: Callable[..., Tensor], batches: list[Tensor]) -> Tensor:
    """The outputs for all batches in one tensor."""
    return torch.cat([module(x) for x in batches])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got - wanted‖ / ‖wanted‖."""
    return float(torch.linalg.norm(got - wanted) / torch.linalg.norm(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description="MagR in a pipeline of torch.fx passes")
    parser.add_argument("--backend", choices=("aot_eager", "inductor"), default="aot_eager")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Block().eval()
    # Correlated inputs, as activations are: a few directions carry most of their energy.
    mix = torch.randn(64, 64) * torch.logspace(0, -2, 64)[:, None]
    calib = [torch.randn(8, 32, 64) @ mix for _ in range(8)]

    # 1. A graph whose batch size stays free. It holds the model's own parameters, not copies.
    exported = export(model, (calib[0],), dynamic_shapes={"x": {0: Dim.DYNAMIC}})
    graph_module = exported.module(check_guards=False)
    before = run(graph_module, calib)

    # 2. The passes, in order. MagRPass runs the graph on `calib` and rewrites its weights.
    result = PassManager([MergeRepeats(), MagRPass(calib)])(graph_module)
    print(result.graph_module.meta["magr"])

    # 3. What comes out is an ordinary GraphModule: compile it like any other.
    after = run(result.graph_module, calib)
    compiled = torch.compile(result.graph_module, backend=args.backend)
    again = run(compiled, calib)
    other = run(compiled, [calib[0][:3]])
    print("\nrelative error on the calibration data")
    print(f"  rewritten against original: {relative_error(after, before):.1e}")
    print(f"  compiled against rewritten: {relative_error(again, after):.1e}")
    print(f"another batch size through the compiled graph: {tuple(other.shape)}")


if __name__ == "__main__":
    main()
