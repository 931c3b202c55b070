"""What pyproject.toml says is so: what is imported is declared, with bounds that are tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lowest_requirements import declared, lowest, lowest_requirements, name_of, pinned, settings
from packaging.requirements import Requirement
from private_names import ROOT, SOURCES

PROJECT = settings()["project"]
CORE = {name_of(requirement) for requirement in declared(extras=False)}
# Imported where it is there: torch brings it, on the machines that it is for.
GUARDED = {"triton": {"relaxed_step_triton.py"}}
# transformers imports it when a model is offloaded, which the command line has it do.
NOT_IMPORTED = {"accelerate"}
# Packages whose private names are used: tests/test_private_api.py.
PRIVATE = {"torch", "torchao", "transformers", "accelerate"}


def imported() -> dict[str, set[str]]:
    """The packages that the library imports, lazily too → the files that do."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                found.setdefault(name_of(name.partition(".")[0]), set()).add(path.name)
    own = {name_of(name) for name in sys.stdlib_module_names} | {"magr-fx"}
    return {name: files for name, files in found.items() if name not in own}


def test_everything_imported_is_declared_and_nothing_else() -> None:
    found = imported()
    assert {name: found.pop(name) for name in GUARDED} == GUARDED
    assert found.keys() == {name_of(r) for r in declared()} - NOT_IMPORTED


@pytest.mark.slow
def test_the_library_needs_no_extra() -> None:
    """Everything but the command line works with what `pip install .` brings."""
    extras = {name_of(requirement) for requirement in declared()} - CORE
    assert extras == {"accelerate", "click", "compressed-tensors", "matplotlib", "scipy"}
    code = f"""
import sys
for name in {sorted(extras | GUARDED.keys())}:
    sys.modules[name] = None
import torch
from torchao.quantization import IntxWeightOnlyConfig
import magr_fx, magr_fx.public
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
magr_fx.magr_quantize(model, [torch.randn(16, 8)], IntxWeightOnlyConfig(torch.int4), progress=False)
print(type(model[0].weight).__name__)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["IntxUnpackedToInt8Tensor"], run.stderr


@pytest.mark.parametrize("text", declared())
def test_bounds(text: str) -> None:
    requirement = Requirement(text)
    bounds = {specifier.operator: specifier.version for specifier in requirement.specifier}
    assert lowest(text) == f"{name_of(requirement.name)}=={bounds['>=']}"
    assert bounds.keys() == ({">=", "<"} if "<" in text else {">="})
    if name_of(requirement.name) in PRIVATE:
        assert "<" in bounds, "private names are used of it: the next release may not have them"


def test_what_is_pinned_for_the_tests_is_within_the_bounds() -> None:
    pins = {name_of(line): line.partition("==")[2] for line in pinned()}
    for text in declared():
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[name_of(requirement.name)]), text


def test_lowest_requirements() -> None:
    lines = lowest_requirements()
    names = [name_of(line) for line in lines]
    assert len(names) == len(set(names))
    assert {name_of(requirement) for requirement in declared()} <= set(names)
    assert {"pytest", "hypothesis", "scipy"} <= set(names)
    assert not {"ruff", "mypy"} & set(names)
    with pytest.raises(ValueError, match="has no lower bound"):
        lowest("tqdm")


def read(name: str) -> str:
    return Path(ROOT, name).read_text(encoding="utf-8")


def test_the_python_that_is_tested() -> None:
    """One is: its number stands wherever one is named."""
    assert PROJECT["requires-python"] == ">=3.11"
    listed = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert listed == ["3.11"]
    assert settings()["tool"]["ruff"]["target-version"] == "py311"
    assert "sys.version_info < (3, 11)" in read("Makefile")
    assert set(re.findall(r"Python (3\.\d+)", read("Makefile") + read("README.md"))) == {"3.11"}
    assert "Python 3.11" in read("requirements-dev.txt")


def test_readme_states_the_bounds() -> None:
    (sentence,) = re.findall(r"Needs Python [^:]*", read("README.md"))
    bounds = {name_of(r): re.findall(r"[0-9.]+", r) for r in declared()}
    assert f"torch {bounds['torch'][0]} to 2.14, " in sentence
    assert bounds["torch"][1] == "2.15"
    assert f"torchao {bounds['torchao'][0]} " in sentence
    assert f"transformers {bounds['transformers'][0]} " in sentence
