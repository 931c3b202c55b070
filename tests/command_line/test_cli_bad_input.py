"""What is wrong with the input is told in one line, with exit code 2, and nothing is damaged."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, Place, edit, refused, run, shard_with
from safetensors.torch import load_file, save_file
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama

from magr_fx.errors import ModelError
from magr_fx.model_files.model_directory import find_model, read_directory

LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder / "model", tiny_llama(num_hidden_layers=1), max_shard_size="20KB")
    save_text(folder / "text.txt")
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Place:
    shutil.copytree(whole / "model", tmp_path / "model")
    shutil.copy(whole / "text.txt", tmp_path)
    return Place(tmp_path / "model", tmp_path / "out", tmp_path / "text.txt")


def drop_a_shard(place: Place) -> None:
    shard_with(place.model, LAYER).unlink()


def cut_a_shard(place: Place) -> None:
    path = shard_with(place.model, LAYER)
    path.write_bytes(path.read_bytes()[:-100])


def cut_a_header(place: Place) -> None:
    path = shard_with(place.model, LAYER)
    path.write_bytes(path.read_bytes()[:50])


def scramble_a_header(place: Place) -> None:
    path = shard_with(place.model, LAYER)
    content = bytearray(path.read_bytes())
    content[8] = ord("[")
    path.write_bytes(content)


def store_twice(place: Place) -> None:
    path = shard_with(place.model, LAYER)
    weight = load_file(path)[LAYER]
    other = next(f for f in sorted(place.model.glob("model-*")) if f != path)
    save_file({**load_file(other), LAYER: weight}, other, {"format": "pt"})


def make_int8(place: Place) -> None:
    path = shard_with(place.model, LAYER)
    stored = load_file(path)
    stored[LAYER] = stored[LAYER].mul(100).to(torch.int8)
    save_file(stored, path)


def say_it_is_quantized(place: Place) -> None:
    method = {"quant_method": "awq"}
    edit(place.model / "config.json", lambda config: config.update(quantization_config=method))


def leave_a_download(place: Place) -> None:
    """As ``hf download --local-dir`` does when it is killed, after another file was whole."""
    folder = place.model / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / "x-Hv_M1=.4f1a.3b5c7d9e.incomplete").write_bytes(b"half")
    (folder / "config.json.metadata").write_text("0123456789\nabcd\n1700000000.5\n")


def break_the_index(place: Place) -> None:
    (place.model / "model.safetensors.index.json").write_text('{"weight_map"')


def only_bin(place: Place) -> None:
    for path in place.model.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, place.model / "pytorch_model.bin")


def no_weights(place: Place) -> None:
    for path in place.model.glob("*.safetensors*"):
        path.unlink()


def no_config(place: Place) -> None:
    (place.model / "config.json").unlink()


def another_kind(place: Place) -> None:
    edit(place.model / "config.json", lambda config: config.update(model_type="perceptron"))


def no_tokenizer(place: Place) -> None:
    for path in place.model.glob("tokenizer*"):
        path.unlink()


def nan(place: Place) -> None:
    path = shard_with(place.model, LAYER)
    stored = load_file(path)
    stored[LAYER][3, 4] = torch.nan
    save_file(stored, path, {"format": "pt"})


def fill_out(place: Place) -> None:
    place.out.mkdir()
    (place.out / "precious.txt").write_text("keep me")


def out_is_a_file(place: Place) -> None:
    place.out.write_text("keep me")


def short_text(place: Place) -> None:
    place.text.write_text("w1 w2 w3")


def no_text(place: Place) -> None:
    place.text.unlink()


def binary_text(place: Place) -> None:
    place.text.write_bytes(b"\xff\xfe\x00")


def leave_a_run(place: Place) -> None:
    folder = place.out.with_name("out.unfinished") / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "state-000000.pt").write_bytes(b"")


def rewrite_shard(place: Place, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the shard that has LAYER, and the index with them."""
    path = shard_with(place.model, LAYER)
    held = load_file(path)
    before = set(held)
    change(held)
    save_file(held, path, metadata={"format": "pt"})

    def new_index(index: dict[str, Any]) -> None:
        for name in before - held.keys():
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(held.keys() - before, path.name)

    edit(place.model / "model.safetensors.index.json", new_index)


def lose_a_tensor(place: Place) -> None:
    rewrite_shard(place, lambda held: held.__delitem__(LAYER))


def add_a_tensor(place: Place) -> None:
    rewrite_shard(place, lambda held: held.update({"model.extra.weight": torch.zeros(3, 4)}))


def shape_a_tensor_otherwise(place: Place) -> None:
    rewrite_shard(place, lambda held: held.update({LAYER: held[LAYER].T.contiguous()}))


def store_whole_numbers(place: Place) -> None:
    rewrite_shard(place, lambda held: held.update({LAYER: held[LAYER].to(torch.int8)}))


def store_a_norm_in_whole_numbers(place: Place) -> None:
    name = "model.norm.weight"
    path = shard_with(place.model, name)
    held = load_file(path)
    save_file({**held, name: held[name].to(torch.int32)}, path, metadata={"format": "pt"})


def name_a_shard_that_is_not_there(place: Place) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][LAYER] = "model-00009-of-00009.safetensors"

    edit(place.model / "model.safetensors.index.json", change)


def say_another_width(place: Place) -> None:
    edit(place.model / "config.json", lambda config: config.update(intermediate_size=72))


def say_more_layers(place: Place) -> None:
    edit(place.model / "config.json", lambda config: config.update(num_hidden_layers=2))


def say_no_kind(place: Place) -> None:
    edit(place.model / "config.json", lambda config: config.pop("model_type"))


def say_a_list(place: Place) -> None:
    (place.model / "config.json").write_text("[1, 2]")


def take_another_tokenizer(place: Place) -> None:
    def renumber(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {word: 3 * at + 5 for word, at in vocabulary.items()}
        tokenizer["added_tokens"] = []

    edit(place.model / "tokenizer.json", renumber)


NOT_THE_MODEL: list[tuple[Callable[[Place], None], str]] = [
    (lose_a_tensor, rf"model lacks {LAYER}, which LlamaForCausalLM has"),
    (add_a_tensor, r"model.extra.weight in .* is not a tensor of LlamaForCausalLM"),
    (shape_a_tensor_otherwise, rf"{LAYER} in .* has the shape \[32, 48\], but .* \[48, 32\]"),
    (store_whole_numbers, rf"{LAYER} in .* is stored as I8"),
    (store_a_norm_in_whole_numbers, "model.norm.weight in .* is stored as I32"),
    (name_a_shard_that_is_not_there, "lacks 1 of the .* files .*model-00009-of-00009"),
    (
        say_another_width,
        r"model.layers.0.mlp.\w+.weight in .* has the shape .*but by config.json it is",
    ),
    (say_more_layers, r"model lacks model.layers.1.input_layernorm.weight, .*and 8 more"),
    (say_no_kind, "cannot build the model .*model_type"),
    (say_a_list, "config.json does not describe a model"),
    (take_another_tokenizer, "the tokenizer of .* uses the id .*, but the model's embedding has"),
]


@pytest.mark.parametrize("command", ["transform", "quantize"])
@pytest.mark.parametrize(
    ("damage", "message"), NOT_THE_MODEL, ids=[case[0].__name__ for case in NOT_THE_MODEL]
)
def test_what_is_not_the_model_that_it_says_is_refused(
    damage: Callable[[Place], None], message: str, command: str, place: Place
) -> None:
    damage(place)
    refused(place, message=message, command=command)


@pytest.mark.parametrize("damage", [say_another_width, say_no_kind, say_a_list])
def test_a_plan_of_it_is_refused(damage: Callable[[Place], None], place: Place) -> None:
    damage(place)
    result = run("plan", place.model)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


SKIPS = [
    ("*.donw_proj", r"--skip '\*.donw_proj' names no module .*similar names are \*.down_proj"),
    ("model.layers.0.mlp.donw_proj", r"similar names are model.layers.\*.mlp.down_proj"),
    ("model.layers.7", "--skip 'model.layers.7' names no module"),
    ("*.Down_Proj", r"names no module .*\*.down_proj"),
    ("", "--skip '' names no module"),
]


@pytest.mark.parametrize("command", ["transform", "quantize"])
@pytest.mark.parametrize(("pattern", "message"), SKIPS)
def test_a_pattern_that_leaves_nothing_out_is_refused(
    pattern: str, message: str, command: str, place: Place
) -> None:
    refused(place, "--skip", "*.up_proj", "--skip", pattern, message=message, command=command)
    if command == "quantize":
        result = run("plan", place.model, "--skip", pattern)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"magr-fx: error: --skip {pattern!r} names no module")


def test_a_pattern_of_what_is_left_alone_anyway_is_told(place: Place) -> None:
    options = ("--calib", place.text, *INT3, *SMALL, "--skip", "lm_head")
    result = run("transform", place.model, place.out, *options)
    assert result.exit_code == 0
    assert "warning: --skip 'lm_head' changes nothing" in result.stderr


CASES: list[tuple[Callable[[Place], None], str]] = [
    (store_twice, r"is stored twice, in model-0.*save it again with save_pretrained"),
    (drop_a_shard, r"lacks 1 of the \d+ files .*model-0.*finish the download"),
    (cut_a_shard, r"has [\d,]+ bytes, but its header says [\d,]+: .*finish the download"),
    (cut_a_header, "is not a valid safetensors file: the header is cut short; finish the download"),
    (scramble_a_header, "is not a valid safetensors file: .*finish the download"),
    (make_int8, rf"{LAYER} in .* is stored as I8: .*start from the full-precision model"),
    (say_it_is_quantized, "already quantized, by awq; start from the full-precision model"),
    (leave_a_download, r"incomplete is left over from an .* download; finish .*, or remove that"),
    (break_the_index, r"index.json cannot be read: .*finish the download"),
    (only_bin, r"has pytorch_model.bin but .*save it again with save_pretrained"),
    (no_weights, "has no weights: .*finish the download"),
    (no_config, r"has no config.json; give a directory"),
    (another_kind, "perceptron"),
    (no_tokenizer, "has no tokenizer that transformers can load .*copy its tokenizer files"),
    (nan, rf"{LAYER} holds NaN or Inf; repair"),
    (fill_out, "exists and is not empty; name another directory"),
    (out_is_a_file, "exists and is not empty; name another directory"),
    (short_text, "has 3 tokens, but 128 are needed; ask for fewer"),
    (no_text, r"text.txt cannot be read as text"),
    (binary_text, r"text.txt cannot be read as text"),
    (leave_a_run, "belongs to an interrupted run: add --resume"),
]


@pytest.mark.parametrize(("damage", "message"), CASES, ids=[case[0].__name__ for case in CASES])
def test_bad_input_is_refused(damage: Callable[[Place], None], message: str, place: Place) -> None:
    damage(place)
    refused(place, message=message)


@pytest.mark.parametrize("command", ["transform", "quantize"])
def test_an_unknown_target_lists_the_valid_ones(command: str, place: Place) -> None:
    listed = r"no target is called 'int3'; the names are int8, .*int1.* -per-channel or -group-N"
    refused(place, "--target", "int3", message=listed, command=command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "int3-group-7", "--no-propagate"), "groups of 7 do not divide"),
        (("--damping", "-1"), "damping must be a finite number"),
        (("--max-steps", "0"), "max_steps must be an int"),
        (("--log-json", "/proc/none/log"), "cannot be written: .*name another file"),
        (("--length", "4096"), "windows of 4,096 tokens are longer than the 2,048 .*--length 2048"),
        (("--skip", "*"), r"nothing is left to rewrite: --skip leaves out \*"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], message: str, place: Place) -> None:
    refused(place, *options, message=message)


def test_a_number_that_is_none_is_a_usage_error(place: Place) -> None:
    command = ("transform", place.model, place.out, "--calib", place.text)
    result = run(*command, "--alpha", "much")
    assert (result.exit_code, "--alpha must be a number, auto or published" in result.stderr) == (
        2,
        True,
    )
    result = run("quantize", *command[1:], *INT3, "--refine", 3)
    assert (result.exit_code, "--refine works with --rounding gptq" in result.stderr) == (2, True)


def test_a_full_disk_is_seen_before_the_start(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.model)._replace(free=150_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(place, message=r"has 0\.0 GB of free disk, and up to .* 2 times the weights.*Free some")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place to write to for nobody")
def test_a_read_only_place_is_refused(place: Place) -> None:
    refused(place._replace(out=Path("/proc/out")), message=r"cannot be made: .*where you may write")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(place: Place) -> None:
    folder = place.model.parent / "closed"
    folder.mkdir(mode=0o500)
    refused(place._replace(out=folder / "out"), message="cannot be made: .*where you may write")


def test_a_run_that_another_process_works_on_is_left_alone(place: Place) -> None:
    from magr_fx.directories.run_folder import locked

    with locked(place.out.with_name("out.unfinished")):
        refused(place, "--resume", message="another process uses")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "is not a directory"),
        ("/nowhere/at/all", "is not a directory"),
        ("no-such-owner/no-such-model", "is not a directory here, and cannot be downloaded: "),
        (
            "no such name!",
            "cannot be downloaded: HFValidationError: Repo id must",
        ),
    ],
)
def test_an_unknown_model_is_refused(name: str, message: str, place: Place) -> None:
    with pytest.raises(ModelError, match=message):
        find_model(name)
    result = run("plan", name)
    assert result.exit_code == 2
    assert re.match(rf"magr-fx: error: .*{message}", result.stderr)


def test_report_and_plan_need_what_they_read(tmp_path: Path) -> None:
    result = run("report", tmp_path)
    assert (result.exit_code, "has no magr_report.json" in result.stderr) == (2, True)
    (tmp_path / "magr_report.json").write_text("{")
    (tmp_path / "magr_report.npz").write_text("{")
    assert "cannot be read" in run("report", tmp_path).stderr
    assert "has no config.json" in run("plan", tmp_path).stderr
    assert "give a directory" in run("report", tmp_path / "magr_report.npz").stderr


def test_parts_of_a_download_that_was_finished_since_do_not_matter(place: Place) -> None:
    leave_a_download(place)
    folder = place.model / ".cache" / "huggingface" / "download"
    note = "0123456789\n4f1a\n1700000001.5\n"
    (folder / "model-00001-of-00002.safetensors.metadata").write_text(note)
    assert len(read_directory(place.model)) == 12


def test_files_of_others_that_are_named_as_the_hubs_notes_do_not_matter(place: Place) -> None:
    (place.model / "own.metadata").write_bytes(b"\xff\xfe\n\xff")
    (place.model / "folder.metadata").mkdir()
    assert len(read_directory(place.model)) == 12


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["dangling", "loop", "directory"])
def test_weights_that_are_no_file_are_told(name: str, kind: str, place: Place) -> None:
    """The Hub's cache has links, whose files other tools remove."""
    only_bin(place)
    path = place.model / name
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(name if kind == "loop" else "blob")
    with pytest.raises(ModelError, match=rf"{name} (is not a file|cannot be read): .*finish the"):
        read_directory(place.model)


def test_headers_are_read_as_safetensors_reads_them(place: Place) -> None:
    found = read_directory(place.model)
    for name, stored in found.items():
        values = load_file(stored.file)[name]
        assert stored.shape == tuple(values.shape)
        raw = stored.file.read_bytes()[stored.start : stored.stop]
        assert raw == values.numpy().tobytes()
    assert len(found) == 12


def test_nothing_is_written_into_the_models_own_directory(place: Place) -> None:
    within = place._replace(out=place.model / "out")
    refused(within, message="OUT, .*, lies in the model's directory; name one outside")
    spill = ("--spill", place.model / "spilled")
    refused(place, *spill, message="--spill, .*, lies in the model's directory")


def test_a_plan_refuses_groups_that_do_not_divide(place: Place) -> None:
    result = run("plan", place.model, "--target", "int3-group-48")
    assert result.exit_code == 2
    assert "48" in result.stderr


def test_a_plan_of_what_a_run_would_refuse_is_refused(place: Place) -> None:
    without = run("plan", place.model, "--rounding", "gptq")
    assert (without.exit_code, "give --target as well" in without.stderr) == (2, True)
    long = run("plan", place.model, "--length", "4096")
    assert (long.exit_code, "give --length 2048, or less" in long.stderr) == (2, True)


def test_the_report_of_the_directory_that_one_is_in(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        run("transform", place.model, place.out, "--calib", place.text, *INT3, *SMALL).exit_code
        == 0
    )
    monkeypatch.chdir(place.out)
    assert run("report", ".").stdout == run("report", place.out).stdout != ""
