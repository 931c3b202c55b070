"""full_float32: float32 matrix products in full precision, whatever torch is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products without TF32 or bfloat16; restores torch's settings afterwards.

    ``torch.set_float32_matmul_precision`` lets a user trade accuracy for speed everywhere. The
    steps of ADMM follow that setting, since each step corrects the errors of the one before. Grams,
    objectives, bounds and output errors are always computed in full precision.
    """
    # The settings per backend can be read and set whichever of torch's two APIs the user chose.
    mkldnn: Any = torch.backends.mkldnn
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
