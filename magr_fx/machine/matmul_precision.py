"""full_float32: products whose rounding matters, whatever precision torch is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32: no TF32, no bfloat16. What was in force is again afterwards.

    ``torch.set_float32_matmul_precision`` lets a user trade accuracy for speed everywhere. The
    steps of ADMM take part in that, since errors of one step are corrected by the next; a gram and
    what is judged do not.
    """
    # The settings by backend, which can be read and set whichever of torch's two ways was used.
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
