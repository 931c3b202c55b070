"""The device that ``--device`` names, if torch has it here."""

from __future__ import annotations

import torch

from magr_fx.errors import ConfigError


def named_device(name: str, *, local_rank: int = 0, several: bool = False) -> torch.device:
    """``"auto"`` is CUDA where there is a device, and else the CPU.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        local_rank: which of this machine's ranks this is; its own device is ``"cuda"``.
        several: whether several ranks work together, each of which needs a device of its own.

    Raises:
        ConfigError: torch does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} finds no CUDA device here; give --device "
            "cpu, or look at nvidia-smi and install a torch that is built for CUDA"
        )
    if several and device.index is not None:
        raise ConfigError(
            f"--device {name}: each rank needs a device of its own; give --device cuda, which is "
            "that of its LOCAL_RANK"
        )
    at, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if at >= count:
        raise ConfigError(
            f"--device {name}: torch finds {count} CUDA devices here, and none is cuda:{at}; name "
            "another, start no more ranks on a machine than it has devices, or give --device cpu"
        )
    return torch.device("cuda", at)
