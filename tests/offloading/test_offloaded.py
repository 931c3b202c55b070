"""Models that accelerate offloads: the same result as in memory, a few weights at a time."""

from __future__ import annotations

import copy
import errno
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from crash_helpers import state_after_each_step
from targets import ASYMMETRIC, intx
from tiny_models import tiny_mixtral, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from magr_fx import CheckpointError, ConfigError, ModelError, magr_quantize, magr_transform
from magr_fx.machine.memory import trim
from magr_fx.machine.safetensors_header import read_header
from magr_fx.passes.collecting import spill
from magr_fx.passes.entries import run as run_module
from magr_fx.passes.offloading import execution, offloaded, resident
from magr_fx.passes.offloading.offloaded import _Weight
from magr_fx.passes.rewriting.checkpoint import Checkpoint
from magr_fx.passes.tracing.trace_batches import Tracing

CALIB = [token_ids(3, 17, seed=1), token_ids(2, 9, seed=2)]
INT3 = intx(3, ASYMMETRIC, None)
WAYS = ("from_pretrained", "cpu_offload", "disk_offload")


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def offload(model: nn.Module, way: str, folder: Path, **options: Any) -> Any:
    """A copy of the model that is offloaded in this way."""
    if way == "cpu_offload":
        return cpu_offload(copy.deepcopy(model), **options)
    if way == "disk_offload":
        return disk_offload(copy.deepcopy(model), str(folder / "offload"), **options)
    saved: Any = model
    saved.save_pretrained(folder / "saved")
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved",
        device_map={"": "disk"},
        offload_folder=str(folder / "offload"),
        dtype=next(model.parameters()).dtype,
    )


def offload_a_part(model: Any, folder: Path) -> Any:
    """A copy of the model of which the second layer and what follows are on the disk."""
    model.save_pretrained(folder / "saved")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    rest = dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map={**places, **rest}, offload_folder=str(folder / "offload")
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(CALIB[0]).logits
    return found


@functools.cache
def in_memory(tied: bool, for_a_target: bool) -> Any:
    return magr_transform(llama(tied=tied), CALIB, target=INT3 if for_a_target else None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("tied", "options"),
    [(False, {"target": INT3}), (True, {})],
    ids=["for a target", "tied"],
)
@pytest.mark.slow_unless("tied-disk_offload")
def test_the_same_weights_as_in_memory(
    way: str, tied: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    model = llama(tied=tied)
    offloaded = offload(model, way, tmp_path)
    wanted = in_memory(tied, "target" in options)
    before = list(offloaded.parameters())
    assert magr_transform(offloaded, CALIB, **options) is offloaded
    assert all(a is b for a, b in zip(before, offloaded.parameters(), strict=True))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(logits(offloaded), logits(wanted))
    assert not torch.equal(logits(offloaded), logits(model))
    names = [[site.name for site in m.magr_report.rewritten] for m in (offloaded, wanted)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_the_checkpoint_stays_and_the_result_can_be_saved(tmp_path: Path) -> None:
    model = llama(tied=True, dtype=torch.bfloat16)
    offloaded = offload(model, "from_pretrained", tmp_path)
    original = (tmp_path / "saved" / "model.safetensors").read_bytes()
    magr_transform(offloaded, CALIB)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == original
    with pytest.warns(UserWarning, match="offloaded modules"):
        offloaded.save_pretrained(tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    wanted = magr_transform(whole, CALIB)
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.state_dict().items())
    assert not list((tmp_path / "offload").glob("*unfinished*"))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
@pytest.mark.slow
def test_the_disk_begins_to_read_the_next_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is worked on: the right bytes of the right file, each weight before its use."""
    offloaded = offload(llama(tied=False), "from_pretrained", tmp_path)
    file = tmp_path / "saved" / "model.safetensors"
    names = {tensor.start: name for name, tensor in read_header(file).items()}
    events: list[tuple[str, str]] = []
    load = _Weight.load

    def announced(descriptor: int, start: int, length: int, advice: int) -> None:
        assert os.fstat(descriptor).st_ino == file.stat().st_ino
        assert advice == os.POSIX_FADV_WILLNEED
        stored = read_header(file)[names[start]]
        assert length == stored.nbytes
        events.append(("announced", names[start]))

    def loaded(self: _Weight) -> torch.Tensor:
        events.append(("loaded", self.name))
        return load(self)

    monkeypatch.setattr(os, "posix_fadvise", announced)
    monkeypatch.setattr(_Weight, "load", loaded)
    magr_transform(offloaded, CALIB, checkpoint_dir=None)
    weights = [f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "mlp.down_proj")]
    for name in weights:
        # Loaded to be looked at, to be checked, and to be worked on.
        assert [what for what, of in events if of == name].count("loaded") == 3
        runs = [at for at, event in enumerate(events) if event == ("loaded", name)][1:]
        hints = [at for at, event in enumerate(events) if event == ("announced", name)]
        assert len(hints) == len(runs) == 2
        assert all(hint < run for hint, run in zip(hints, runs, strict=True))


@pytest.mark.slow
def test_a_second_forward_pass_unties_nothing(tmp_path: Path) -> None:
    """accelerate makes new Parameter objects for each name whenever it has run a module."""
    offloaded = offload(llama(tied=True), "from_pretrained", tmp_path)
    logits(offloaded)
    assert offloaded.lm_head.weight is not offloaded.model.embed_tokens.weight
    magr_transform(offloaded, CALIB)
    skipped = [site.name for site in offloaded.magr_report.skipped]
    assert skipped == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_buffers_can_be_offloaded_too(way: str, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 6)
            self.register_buffer("scale", torch.arange(1.0, 9.0))

        def forward(self, x: torch.Tensor) -> Any:
            scale: Any = self.scale
            return self.linear(x * scale)

    model = Scaled()
    calib = [torch.randn(20, 8, generator=torch.Generator().manual_seed(1))]
    hooked = offload(model, way, tmp_path, offload_buffers=True)
    assert hooked.scale.is_meta
    magr_transform(hooked, calib)
    assert hooked.scale.is_meta
    assert torch.equal(hooked(calib[0]), magr_transform(model, calib)(calib[0]))


@pytest.mark.slow
def test_a_part_that_is_in_memory_stays_there(tmp_path: Path) -> None:
    model = llama()
    partly = offload_a_part(model, tmp_path)
    magr_transform(partly, CALIB)
    assert not partly.model.layers[0].mlp.up_proj.weight.is_meta
    assert partly.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(partly), logits(magr_transform(model, CALIB)))


def test_no_more_than_a_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole: Callable[..., Any] = resident.Weights.resident

    def counted(self: Any, tensors: Any, **ahead: Any) -> Any:
        context = whole(self, tensors, **ahead)

        class Counting:
            def __enter__(self) -> None:
                context.__enter__()
                sizes.append(sum(w.placeholder.parameter.numel() for w in weights._versions))

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        weights = self
        return Counting()

    monkeypatch.setattr(resident.Weights, "resident", counted)
    hooked = offload(llama(), "disk_offload", tmp_path)
    magr_transform(hooked, CALIB)
    embedding = 100 * 32
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    assert 0 < max(sizes) <= layer + embedding + 32


# On another device than the one that the model is traced on.


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def moved_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the blocks of an offloaded model are brought to: a second CPU, as it were, or CUDA."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device(request.param)
    monkeypatch.setattr(execution, "execution_device", lambda model: device)
    return device


@pytest.mark.parametrize(
    ("way", "options"),
    [("from_pretrained", {"target": INT3}), ("cpu_offload", {}), ("disk_offload", {})],
    ids=WAYS,
)
@pytest.mark.slow_if("cpu-from_pretrained", "cpu-cpu_offload", "cpu-disk_offload")
def test_the_same_weights_on_another_device(
    way: str,
    options: dict[str, Any],
    tmp_path: Path,
    moved_to: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama(tied=True)
    hooked = offload(model, way, tmp_path)
    filled: list[torch.device | None] = []
    fill = resident.PlaceholderParameter.fill

    def seen(self: Any, values: torch.Tensor, device: torch.device | None) -> None:
        fill(self, values, device)
        filled.append(self.parameter.device)

    monkeypatch.setattr(resident.PlaceholderParameter, "fill", seen)
    magr_transform(hooked, CALIB, **options)
    assert {device.type for device in filled if device} == {moved_to.type}
    wanted = magr_transform(copy.deepcopy(model).to(moved_to), CALIB, **options).cpu()
    assert all(parameter.is_meta for parameter in hooked.parameters())
    assert torch.allclose(
        logits(hooked), logits(wanted), atol=0 if moved_to.type == "cpu" else 1e-3
    )
    assert not torch.equal(logits(hooked), logits(model))


@pytest.mark.slow_if("cpu")
def test_the_next_block_comes_while_one_is_worked_on(
    tmp_path: Path, moved_to: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = offload(llama(), "disk_offload", tmp_path)
    by_thread: dict[str, list[bool]] = {}
    read = _Weight._read

    def seen(self: _Weight) -> torch.Tensor:
        own = threading.current_thread() is threading.main_thread()
        by_thread.setdefault(self.name, []).append(not own)
        return read(self)

    monkeypatch.setattr(_Weight, "_read", seen)
    magr_transform(hooked, CALIB)
    # Looked at; then, in the first block and in a later one, checked and worked on.
    assert by_thread["model.embed_tokens.weight"] == [False, False, False]
    assert by_thread["model.layers.1.input_layernorm.weight"] == [False, True, True]
    assert not any("fetches weights" in thread.name for thread in threading.enumerate())


@pytest.mark.slow_if("cpu")
def test_what_fails_on_its_way_fails_where_it_is_needed(
    tmp_path: Path, moved_to: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = offload(llama(), "disk_offload", tmp_path)
    read = _Weight._read

    def fails(self: _Weight) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(f"the disk has lost {self.name}")
        return read(self)

    monkeypatch.setattr(_Weight, "_read", fails)
    with pytest.raises(OSError, match=r"the disk has lost model\.layers"):
        magr_transform(hooked, CALIB)
    assert all(parameter.is_meta for parameter in hooked.parameters())


@pytest.mark.slow_if("cpu")
def test_what_is_in_memory_comes_along(tmp_path: Path, moved_to: torch.device) -> None:
    """Also buffers; all of it is where it was, the same objects, at the end."""
    model = llama()
    partly = offload_a_part(model, tmp_path)
    owned = [*partly.parameters(), *partly.buffers()]
    magr_transform(partly, CALIB, target=INT3)
    assert all(
        a is b for a, b in zip(owned, [*partly.parameters(), *partly.buffers()], strict=True)
    )
    assert all(t.is_meta or t.device.type == "cpu" for t in owned)
    wanted = magr_transform(copy.deepcopy(model).to(moved_to), CALIB, target=INT3).cpu()
    assert torch.allclose(
        logits(partly), logits(wanted), atol=0 if moved_to.type == "cpu" else 1e-3
    )


class Flat(nn.Module):
    """Two layers that are slices of one memory, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.a.weight, self.b.weight = (nn.Parameter(part) for part in flat)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.a(x)))


def test_memory_that_two_weights_share_is_refused(moved_to: torch.device) -> None:
    model = Flat()
    values = [parameter.detach().clone() for parameter in model.parameters()]
    cpu_offload(model.c)
    with pytest.raises(ModelError, match=r"b\.weight and a\.weight are two tensors in one memory"):
        magr_transform(model, [torch.randn(9, 8)])
    assert torch.equal(model.a.weight, values[0])
    assert torch.equal(model.b.weight, values[1])
    assert model.c.weight.is_meta


def test_a_weight_lies_on_a_device_as_its_outline_does(moved_to: torch.device) -> None:
    part = torch.randn(3, 4, 5)[1:, :, :4].transpose(0, 1)
    placeholder = resident.PlaceholderParameter(torch.empty(4, 2, 4))
    placeholder.fill(part, moved_to)
    there = placeholder.parameter.detach()
    assert there.storage_offset() == 0
    assert there.as_strided((2, 4), (4, 1)).cpu().equal(part[0])
    placeholder.empty()
    assert not bool(placeholder.parameter.detach().any())


@pytest.mark.slow_if("cpu")
def test_views_of_weights_are_not_activations(
    tmp_path: Path, moved_to: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of experts that several blocks view: it would be written for each batch."""
    sizes: list[int] = []
    mapped = spill.Spill._mapped

    def counted(self: Any, storage: torch.UntypedStorage) -> Any:
        sizes.append(storage.nbytes())
        return mapped(self, storage)

    monkeypatch.setattr(spill, "LEAST", 0)
    monkeypatch.setattr(spill.Spill, "_mapped", counted)
    model = tiny_mixtral(num_hidden_layers=1).eval()
    calib = [token_ids(2, 6, seed=1)]
    magr_transform(
        cpu_offload(copy.deepcopy(model), execution_device="cpu"),
        calib,
        target=INT3,
        spill_dir=tmp_path,
    )
    stack = model.model.layers[0].mlp.experts.down_proj
    assert sizes
    assert stack.nbytes > max(sizes)


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left"), CheckpointError, r"No space left. Free some"),
        (RuntimeError("of torch"), CheckpointError, "RuntimeError: of torch$"),
        (ModelError("of its parts"), CheckpointError, "ModelError: of its parts$"),
        (MemoryError(), CheckpointError, "MemoryError: $"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else "",
)
@pytest.mark.slow_unless("OSError(28, 'No space left')--")
def test_weights_that_cannot_be_stored_are_not_reported(
    error: BaseException,
    raised: type[BaseException],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And all others are stored, whatever the one raises."""
    model = llama()
    hooked = offload(model, "disk_offload", tmp_path)
    store = _Weight.store

    def full(self: _Weight, weight: torch.Tensor) -> None:
        if "k_proj" in self.name:
            raise error
        store(self, weight)

    monkeypatch.setattr(_Weight, "store", full)
    with pytest.raises(raised, match=told) as caught:
        magr_transform(hooked, CALIB)
    lost = caught.value if raised is CheckpointError else caught.value.__cause__
    assert "1 rewritten weights, model.layers.0.self_attn.k_proj.weight" in str(lost)
    done = {site.name for site in hooked.magr_report.rewritten}
    assert "model.layers.0.self_attn.q_proj.weight" in done
    original = dict(model.named_parameters())
    changed = {
        name
        for name, parameter in original.items()
        if not torch.equal(kept(hooked, name), parameter)
    }
    assert changed == done


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_is_kept_twice_is_stored_twice_or_not_at_all(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tied weights accelerate keeps a copy for each name."""
    whole, calls = vars(offloaded)["_store"], 0

    def full(values: Any, key: str, weight: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == (1 if first else 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(values, key, weight)

    old, new = torch.arange(6.0), torch.ones(6)
    copies = [{"a": old.clone()}, {"b": old.clone()}]
    weight = _Weight(
        "a", [(copies[0], "a"), (copies[1], "b")], resident.PlaceholderParameter(old), None
    )
    with monkeypatch.context() as patched:
        patched.setattr(offloaded, "_store", full)
        with pytest.raises(OSError, match="No space left"):
            weight.store(new)
    assert torch.equal(copies[0]["a"], old)
    assert torch.equal(copies[1]["b"], old)
    weight.store(new)
    assert torch.equal(copies[0]["a"], new)
    assert torch.equal(copies[1]["b"], new)


def test_empty_weights_are_different_ones(tmp_path: Path) -> None:
    """Though all of them say that their memory is at 0."""

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.empty(0, 4))
            self.columns = nn.Parameter(torch.empty(20, 0))
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            y = torch.cat([self.layer(x), self.rows], 0)
            return torch.cat([y, self.columns], 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Empty()
    calib = [torch.randn(20, 8, generator=torch.Generator().manual_seed(1))]
    wanted = magr_transform(copy.deepcopy(model), calib)
    hooked = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    magr_transform(hooked, calib)
    assert torch.equal(kept(hooked, "layer.weight"), wanted.layer.weight)
    assert [tuple(p.shape) for p in hooked.parameters()] == [
        tuple(p.shape) for p in wanted.parameters()
    ]


def kept(hooked: Any, name: str) -> torch.Tensor:
    """The weight where accelerate keeps it."""
    path, _, key = name.rpartition(".")
    hook: Any = offloaded.offloading_hook(hooked.get_submodule(path))
    values: torch.Tensor = hook.weights_map[key]
    return values


@pytest.mark.slow_if("cpu")
def test_the_target_is_tried_on_the_weights_themselves(
    tmp_path: Path, moved_to: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, torch.Tensor]] = []
    whole: Any = vars(run_module)["try_target"]

    def seen(name: str, weight: torch.Tensor, *given: Any, **more: Any) -> None:
        tried.append((name, weight.clone()))
        whole(name, weight, *given, **more)

    monkeypatch.setattr(run_module, "try_target", seen)
    model = llama()
    magr_transform(offload(model, "disk_offload", tmp_path), CALIB, target=INT3)
    assert len(tried) == 5  # shapes
    for name, weight in tried:
        assert torch.equal(weight.cpu(), model.get_parameter(name)), name
        assert weight.device.type == moved_to.type


@pytest.mark.slow_if("cpu")
def test_a_run_that_was_cut_short_goes_on_on_another_device(
    tmp_path: Path, moved_to: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    wanted = offload(model, "cpu_offload", tmp_path)
    magr_transform(wanted, CALIB, target=INT3)
    hooked = offload(model, "cpu_offload", tmp_path)
    save = Checkpoint.save

    def cut(self: Checkpoint, step: int, *given: Any) -> None:
        save(self, step, *given)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", cut)
        state_after_each_step(patched)
        with pytest.raises(KeyboardInterrupt):
            magr_transform(hooked, CALIB, target=INT3, checkpoint_dir=tmp_path / "run")
    again = offload(model, "cpu_offload", tmp_path)
    magr_transform(again, CALIB, target=INT3, checkpoint_dir=tmp_path / "run")
    assert torch.equal(logits(again), logits(wanted))


def resident_mebibytes() -> float:
    """What no file backs: private and shared pages, without what glibc keeps of earlier tests."""
    trim()
    with open("/proc/self/status") as lines:
        found = [line.split()[1] for line in lines if line.startswith(("RssAnon", "RssShmem"))]
    return sum(map(int, found)) / 1024


def test_released_weights_hold_no_values(tmp_path: Path) -> None:
    """What is left in a mapping would be memory that no counter of the process shows."""
    hooked = offload(llama(), "disk_offload", tmp_path)
    with offloaded.offloaded_weights_loaded(hooked) as resident:
        weight = hooked.lm_head.weight
        with resident([weight]):
            assert bool(weight.detach().any())
        assert not bool(weight.detach().any())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_what_is_not_needed_takes_up_no_memory(tmp_path: Path) -> None:
    """In a process of its own: what glibc keeps of other tests comes and goes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(load_one_after_the_other, tmp_path).result()


def load_one_after_the_other(tmp_path: Path) -> None:
    each = 16  # MiB
    layers = [nn.Linear(2048, each * 128, bias=False) for _ in range(8)]
    hooked = disk_offload(nn.Sequential(*layers), str(tmp_path))
    layers.clear()
    with offloaded.offloaded_weights_loaded(hooked) as resident:
        before = resident_mebibytes()
        for layer in hooked:
            with resident([layer.weight.T[:7]]):  # a view will do
                assert each - 2 < resident_mebibytes() - before < 2 * each
                assert float(layer.weight.detach().abs().amin()) >= 0
                layer.weight.detach().add_(1)
        assert resident_mebibytes() - before < each / 2
    assert 0.9 < float(hooked[5]._hf_hook.weights_map["weight"].mean()) < 1.1


# What is refused.


def broken(model: LlamaForCausalLM) -> LlamaForCausalLM:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    return model


def test_broken_values_are_found_before_anything_is_changed(tmp_path: Path) -> None:
    model = broken(llama())
    hooked = offload(model, "disk_offload", tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        magr_transform(hooked, CALIB)
    assert all(parameter.is_meta for parameter in hooked.parameters())
    assert torch.equal(logits(hooked), logits(model)) or logits(hooked).isnan().any()


def test_what_only_a_model_in_memory_can_do_is_refused(tmp_path: Path) -> None:
    hooked = offload(llama(), "disk_offload", tmp_path)
    with pytest.raises(ModelError, match="TorchAoConfig"):
        magr_quantize(hooked, CALIB, INT3)
    with pytest.raises(ConfigError, match="make_fx"):
        magr_transform(hooked, CALIB, trace="make_fx")
    assert Tracing().without_values().tracer == "export"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    hooked = offload(llama(), "disk_offload", tmp_path)
    for hook in map(offloaded.offloading_hook, hooked.modules()):
        if hook is not None:
            hook.execution_device = 0
    with pytest.raises(ModelError, match="on the device 0, which torch cannot use"):
        magr_transform(hooked, CALIB)
    assert all(parameter.is_meta for parameter in hooked.parameters())


def test_a_folder_to_write_to_is_needed(tmp_path: Path) -> None:
    hooked = offload(llama(), "from_pretrained", tmp_path)
    for module in hooked.modules():
        if getattr(module, "_hf_hook", None) is not None and module._hf_hook.offload:
            module._hf_hook.weights_map.dataset.save_folder = None
    with pytest.raises(ModelError, match="offload_folder"):
        magr_transform(hooked, CALIB)


def test_weights_on_meta_without_a_hook_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="meta device"):
        magr_transform(model, [torch.randn(2, 4)])
