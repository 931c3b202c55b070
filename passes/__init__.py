"""Graphs: everything that sees a torch.fx node. Imported as ``magr_fx.passes``."""

from magr_fx.passes.entries import torchao_flow
from magr_fx.passes.entries.magr_pass import MagRPass

# torchao_flow registers MagRConfig with torchao as it is imported.
__all__ = ["MagRPass", "torchao_flow"]
