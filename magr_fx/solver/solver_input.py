"""Checks of solve_magr's arguments, which all run before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from magr_fx.errors import CalibrationError, ConfigError, ModelError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_weight(weight: Tensor) -> None:
    """Raise ModelError unless this is a finite ``[out, in]`` or ``[problems, out, in]``."""
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES or weight.dim() not in (2, 3):
        raise ModelError(
            "weight must be a floating tensor of 16 to 64 bits, 2-D [out, in] "
            f"or 3-D [problems, out, in], got {_kind(weight)}; reshape or dequantize it first"
        )
    if weight.numel() == 0:
        raise ModelError(f"weight must have a row and a column, got {_kind(weight)}; skip it")
    if weight.is_meta:
        raise ModelError("weight is on the meta device and has no values; load the model first")
    if not bool(weight.isfinite().all()):
        raise ModelError("weight has NaN or infinite values; check the checkpoint it came from")


def check_divides(group_size: int | None, columns: int) -> int:
    """The inputs per group, ``columns`` for None; ConfigError if they do not divide ``columns``."""
    if group_size is None:
        return columns
    if columns % group_size:
        raise ConfigError(
            f"group_size {group_size} does not divide in = {columns}; "
            "choose a divisor, or None for whole rows"
        )
    return group_size


def check_gram(gram: Tensor, weight: Tensor) -> None:
    """Raise CalibrationError unless this can be the gram of the weight, or its grams."""
    columns = weight.shape[-1]
    shape = [*weight.shape[:-2], columns, columns]
    if not isinstance(gram, Tensor) or gram.dtype not in DTYPES or list(gram.shape) != shape:
        wanted = "[in, in]" if weight.dim() == 2 else "[problems, in, in]"
        raise CalibrationError(
            f"gram must be a floating tensor {wanted} = {shape} for a weight with in = {columns}, "
            f"got {_kind(gram)}; pass XᵀX of the inputs of this weight"
        )
    # The sum of a row's magnitudes is checked, because it bounds λmax, which must be finite too.
    if not bool(gram.to(torch.float32).abs().sum(-1).isfinite().all()):
        raise CalibrationError(
            "gram has NaN, infinite or, for float32, too large values; "
            "check or scale down the calibration inputs"
        )
    if bool((gram.diagonal(dim1=-2, dim2=-1) < 0).any()):
        raise CalibrationError(
            "gram has a negative diagonal entry, so it is not XᵀX; pass XᵀX of the inputs"
        )


def check_row_scale(row_scale: Tensor, weight: Tensor) -> None:
    """Raise ConfigError unless this has one positive number for each row of the weight."""
    if not isinstance(row_scale, Tensor) or row_scale.shape != weight.shape[:-1]:
        raise ConfigError(
            f"row_scale must be a tensor {list(weight.shape[:-1])}, one number for each row of the "
            f"weight, got {_kind(row_scale)}"
        )
    if not bool((row_scale.isfinite() & (row_scale > 0)).all()):
        raise ConfigError(
            "row_scale must be finite and above 0; rows of zeros may have any such number, e.g. 1"
        )


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
