"""Shards in the making: their layout, what is written and copied, and weights made of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crash_helpers import recorded_syncs
from safetensors.torch import load_file, save_file

from magr_fx.directories.write_directory import RewrittenWeights, Shards, publish
from magr_fx.errors import ModelError
from magr_fx.model_files.model_directory import read_directory


class Loader(dict[str, torch.Tensor]):
    """What is used of accelerate's OffloadedWeightsLoader."""

    def __init__(self, index: dict[str, dict[str, Any]], save_folder: Path) -> None:
        super().__init__()
        self.index, self.save_folder = index, save_folder
        self.state_dict: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.index[name]
        return load_file(entry["safetensors_file"])[entry["weight_name"]]


def origin(folder: Path) -> Path:
    folder.mkdir()
    tensors = {"one": torch.rand(3, 4), "half": torch.rand(2, 4).half(), "left": torch.rand(5)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "by": "a test"})
    return folder


def test_room_is_taken_first_and_everything_is_there_at_the_end(tmp_path: Path) -> None:
    source, out = origin(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    before = (source / "model.safetensors").read_bytes()
    shards = Shards(read_directory(source), out)
    made = out / "model.safetensors"
    assert made.stat().st_size == len(before)
    assert made.stat().st_blocks * 512 >= len(before)  # not a hole
    assert all(not value.any() for value in load_file(made).values())
    new = torch.rand(2, 4)
    assert shards.write("half", new) == made
    assert torch.equal(load_file(made)["half"], new.half())
    assert not load_file(made)["one"].any()
    shards.finish()
    old, now = load_file(source / "model.safetensors"), load_file(made)
    assert torch.equal(now["half"], new.half())
    assert all(torch.equal(now[name], old[name]) for name in ("one", "left"))
    shards.write("half", old["half"])
    assert made.read_bytes() == before  # names, order, metadata


def of_halves(tmp_path: Path) -> tuple[Path, Shards, Loader]:
    """A weight "both" that is stored as "one" and "two", and that the loader has a file of."""
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    halves = {"one": torch.rand(2, 4), "two": torch.rand(2, 4), "plain": torch.rand(2)}
    save_file(halves, source / "model.safetensors")
    joined = tmp_path / "both.safetensors"
    save_file({"both": torch.cat([halves["one"], halves["two"]])}, joined)
    index = {
        "both": {"safetensors_file": str(joined), "weight_name": "both"},
        "plain": {
            "safetensors_file": str(source / "model.safetensors"),
            "weight_name": "plain",
            "dtype": "float32",
        },
    }
    return out, Shards(read_directory(source), out), Loader(index, tmp_path)


def apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    one, two = weights["both"].chunk(2)
    return {"one": one, "two": two}


def test_what_is_stored_is_read_from_then_on(tmp_path: Path) -> None:
    out, shards, loader = of_halves(tmp_path)
    source = loader.index["plain"]["safetensors_file"]
    before = Path(source).read_bytes()
    weights = RewrittenWeights(loader, shards, apart)
    assert sorted(weights.index) == ["both", "plain"]
    new = {"both": torch.rand(4, 4), "plain": torch.rand(2)}
    for name, value in new.items():
        weights.check(name, value)
        weights.store(name, value)
        assert torch.equal(weights[name], value)
    stored = load_file(out / "model.safetensors")
    assert torch.equal(torch.cat([stored["one"], stored["two"]]), new["both"])
    assert torch.equal(stored["plain"], new["plain"])
    assert Path(source).read_bytes() == before


@pytest.mark.parametrize(
    "parts",
    [
        lambda _: {},
        lambda weights: {"one": weights["both"]},
        lambda weights: {"neither": weights["both"]},
        lambda weights: {"one": weights["another"]},
    ],
    ids=["nothing", "of another shape", "of another name", "needs others"],
)
def test_a_weight_that_cannot_be_taken_apart_is_refused(parts: Any, tmp_path: Path) -> None:
    _, shards, loader = of_halves(tmp_path)
    weights = RewrittenWeights(loader, shards, parts)
    with pytest.raises(ModelError, match=r"both \(4, 4\) .*save_original_format=False"):
        weights.check("both", torch.empty(4, 4, device="meta"))


def test_what_is_published_is_on_the_disk_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file before OUT has its name; then the list of names that OUT is in."""
    folder = tmp_path / "unfinished"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text('{"quantization_config": {}}')  # and so no weights
    (folder / "part" / "file").write_text("x")
    events = recorded_syncs(tmp_path, monkeypatch)
    publish(folder, tmp_path / "out")
    before, after = events[:-2], events[-2:]
    assert sorted(before) == [*("sync config.json", "sync file", "sync part", "sync unfinished")]
    assert after == ["replace out", f"sync {tmp_path.name}"]
