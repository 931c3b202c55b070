"""Activations between blocks on the disk: the same values, and the system may take the memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import ASYMMETRIC, intx
from tiny_models import text_calib, tiny_llama, token_ids
from torch import fx

from magr_fx import CheckpointError, ConfigError, magr_transform
from magr_fx.passes import spill
from magr_fx.passes.resident import _TRIM
from magr_fx.passes.spill import Spill

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


@pytest.mark.parametrize("options", [{}, {"target": INT3}], ids=["alone", "for a target"])
def test_the_result_is_the_same_bits(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "LEAST", 1)
    kept: list[int] = []
    whole = Spill._mapped

    def counted(self: Spill, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        kept.append(storage.nbytes())
        return whole(self, storage)

    wanted = magr_transform(tiny_llama(), text_calib(), **options)
    assert kept == []
    monkeypatch.setattr(Spill, "_mapped", counted)
    ours = magr_transform(tiny_llama(), text_calib(), spill_dir=tmp_path, **options)
    state = wanted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert len(kept) > 10
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
    _TRIM(0)  # what other tests freed may have left a hole in the heap, which glibc takes and keeps
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
