"""How a budget was spent: a row for each weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from tabulate import tabulate

SHOWN = 12  # rows that the summary shows, those that another bit would help most


@dataclass(frozen=True)
class BitRow:
    """A weight, and the config that it gets.

    Attributes:
        name: of the weight.
        shape: ``[out, in]``.
        config: its config in brief, such as ``int3, groups of 64``.
        bits: stored for each number of the weight, with scales and zero points.
        cost: what quantizing its unit costs: the sum over the unit's weights.
        unit: the first weight of those that have one choice.
        costs: of each choice of the unit, by its name in brief.
        gain: by how much the cost would fall with the next larger choice; 0 if there is none.
        gain_bytes: how many more bytes that would take.
    """

    name: str
    shape: tuple[int, int]
    config: str
    bits: float
    cost: float
    unit: str
    costs: dict[str, float] = field(default_factory=dict)
    gain: float = 0.0
    gain_bytes: int = 0


@dataclass(frozen=True)
class BitPlan:
    """How a budget was spent.

    Attributes:
        rows: one for each weight that is quantized, in the order of the model.
        bits: the average, by what the budget counts.
        counted: what the average counts, in words.
        nbytes: of the weights that are quantized, packed.
        float_nbytes: of everything else, which stays in floating point.
        cost: the sum of all costs.
        bound: no plan within the budget has a smaller cost.
        least, most: the averages that the choices allow.
        seconds: that the plan took.
    """

    rows: list[BitRow]
    bits: float
    counted: str
    nbytes: int
    float_nbytes: int
    cost: float
    bound: float
    least: float
    most: float
    seconds: float

    def __str__(self) -> str:
        return self.summary()

    def totals(self) -> str:
        """One line: bits, bytes, and how many weights have which config."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.config] = counts.get(row.config, 0) + 1
        said = ", ".join(f"{n} {config}" for config, n in sorted(counts.items()))
        return (
            f"{self.bits:.3f} bits on average over {self.counted} ({said}), "
            f"{self.nbytes / 1e6:.1f} MB packed, and {self.float_nbytes / 1e6:.1f} MB in floating "
            f"point; planned in {self.seconds:.0f} s"
        )

    def summary(self) -> str:
        """The totals, and the weights that more bits would help most for their bytes."""
        worth = sorted(
            {row.unit: row for row in self.rows if row.gain_bytes}.values(),
            key=lambda row: row.gain / row.gain_bytes,
            reverse=True,
        )
        header = ["more bits would help most", "config", "cost", "less with the next", "for KB"]
        body = [
            [row.unit, row.config, f"{row.cost:.3g}", f"{row.gain:.3g}", row.gain_bytes // 1000]
            for row in worth[:SHOWN]
        ]
        gap = f"cost {self.cost:.4g}, of which no plan has less than {self.bound:.4g}"
        return "\n".join([self.totals(), gap, *([tabulate(body, header)] if body else [])])

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of_dict(cls, record: dict[str, Any]) -> BitPlan:
        """The opposite of :meth:`as_dict`."""
        rows = [BitRow(**{**row, "shape": tuple(row["shape"])}) for row in record["rows"]]
        return cls(**{**record, "rows": rows})

    def plot(self, path: str | PathLike[str]) -> None:
        """Plot the bits along the depth of the model, and what another bit would be worth.

        The suffix of ``path`` chooses the format (png, pdf, svg).

        Raises:
            ImportError: matplotlib is not installed; the message has the command.
        """
        from magr_fx.reporting.plot_bits import plot_bits

        plot_bits(self, path)
