"""``magr-fx`` and ``python -m magr_fx``."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    missing = [name for name in ("click", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"magr-fx: error: the command line needs {' and '.join(missing)}: "
            "pip install 'magr-fx[cli]'\n"
        )
        sys.exit(2)
    from magr_fx.cli import magr_fx
    from magr_fx.memory import give_back_what_is_freed

    give_back_what_is_freed()  # this process works for nobody else
    magr_fx(prog_name="magr-fx")


if __name__ == "__main__":
    main()
