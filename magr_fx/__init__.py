"""magr-fx: shrink every channel's largest weight before torchao quantizes it.

model = magr_transform(model, calib)                 # then torchao's quantize_
model = magr_quantize(model, calib, target)          # both steps
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from magr_fx.public import *  # noqa: F403
else:
    # On first use: `python -m magr_fx` comes by here before its own code can say what is not to
    # be logged while torchao is imported.

    def __getattr__(name):
        from importlib import import_module

        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("magr_fx.public")
        if name in ("__all__", *public.__all__):
            return getattr(public, name)
        if name in globals():  # a module, which is an attribute since it was imported
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        from importlib import import_module

        return sorted({*globals(), *import_module("magr_fx.public").__all__})
