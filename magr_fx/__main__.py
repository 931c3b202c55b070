"""``magr-fx`` and ``python -m magr_fx``."""

from __future__ import annotations

import importlib.util
import sys

from magr_fx.machine.quiet import errors_only

# While torchao is imported these loggers report missing kernels and a deprecated way of registering
# with torch. A user of the command line can do nothing about either.
_NOISY = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Run the command line; if a package is missing, print how to install it and exit with 2."""
    missing = [name for name in ("click", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"magr-fx: error: the command line needs {' and '.join(missing)}: "
            "pip install 'magr-fx[cli]'\n"
        )
        sys.exit(2)
    with errors_only(*_NOISY):
        from magr_fx.command_line.cli import magr_fx
        from magr_fx.machine.memory import return_freed_memory_at_once

        return_freed_memory_at_once()  # the setting affects the whole process, which is ours here
        magr_fx(prog_name="magr-fx")


if __name__ == "__main__":
    main()
