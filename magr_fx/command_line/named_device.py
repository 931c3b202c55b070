"""The device that ``--device`` names, if it exists on this machine."""

from __future__ import annotations

import torch

from magr_fx.errors import ConfigError


def named_device(name: str, *, local_rank: int = 0, several: bool = False) -> torch.device:
    """The torch device of a name.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. ``"auto"`` is CUDA if there is a
            CUDA device, otherwise the CPU. ``"cuda"`` is ``cuda:{local_rank}``.
        local_rank: the number of this rank among those of this machine.
        several: whether several ranks work together, so that each needs its own device.

    Raises:
        ConfigError: the name is wrong, or torch does not find the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
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
            "the device with the number of the rank's LOCAL_RANK"
        )
    at, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if at >= count:
        raise ConfigError(
            f"--device {name}: torch finds {count} CUDA devices here, and none is cuda:{at}; name "
            "another, start no more ranks on a machine than it has devices, or give --device cpu"
        )
    return torch.device("cuda", at)
