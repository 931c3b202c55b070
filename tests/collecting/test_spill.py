"""Activations between blocks on the disk: the same values, and the system may take the memory."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from crash_helpers import state_after_each_step
from targets import ASYMMETRIC, intx
from tiny_models import text_calib, tiny_llama, token_ids
from torch import fx, nn

from magr_fx import CheckpointError, ConfigError, magr_transform
from magr_fx.machine.memory import trim
from magr_fx.passes.collecting import spill
from magr_fx.passes.collecting.spill import Spill, SpilledTensor, memory_of
from magr_fx.passes.rewriting.checkpoint import Checkpoint

INT3 = intx(3, ASYMMETRIC, None)


def nodes(count: int) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(f"x{at}") for at in range(count)]


def test_values_are_the_same_and_memory_is_a_file(tmp_path: Path) -> None:
    large, small, weight = torch.randn(200, 300), torch.randn(4), torch.randn(300, 300)
    one, two, three, four, five = nodes(5)
    values: dict[fx.Node, Any] = {
        one: large,
        two: (large.T[3:], 7),
        three: small,
        four: weight.T,
        five: large.expand(2, 200, 300),
    }
    before = dict(values)
    keeper = Spill(tmp_path / "new", [weight])
    keeper.keep(values)
    assert torch.equal(values[one], large)
    assert torch.equal(values[two][0], large.T[3:])
    assert values[two][1] == 7
    assert torch.equal(values[five], before[five])
    for view, was in ((values[two][0], large.T[3:]), (values[five], before[five])):
        assert (view.stride(), view.storage_offset()) == (was.stride(), was.storage_offset())
        assert view.untyped_storage().data_ptr() == values[one].untyped_storage().data_ptr()
    assert values[one].untyped_storage().filename is not None
    assert values[one].data_ptr() != large.data_ptr()
    assert values[three] is small
    assert values[four] is before[four]
    mapped = values[one]
    keeper.keep(values)
    assert values[one] is mapped  # moved once
    values[one][0, 0] = 5  # what is changed in place is changed there
    assert values[five][1, 0, 0] == 5
    assert list((tmp_path / "new").iterdir()) == []  # its files have no name


def test_values_of_a_device_go_and_come_back(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "MAPPED", frozenset())  # as if the CPU were such a device
    kept = files_made(monkeypatch)
    large, weight = torch.randn(200, 300, device=device), torch.randn(300, 300, device=device)
    small = torch.randn(4, device=device)
    one, two, three, four = nodes(4)
    values: dict[fx.Node, Any] = {one: large, two: (large.T[3:], 7), three: small, four: weight.T}
    wanted = large.clone()
    memory: Any = memory_of(large)
    del large
    keeper = Spill(tmp_path, [weight])
    with torch.no_grad():
        keeper.keep(values)
        assert memory.expired()  # the device has it back
        assert isinstance(values[one], SpilledTensor)
        assert isinstance(values[two][0], SpilledTensor)
        assert values[two][1] == 7
        assert values[three] is small
        assert values[four].data_ptr() == weight.data_ptr()
        assert len(kept) == 1
        keeper.fetch(values)
        assert values[one].device == device
        assert torch.equal(values[one], wanted)
        assert torch.equal(values[two][0], wanted.T[3:])
        assert values[two][0].stride() == wanted.T[3:].stride()
        assert memory_of(values[one]) == memory_of(values[two][0])
        keeper.keep(values)
        assert len(kept) == 1  # nothing was changed: the file has it all
        keeper.fetch(values)
        values[one][0, 5] = 5
        keeper.keep(values)
        assert len(kept) == 2
        keeper.fetch(values)
    assert values[one][0, 5] == 5
    assert values[two][0][2, 0] == 5
    assert values[one].untyped_storage().filename is None


def files_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that are made from here on."""
    kept: list[int] = []
    whole = Spill._mapped

    def counted(self: Spill, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        kept.append(storage.nbytes())
        return whole(self, storage)

    monkeypatch.setattr(Spill, "_mapped", counted)
    return kept


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("mapped", [{"cpu"}, set()], ids=["on the CPU", "as if on a device"])
@pytest.mark.parametrize("options", [{}, {"target": INT3}], ids=["alone", "for a target"])
@pytest.mark.slow
def test_the_result_is_the_same_bits(
    options: dict[str, Any], mapped: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "LEAST", 1)
    monkeypatch.setattr(spill, "MAPPED", mapped)
    wanted = magr_transform(tiny_llama(), text_calib(), **options)
    kept = files_made(monkeypatch)
    ours = magr_transform(tiny_llama(), text_calib(), spill_dir=tmp_path, **options)
    assert same_bits(ours, wanted)
    assert len(kept) > 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_was_away_when_a_run_was_cut_short_is_read_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "LEAST", 1)
    monkeypatch.setattr(spill, "MAPPED", frozenset())
    save = Checkpoint.save

    def save_and_stop(self: Checkpoint, step: int, *state: Any) -> None:
        save(self, step, *state)
        if step == 2:
            raise KeyboardInterrupt

    def run(folder: Path | None, spill_dir: Path | None) -> nn.Module:
        model: nn.Module = tiny_llama(num_hidden_layers=1)
        return magr_transform(
            model, text_calib(), target=INT3, checkpoint_dir=folder, spill_dir=spill_dir
        )

    wanted = run(None, None)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", save_and_stop)
        state_after_each_step(patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "begun", tmp_path / "away")
    for name, spill_dir in (("again", tmp_path / "away"), ("without", None)):
        folder = shutil.copytree(tmp_path / "begun", tmp_path / name)
        assert same_bits(run(folder, spill_dir), wanted)


def test_no_memory_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", Mock(side_effect=error))
    spill_ = Spill(tmp_path, [])
    with pytest.raises(torch.OutOfMemoryError) as raised:
        spill_.keep({fx.Graph().placeholder("x"): torch.zeros(spill.LEAST // 4 + 1)})
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_it_is_no_memory_of_the_process(tmp_path: Path) -> None:
    """64 MiB as anonymous memory before, none afterwards."""

    def anonymous() -> float:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    (node,) = nodes(1)
    before = anonymous()
    values = {node: torch.ones(16 * 2**20)}
    assert anonymous() - before > 60
    Spill(tmp_path, []).keep(values)
    gc.collect()
    trim()  # what other tests freed may have left a hole in the heap, which glibc takes and keeps
    assert anonymous() - before < 8
    assert float(values[node].sum()) == 16 * 2**20


def test_a_folder_that_cannot_be_one_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = tiny_llama()
    with pytest.raises(ConfigError, match="give another directory"):
        magr_transform(model, [token_ids(2, 8)], spill_dir=tmp_path / "file")
    assert not hasattr(model, "magr_report")


def test_a_full_disk_is_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (node,) = nodes(1)
    with pytest.raises(CheckpointError, match=r"No space left.*another spill_dir"):
        Spill(tmp_path, []).keep({node: torch.ones(100_000)})
    assert list(tmp_path.iterdir()) == []
