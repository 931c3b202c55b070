"""The public names; ``magr_fx`` imports them from here on first use."""

from magr_fx.api import magr_quantize, magr_transform
from magr_fx.comparing.compare import compare
from magr_fx.config import MagRConfig
from magr_fx.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    CoverageError,
    DistributedError,
    HandoverError,
    MagRError,
    ModelError,
    OutOfMemoryError,
    TraceError,
)
from magr_fx.iterations.prox import project_l1_ball, prox_linf
from magr_fx.iterations.solution import Solution, Status
from magr_fx.passes.budgeting.budget import Budget
from magr_fx.passes.entries.magr_pass import MagRPass
from magr_fx.passes.entries.plan_bits import plan_bits
from magr_fx.passes.entries.rotate_pass import RotatePass, rotate_transform
from magr_fx.passes.entries.save_packed import save_packed
from magr_fx.passes.entries.save_quantized import save_quantized
from magr_fx.passes.known_layers.as_linears import as_linears
from magr_fx.reporting.bit_plan import BitPlan
from magr_fx.reporting.comparison import Comparison
from magr_fx.reporting.report import MagRReport, SiteReport
from magr_fx.reporting.rotation import Rotation
from magr_fx.solver.solver import solve_magr, solve_magr_path

__all__ = [
    "BitPlan",
    "Budget",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "CoverageError",
    "DistributedError",
    "HandoverError",
    "MagRConfig",
    "MagRError",
    "MagRPass",
    "MagRReport",
    "ModelError",
    "OutOfMemoryError",
    "RotatePass",
    "Rotation",
    "SiteReport",
    "Solution",
    "Status",
    "TraceError",
    "as_linears",
    "compare",
    "magr_quantize",
    "magr_transform",
    "plan_bits",
    "project_l1_ball",
    "prox_linf",
    "rotate_transform",
    "save_packed",
    "save_quantized",
    "solve_magr",
    "solve_magr_path",
]
