"""pyproject.toml → the oldest versions that it allows, and the test tools that go with them.

Printed for pip, one requirement a line: `make test-lowest` installs them. Only the standard library
is used, since nothing is installed when it runs.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Of requirements-dev.txt, what the tests can do without, or what torch brings in its own version.
NOT_FOR_TESTS = {"mypy", "pre-commit", "ruff", "setuptools", "triton"}


def name_of(requirement: str) -> str:
    """The package's name, as package indexes compare it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise ValueError(f"no requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def settings() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared(*, extras: bool = True) -> list[str]:
    """The requirements of pyproject.toml; those of its extras too, unless told otherwise."""
    project = settings()["project"]
    requirements: list[str] = list(project["dependencies"])
    if extras:
        for more in project["optional-dependencies"].values():
            requirements += more
    return requirements


def lowest(requirement: str) -> str:
    """``name>=1.2,<2`` → ``name==1.2``.

    Raises:
        ValueError: the requirement has no lower bound.
    """
    bound = re.search(r">=\s*([0-9.]+)", requirement)
    if bound is None:
        raise ValueError(f"{requirement!r} of pyproject.toml has no lower bound (>=)")
    return f"{name_of(requirement)}=={bound[1]}"


def pinned() -> list[str]:
    """The pins of requirements-dev.txt."""
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    plain = (line.partition("#")[0].partition(";")[0].strip() for line in lines)
    return [line for line in plain if line]


def lowest_requirements() -> list[str]:
    """What `make test-lowest` installs."""
    own = [lowest(requirement) for requirement in declared()]
    built_with = settings()["build-system"]["requires"]  # torch has an upper bound on setuptools
    others = {name_of(line) for line in own} | NOT_FOR_TESTS
    return [*own, *built_with] + [line for line in pinned() if name_of(line) not in others]


if __name__ == "__main__":
    print("\n".join(lowest_requirements()))  # noqa: T201
