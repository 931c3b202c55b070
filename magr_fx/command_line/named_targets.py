"""Short names of torchao configs for ``--target``: ``int3-per-channel``, ``int4-group-64``."""

from __future__ import annotations

import re
from typing import Any

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
)

from magr_fx.errors import ConfigError

_NAME = re.compile(r"int([1-8])-(?:per-channel|group-([1-9]\d*))(-symmetric)?")
NAMES = "int8, or int1 to int8 with -per-channel or -group-N, and -symmetric if wanted"


def named_target(name: str) -> AOBaseConfig:
    """The torchao config of a name.

    ``int8`` is Int8WeightOnlyConfig. The others are IntxWeightOnlyConfig, asymmetric unless the
    name ends in ``-symmetric``: torchao's symmetric int2 has no level near the largest weights.

    Raises:
        ConfigError: there is no such name; the message lists the names.

    Example:
        >>> named_target("int3-group-64").granularity
        PerGroup(group_size=64)
    """
    if name == "int8":
        return Int8WeightOnlyConfig()
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"no target is called {name!r}; the names are {NAMES}")
    bits, group, symmetric = match.groups()
    dtype: Any = getattr(torch, f"int{bits}")
    return IntxWeightOnlyConfig(
        weight_dtype=dtype,
        granularity=PerGroup(int(group)) if group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
    )
