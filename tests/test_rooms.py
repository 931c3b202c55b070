"""The map of the rooms in CONTRIBUTING.md: every file is on it, and imports run one way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES = 10
ROW = re.compile(r"^\| `(\S+)/` ?(?:\((\w+)\) )?\| (.+?) \|", re.MULTILINE)


class House:
    """The rooms of a tree, from the bottom to the top, and who imports whom.

    Args:
        root: holds ``magr_fx`` and ``passes``.
        table: the map, as CONTRIBUTING.md has it.
    """

    def __init__(self, root: Path, table: str) -> None:
        self.root = root
        self.order: list[str] = []
        self.room_of: dict[str, str] = {}  # module → its room
        for folder, name, files in ROW.findall(table):
            room = name or folder
            self.order.append(room)
            for file in re.findall(r"`(\w+)`", files):
                self.room_of[module_of(f"{folder}/{file}.py")] = room
        self.files = {
            module_of(str(path.relative_to(root))): path
            for top in ("magr_fx", "passes")
            for path in sorted(root.glob(f"{top}/**/*.py"))
            if "magr_fx/passes" not in path.as_posix()
        }

    @property
    def rooms(self) -> dict[str, list[Path]]:
        """Each folder that is a room, with its files."""
        found: dict[str, list[Path]] = {}
        for path in self.files.values():
            found.setdefault(path.parent.relative_to(self.root).as_posix(), []).append(path)
        return {room: paths for room, paths in found.items() if "/" in room}

    def arrows(self) -> Iterator[tuple[str, str]]:
        """Every import of one module by another, wherever in the file it is."""
        for module, path in self.files.items():
            for name in imports(path):
                while name and name not in self.files:  # a function of a module
                    name = name.rpartition(".")[0]
                if name:
                    yield module, name

    def running_back(self) -> list[tuple[str, str]]:
        """Imports of a higher room."""
        return [
            (one, other)
            for one, other in self.arrows()
            if one in self.room_of
            and other in self.room_of
            and self.order.index(self.room_of[other]) > self.order.index(self.room_of[one])
        ]


def module_of(path: str) -> str:
    """``passes/graphs/trace.py`` → ``magr_fx.passes.graphs.trace``."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"magr_fx.{name}" if name.split(".")[0] == "passes" else name


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            if node.module == "magr_fx":  # whose names come from the face, on first use
                yield node.module


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_file_is_on_the_map(house: House) -> None:
    inner = {"magr_fx.passes", *(module_of(f"{room}/__init__.py") for room in house.rooms)}
    assert house.room_of.keys() == house.files.keys() - inner
    # and what lies in magr_fx itself: the ground, the face, and `python -m magr_fx`
    assert len(house.order) == len(set(house.order)) == len(house.rooms) + 3


def test_imports_run_one_way(house: House) -> None:
    assert sum(1 for _ in house.arrows()) > 300
    assert house.running_back() == []


def test_no_room_is_crowded(house: House) -> None:
    for room, files in house.rooms.items():
        assert len([path for path in files if path.name != "__init__.py"]) <= MOST_FILES, room


def test_every_room_says_what_lives_there_and_what_it_may_import(house: House) -> None:
    for room in house.rooms:
        text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert text is not None, room
        first, _, rest = text.partition("\n\n")
        assert first.endswith("."), room
        below = [name.rpartition("/")[2] for name in house.order if name != "face"]
        below = below[1 : below.index(room.rpartition("/")[2])]
        allowed = "the ground (errors, config)"
        if below:
            allowed += f" and {below[0]}"
        if len(below) > 1:
            allowed = f"the ground (errors, config) and the rooms from {below[0]} to {below[-1]}"
        assert " ".join(rest.split()) == f"It may import {allowed}.", room


def test_what_sees_no_graph_imports_none(house: House) -> None:
    """The rooms below the graphs; but for what MagRConfig has to be for torchao to take it."""
    numbers = house.order[: house.order.index("passes/graphs")]
    graphs = ("magr_fx.passes", "torch.fx", "torch.export", "torchao")
    for module, room in house.room_of.items():
        if room in numbers:
            found = [name for name in imports(house.files[module]) if name.startswith(graphs)]
            allowed = ["torchao.core.config.AOBaseConfig"] if module == "magr_fx.config" else []
            assert found == allowed, module


def test_an_import_that_runs_back_is_found(tmp_path: Path) -> None:
    table = "\n".join(
        [
            "| `magr_fx/` (ground) | `errors` | The ground. |",
            "| `magr_fx/low/` | `one`, `two`, `four` | Below. |",
            "| `passes/high/` | `three` | Above. |",
            "| `magr_fx/` (face) | `__init__` | The face. |",
        ]
    )
    for file, text in {
        "magr_fx/errors.py": "",
        "magr_fx/low/one.py": "import magr_fx.errors\nfrom magr_fx.low import two",
        "magr_fx/low/two.py": "def late():\n    from magr_fx.passes.high.three import x",
        "passes/high/three.py": "from magr_fx.low.one import y",
        "magr_fx/__init__.py": "",
        "magr_fx/low/four.py": "from magr_fx import errors",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    back = House(tmp_path, table).running_back()
    assert sorted(back) == [
        ("magr_fx.low.four", "magr_fx"),
        ("magr_fx.low.two", "magr_fx.passes.high.three"),
    ]
