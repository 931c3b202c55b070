"""Graphs: everything that sees a torch.fx node. Imported as ``magr_fx.passes``."""

from magr_fx.passes.magr_pass import MagRPass

__all__ = ["MagRPass"]
