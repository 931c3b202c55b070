"""magr-fx: shrink the largest weight of every channel before torchao quantizes the model.

model = magr_transform(model, calib)                 # call torchao's quantize_ afterwards
model = magr_quantize(model, calib, target)          # both steps
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from magr_fx.public import *  # noqa: F403
else:
    # The public names are imported on first use. `python -m magr_fx` imports this file before
    # __main__ runs, and only __main__ can silence what torchao logs while it is imported.

    def __getattr__(name):
        from importlib import import_module

        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("magr_fx.public")
        if name in ("__all__", *public.__all__):
            return getattr(public, name)
        if name in globals():  # a submodule that the import above has made an attribute
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        from importlib import import_module

        return sorted({*globals(), *import_module("magr_fx.public").__all__})
