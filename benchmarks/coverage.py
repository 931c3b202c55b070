"""Which weights of which families are found and quantized? Writes the table in README.md.

    python benchmarks/coverage.py          # a minute or two

Builds every family of tests/model_zoo.py from its config, with tiny sizes and random weights, and
quantizes it to int4. "by hooks" are the weights that hooks on nn.Linear would see; an expert counts
as a weight for each of its matrices. The share is of the parameters that meet an input: those of
embeddings, norms and convolutions are not in it.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from readme import put_table
from solver import align

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from coverage_table import HEADER, coverage  # noqa: E402
from model_zoo import ZOO  # noqa: E402


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for name in ZOO:
        rows.append(coverage(name))
        print(*rows[-1], flush=True)
    put_table("coverage", align(HEADER, rows))


if __name__ == "__main__":
    main()
