"""Budget: an average of bits, or a size, and the configs to choose from."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerGroup

from magr_fx.errors import ConfigError

# What completes a MagRConfig where the configs of the weights are not known yet.
SEVERAL = FqnToConfig(OrderedDict())
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*")


def default_choices(group_size: int = 64, *, symmetric: bool = False) -> tuple[AOBaseConfig, ...]:
    """int2, int3, int4 and int8 in groups, asymmetric unless said otherwise."""
    return tuple(
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(group_size),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        )
        for bits in (2, 3, 4, 8)
    )


@dataclass(frozen=True, eq=False)
class Budget:
    """What the weights may take together; each weight gets the config that is worth most.

    Everything that is stored counts: the b bits of the codes, scales, and zero points (b bits
    each, or the bits of a scale where they are not rounded), as :func:`magr_fx.save_packed` and
    other packed formats store them. torchao's own tensors take a byte for each code.

    Args:
        bits: the average over all numbers of the weights that are quantized.
        size: instead of ``bits``, the bytes of the whole model, or a text such as ``"60MB"``
            (10^6 bytes) or ``"60MiB"`` (2^20): also what stays in floating point, such as
            embeddings.
        choices: the torchao configs to choose from, of the classes that magr_quantize can set the
            codes of: IntxWeightOnlyConfig, Int8WeightOnlyConfig and those with dynamic
            activations. The default is int2, int3, int4 and int8 in groups of 64, asymmetric.
        pin: the config of some weights, or None to leave them in floating point, by patterns such
            as ``"*.down_proj"`` for the names of modules or parameters; the first that fits counts.
        apart: give each weight a choice of its own. By default weights that share an input (q, k
            and v; gate and up) in one module, which serving engines fuse, have one, and so have
            the experts of a layer.
        whole_model: the average counts all parameters of the model, also those that stay in
            floating point.

    Raises:
        ConfigError: an option is out of range; the message says what is allowed.
    """

    bits: float | None = None
    size: int | str | None = None
    choices: Sequence[AOBaseConfig] = field(default_factory=default_choices)
    pin: Mapping[str, AOBaseConfig | None] = field(default_factory=dict)
    apart: bool = False
    whole_model: bool = False

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size is None):
            raise ConfigError(
                'a Budget needs either bits, such as bits=2.5, or size, such as size="60MB"'
            )
        if self.bits is not None and not _is_positive(self.bits):
            raise ConfigError(f"bits must be a finite number above 0, got {self.bits!r}")
        if self.size is not None:
            self.size_in_bytes  # noqa: B018 - raises
        for name in ("apart", "whole_model"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.choices, Sequence) or not self.choices:
            raise ConfigError(f"choices must be torchao configs, at least one, got {self.choices}")
        if not isinstance(self.pin, Mapping) or not all(isinstance(key, str) for key in self.pin):
            raise ConfigError(
                f'pin must map patterns such as "*.down_proj" to torchao configs, got {self.pin!r}'
            )
        for config in (*self.choices, *(c for c in self.pin.values() if c is not None)):
            if not isinstance(config, AOBaseConfig):
                raise ConfigError(
                    f"choices and pin must be torchao configs, such as IntxWeightOnlyConfig("
                    f"weight_dtype=torch.int3), got {config!r}"
                )

    @property
    def size_in_bytes(self) -> int:
        """``size`` as a number.

        Raises:
            ConfigError: it is neither a positive number nor a text of one with a unit.
        """
        if isinstance(self.size, str):
            found = _SIZE.fullmatch(self.size)
            if found is not None and found.group(2) in UNITS and float(found.group(1)) > 0:
                return int(float(found.group(1)) * UNITS[found.group(2)])
        elif isinstance(self.size, Integral) and _is_positive(self.size):
            return int(self.size)
        raise ConfigError(
            f'size must be bytes, or a text such as "60MB", with one of {", ".join(UNITS)}; got '
            f"{self.size!r}"
        )


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return 0 < float(value) < math.inf
