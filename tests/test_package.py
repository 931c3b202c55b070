"""The house: what is imported from where, what is exported, and that nothing is printed."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import magr_fx
import magr_fx.passes
import magr_fx.public

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = sorted((ROOT / "magr_fx").glob("*.py"))
GRAPHS = sorted((ROOT / "passes").glob("*.py"))
SOURCES = [*NUMBERS, *GRAPHS]
# What sees no graph: everything in magr_fx but the verbs, which tie both halves together, and the
# command line, which calls them.
VERBS = {"__init__.py", "public.py", "api.py"}
COMMANDS = {"cli.py", "directories.py", "named_targets.py", "plan_directory.py"}
COMMANDS |= {"prepare_directory.py", "run_folder.py", "write_quantized.py"}
NUMERICS = [path for path in NUMBERS if path.name not in {*VERBS, *COMMANDS}]

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


class _AtRunTime(ast.NodeTransformer):
    """Drops what only a type checker imports."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_for_types else self.generic_visit(node)


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in the file it does."""
    for node in ast.walk(_AtRunTime().visit(tree(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_passes_are_the_folder_of_the_repository() -> None:
    (folder,) = magr_fx.passes.__path__
    assert Path(folder).resolve() == ROOT / "passes"
    assert magr_fx.passes.__name__ == "magr_fx.passes"


def test_importing_the_library_leaves_the_name_passes_to_the_user() -> None:
    code = "import sys, magr_fx.public; print({n.split('.')[0] for n in sys.modules} & {'passes'})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "set()"


@each_source
def test_no_file_imports_passes_as_a_top_level_module(path: Path) -> None:
    assert [name for name in imports(path) if name.split(".")[0] == "passes"] == []


def test_every_exported_name_exists_and_is_documented() -> None:
    exported = magr_fx.public.__all__
    assert exported == sorted(exported)
    for name in exported:
        assert getattr(magr_fx, name).__doc__, name
    imported = {
        alias.name
        for node in tree(ROOT / "magr_fx" / "public.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(exported) <= set(dir(magr_fx))
    names: dict[str, object] = {}
    exec("from magr_fx import *", names)
    assert names.keys() - {"__builtins__"} == set(exported)
    with pytest.raises(AttributeError, match="module 'magr_fx' has no attribute 'quantise'"):
        magr_fx.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_itself_imports_nothing_heavy() -> None:
    """Or else its command line could not say what is not to be logged before that is imported."""
    code = "import sys, magr_fx; print(*{n.split('.')[0] for n in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "torchao", "transformers", "numpy"} & set(run.stdout.split())


def test_numbers_know_no_graph() -> None:
    names = {path.stem for path in NUMERICS}
    assert {"config", "errors", "gram", "prox", "certificate", "solver", "report"} <= names
    graphs = ("magr_fx.passes", "magr_fx.api", "torch.fx", "torch.export", "torchao")
    # What MagRConfig has to be for torchao's quantize_ to take it, which knows no graph either.
    allowed = {
        "config.py": {"torchao.core.config", "torchao.core.config.AOBaseConfig"},
        "skipped.py": {
            "magr_fx.passes.find_linears",
            "magr_fx.passes.find_linears.FilterFn",
            "magr_fx.passes.transformers_private",
            "magr_fx.passes.transformers_private.HfQuantizer",
        },
        "stored_model.py": {
            "magr_fx.passes.transformers_private",
            "magr_fx.passes.transformers_private.revert_weight_conversion",
        },
    }
    for path in NUMERICS:
        found = {name for name in imports(path) if name.startswith(graphs)}
        assert found == allowed.get(path.name, set()), path.name


def test_imports_run_one_way() -> None:
    """No module imports, directly or through others, itself."""
    graph = {
        f"magr_fx.{'passes.' if path.parent.name == 'passes' else ''}{path.stem}": {
            name for name in imports(path) if name.startswith("magr_fx")
        }
        for path in SOURCES
        if path.name != "__init__.py"
    }
    done: set[str] = set()
    while ready := {
        name for name in graph.keys() - done if not (graph[name] & graph.keys()) - done
    }:
        done |= ready
    assert graph.keys() - done == set()


@each_source
def test_nothing_is_printed(path: Path) -> None:
    names = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert [n.lineno for n in names if isinstance(n, ast.Name) and n.id == "print"] == []


@each_source
def test_the_examples_in_docstrings_are_right(path: Path) -> None:
    package = "magr_fx.passes" if path.parent.name == "passes" else "magr_fx"
    name = package if path.stem == "__init__" else f"{package}.{path.stem}"
    if name.endswith("_triton"):
        pytest.importorskip("triton")
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted == path.read_text(encoding="utf-8").count(">>> ")


@each_source
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(tree(path))
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


def test_packaging_lists_every_package() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'packages = ["magr_fx", "magr_fx.passes"]' in settings
    assert '{ "magr_fx" = "magr_fx", "magr_fx.passes" = "passes" }' in settings
    assert (ROOT / "magr_fx" / "py.typed").is_file()
    folders = {path.parent.resolve() for path in ROOT.glob("magr_fx/**/*.py")}
    assert folders <= {ROOT / "magr_fx", ROOT / "passes"}
