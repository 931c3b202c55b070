"""A row of the README's table of families: what is found of the oracle's, and what is quantized."""

from __future__ import annotations

from collections import Counter

from model_zoo import ZOO
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType
from toys import INT, report_of
from weight_oracle import oracle

from magr_fx import magr_quantize, magr_transform
from magr_fx.passes.graphs.torchao_private import is_quantized
from magr_fx.passes.inputs.calibration import read_calib

HEADER = ["family", "tracer", "weights found", "by hooks", "quantized share"]
TARGET = IntxWeightOnlyConfig(weight_dtype=INT[4], mapping_type=MappingType.ASYMMETRIC)


def coverage(name: str) -> list[str]:
    family = ZOO[name]
    rewritten = family.make()
    known = oracle(rewritten, read_calib(family.calib(), rewritten))
    sizes = {name: p.numel() for name, p in rewritten.named_parameters()}
    all_met = sum(sizes[parameter] for parameter in {matrix.parameter for matrix in known})
    linears = {id(m.weight) for m in rewritten.modules() if isinstance(m, nn.Linear)}
    names = {parameter: id(p) for parameter, p in rewritten.named_parameters()}
    hooked = sum(names[matrix.parameter] in linears for matrix in known)
    magr_transform(rewritten, family.calib(), progress=False)
    found = report_of(rewritten)
    # In the oracle's matrices: einsum may take one of them apart, by its rows.
    matrices, all_rows, rows = Counter[str](), Counter[str](), Counter[str]()
    for matrix in known:
        matrices[matrix.parameter] += 1
        all_rows[matrix.parameter] += len(matrix.rows)
    for site in found.rewritten:
        rows[site.name.partition("[")[0]] += site.shape[0]
    whole = sum(matrices[one] * rows[one] // all_rows[one] for one in matrices)

    quantized = family.make()
    magr_quantize(quantized, family.calib(), TARGET, progress=False)
    met = {matrix.parameter for matrix in known}
    alone = {s.name for s in report_of(quantized).skipped if s.quantized} - met
    share = sum(p.numel() for p in quantized.parameters() if is_quantized(p))
    share -= sum(sizes[parameter] for parameter in alone if "[" not in parameter)
    return [
        name,
        found.tracer,
        f"{whole} of {len(known)}",
        str(hooked),
        f"{share / all_met:.1%}",
    ]
