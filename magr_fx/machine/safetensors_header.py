"""The tensors of a safetensors file, read from its header alone.

The file begins with the length of the header in 8 bytes. The header is JSON: each tensor's dtype,
shape, first byte and the byte after its last, counted from the end of the header. The safetensors
library reads tensors, but does not say where in the file they lie, which writing in place needs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from magr_fx.errors import ModelError

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FLOATS = tuple(_BYTES)  # the dtypes that MagR rewrites
DOWNLOAD = "finish the download (hf download NAME --local-dir DIRECTORY continues it)"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a model's directory.

    Attributes:
        file: the file that holds it.
        dtype: the name in safetensors: F32, BF16, I8, ...
        shape: its shape.
        start, stop: its first byte in the file, and the byte after its last.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, by name.

    Raises:
        ModelError: the file cannot be read, or is damaged or incomplete.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("the header is cut short")
            header = json.loads(opened.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, stop = (8 + length + at for at in entry["data_offsets"])
            shape = tuple(entry["shape"])
            if any(type(size) is not int or size < 0 for size in (*shape, start, stop)):
                raise ValueError(f"the header has no sizes of {name}")
            if not isinstance(entry["dtype"], str):
                raise ValueError(f"the header has no dtype of {name}")
            found[name] = StoredTensor(file, entry["dtype"], shape, start, stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} is not a valid safetensors file: {error}; {DOWNLOAD}") from error
    end = max((tensor.stop for tensor in found.values()), default=8 + length)
    if size != end:
        raise ModelError(
            f"{file} has {size:,} bytes, but its header says {end:,}: it is cut short or "
            f"damaged; {DOWNLOAD}"
        )
    for name, tensor in found.items():
        width = _BYTES.get(tensor.dtype)
        if width is not None and tensor.nbytes != width * math.prod(tensor.shape):
            raise ModelError(f"{file} is damaged: {name} has the wrong size; {DOWNLOAD}")
    return found
