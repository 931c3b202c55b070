"""``magr-fx`` and ``python -m magr_fx``."""

from __future__ import annotations

import importlib.util
import sys

from magr_fx.machine.quiet import errors_only

# They log, when parts of torchao are imported, what no user of the command line can act on: which
# kernels it does not find here, and that it registers with torch in a way that is about to go.
_NOISY = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    missing = [name for name in ("click", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"magr-fx: error: the command line needs {' and '.join(missing)}: "
            "pip install 'magr-fx[cli]'\n"
        )
        sys.exit(2)
    with errors_only(*_NOISY):
        from magr_fx.command_line.cli import magr_fx
        from magr_fx.machine.memory import give_back_what_is_freed

        give_back_what_is_freed()  # this process works for nobody else
        magr_fx(prog_name="magr-fx")


if __name__ == "__main__":
    main()
