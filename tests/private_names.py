"""Which private names of other packages the library uses, and in which files."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for top in ("magr_fx", "passes") for path in ROOT.glob(f"{top}/**/*.py")]
SOURCES = sorted(path for path in FILES if "magr_fx/passes" not in path.as_posix())

# Modules that are imported by their public name, but whose documentation promises nothing, or
# that have none.
UNPROMISED = (
    "torch.fx.experimental",
    "torch.fx.traceback",
    "torch.multiprocessing.reductions",
    "torch.nn.modules.linear",
    "torchao.prototype",
    "torchao.quantization.quant_primitives",
    "torchao.quantization.transform_module",
    "torchao.quantization.utils",
    "torchao.utils",
    "transformers.core_model_loading",
    "transformers.integrations",
    "transformers.pytorch_utils",
    "transformers.quantizers",
)
# Attributes without an underscore that no documentation knows, found by their names.
UNDOCUMENTED = {
    "all_tied_weights_keys",
    "compiler_config",
    "dataset",
    "dynamo_ctx",
    "expr",
    "get_compiler_config",
    "has_bias",
    "has_gate",
    "has_post_expert_norm",
    "is_transposed",
    "place_submodules",
    "reduce_range",
    "weights_map",
}
_PRIVATE = re.compile(r"_[A-Za-z]\w*")


def private_names() -> dict[str, set[str]]:
    """Each private name that the library uses → the files that do, as ``folder/name.py``."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    own = {name for tree in trees.values() for name in _own(tree)}
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        for name in {*_imported(tree), *(_attributes(tree) - own)}:
            found[name].add(f"{path.parent.name}/{path.name}")
    return dict(found)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").startswith("magr_fx"):
            continue
        module = node.module or ""
        unpromised = any(f"{module}.".startswith(f"{prefix}.") for prefix in UNPROMISED)
        for alias in node.names:
            full = f"{module}.{alias.name}"
            private = any(_PRIVATE.fullmatch(part) for part in full.split("."))
            if (private and module != "__future__") or unpromised or full in UNPROMISED:
                yield full


def _attributes(tree: ast.AST) -> set[str]:
    """Attributes that are read or set by name, and names given as text: ``getattr(x, "_name")``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_op(node):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg is not None:
            names.add(node.arg)
    names.update(_texts(tree))
    return {name for name in names if _PRIVATE.fullmatch(name) or name in UNDOCUMENTED}


def _is_op(node: ast.Attribute) -> bool:
    """Whether it is an op's name, ``aten._to_copy``: without it the import fails by itself."""
    return ast.unparse(node).startswith(("aten.", "torch.ops."))


def _own(tree: ast.AST) -> Iterator[str]:
    """Private names of the library itself: methods, attributes of its objects, arguments, texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inside in node.body:
                if isinstance(inside, ast.FunctionDef):
                    yield inside.name
                elif isinstance(inside, ast.AnnAssign) and isinstance(inside.target, ast.Name):
                    yield inside.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.JoinedStr):  # f"{name}_bias"
            yield from (part.value for part in node.values if isinstance(part, ast.Constant))  # type: ignore[misc]
    yield from (name for name in _texts(tree) if name.startswith("_magr_"))


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
