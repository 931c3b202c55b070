"""The package: what is exported, that nothing is printed, and that its docstrings are right."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import magr_fx
import magr_fx.passes
import magr_fx.public

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for top in ("magr_fx", "passes") for path in ROOT.glob(f"{top}/**/*.py")]
SOURCES = sorted(path for path in FILES if "magr_fx/passes" not in path.as_posix())

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("magr_fx", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _AtRunTime(ast.NodeTransformer):
    """Drops what only a type checker imports."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_for_types else self.generic_visit(node)


def imported_at_run_time(path: Path) -> Iterator[str]:
    for node in ast.walk(_AtRunTime().visit(tree(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_passes_are_the_folder_of_the_repository() -> None:
    (folder,) = magr_fx.passes.__path__
    assert Path(folder).resolve() == ROOT / "passes"
    assert magr_fx.passes.__name__ == "magr_fx.passes"


@pytest.mark.slow
def test_importing_the_library_leaves_the_name_passes_to_the_user() -> None:
    code = "import sys, magr_fx.public; print({n.split('.')[0] for n in sys.modules} & {'passes'})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "set()"


@each_source
def test_no_file_imports_passes_as_a_top_level_module(path: Path) -> None:
    assert [name for name in imported_at_run_time(path) if name.split(".")[0] == "passes"] == []


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


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name_of(path): {name for name in imported_at_run_time(path) if name != name_of(path)}
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
    name = name_of(path)
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
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]
    assert packages["package-dir"] == {"magr_fx": "magr_fx", "magr_fx.passes": "passes"}
    assert set(packages["packages"]) == {name_of(path.parent / "__init__.py") for path in SOURCES}
    assert (ROOT / "magr_fx" / "py.typed").is_file()
