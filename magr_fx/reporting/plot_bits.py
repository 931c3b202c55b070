"""The picture of a plan: bits along the depth, and what another bit would be worth."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from magr_fx.reporting.plot import new_figure

if TYPE_CHECKING:
    from magr_fx.reporting.bit_plan import BitPlan, BitRow

_KINDS = 8  # of weights that get a colour of their own


def plot_bits(plan: BitPlan, path: str | PathLike[str]) -> None:
    """Plot ``plan`` to ``path``; the suffix chooses the format (png, pdf, svg)."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    kinds: dict[str, list[tuple[int, BitRow]]] = {}
    units = list({row.unit: row for row in plan.rows}.values())
    for at, row in enumerate(units):
        kinds.setdefault(kind_of(row.name), []).append((at, row))
    common = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:_KINDS]
    for kind, found in kinds.items():
        named = {"label": kind} if kind in common else {"color": "0.6"}
        places = [at for at, _ in found]
        left.plot(places, [row.bits for _, row in found], ".-", linewidth=0.6, **named)
        worth = [1e6 * row.gain / row.gain_bytes if row.gain_bytes else 0 for _, row in found]
        right.plot(places, worth, ".", **named)
    left.axhline(plan.bits, color="0.6", linewidth=1)
    left.set(
        title=f"{plan.bits:.2f} bits on average over {plan.counted}",
        xlabel="units, in the order of the model",
        ylabel="stored bits for each number",
    )
    left.legend()
    right.set(
        title="What the next larger choice would be worth",
        xlabel="units, in the order of the model",
        ylabel="less cost for each MB more",
    )
    figure.savefig(path, dpi=130)


def kind_of(name: str) -> str:
    """The last parts of a name that say what the weight is, such as ``mlp.down_proj``."""
    parts = [part for part in name.split(".") if not part.partition("[")[0].isdigit()]
    if len(parts) > 1 and parts[-1].startswith("weight"):
        parts = parts[:-1]
    return ".".join(parts[-2:])
