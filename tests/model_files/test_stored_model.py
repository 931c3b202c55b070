"""A directory is taken only if it holds what its configuration says, whatever form that has."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, Place, done, edit, refused, run, shard_with, tensors
from safetensors.torch import load_file, save_file
from tiny_directories import save_model, save_text, save_tokenizer
from tiny_models import VOCABULARY, tiny_gpt_neox, tiny_llama, tiny_mixtral
from transformers import BertConfig, BertForPreTraining, BertModel, RobertaConfig, RobertaModel

from magr_fx.directories.prepare_directory import check_length
from magr_fx.errors import ConfigError, ModelError
from magr_fx.model_files.model_directory import read_config, read_directory
from magr_fx.model_files.stored_model import check_stored, empty_model

Stored = dict[str, torch.Tensor]
PlaceOf = Callable[[str], Place]
UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3"
COMMANDS = ("transform", "quantize", "plan")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def tiny_bert_with_heads() -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(BertConfig(**SIZES)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=1),
    "tied": lambda: tiny_llama(num_hidden_layers=1, tie_word_embeddings=True),
    "mixtral": lambda: tiny_mixtral(num_hidden_layers=1),
    "neox": tiny_gpt_neox,
    "bert": tiny_bert,
    "pretraining": tiny_bert_with_heads,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        save_tokenizer(folder / name)
    save_model(folder / "shards", MODELS["llama"](), max_shard_size="20KB")
    save_text(folder / "text.txt")
    return folder


@pytest.fixture
def place_of(saved: Path, tmp_path: Path) -> PlaceOf:
    def place(name: str) -> Place:
        shutil.copytree(saved / name, tmp_path / "model")
        shutil.copy(saved / "text.txt", tmp_path)
        return Place(tmp_path / "model", tmp_path / "out", tmp_path / "text.txt")

    return place


def store(folder: Path, change: Callable[[Stored], Any]) -> None:
    """Change what the one file of a model holds."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file, {"format": "pt"})


def check(folder: Path) -> None:
    check_stored(empty_model(folder, read_config(folder)), folder, read_directory(folder))


def drop(*names: str) -> Callable[[Stored], Any]:
    return lambda stored: [stored.pop(name) for name in names]


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Stored], Any]:
    return lambda stored: stored.update({name: torch.ones(shape).to(dtype)})


def rename(old: str, new: str) -> Callable[[Stored], Any]:
    return lambda stored: stored.update({new: stored.pop(old)})


WRONG: list[tuple[str, Callable[[Stored], Any], str]] = [
    ("llama", drop(NORM), f"lacks {NORM}"),
    ("llama", drop(HEAD), f"lacks {HEAD}"),
    ("llama", drop(UP, NORM), r"lacks \S+weight, .*1 more"),
    ("llama", rename(UP, UP + "s"), f"lacks {UP}, .*{UP}s, which the model lacks"),
    ("tied", drop(EMBEDDING), rf"lacks ({HEAD}|{EMBEDDING})"),
    ("bert", drop("pooler.dense.weight"), "lacks pooler.dense.weight"),
    ("llama", put(UP.replace("0", "1"), 48, 32), r"layers.1.mlp.up_proj.weight in .*not a tensor"),
    ("llama", put(NORM), rf"{NORM} in .* shape \[\], .*it is \[32\]"),
    ("llama", put(NORM, 32, dtype=torch.bool), f"{NORM} in .* is stored as BOOL"),
    ("llama", put(UP, 48, 32, dtype=torch.float8_e4m3fn), f"{UP} in .* is stored as F8_E4M3"),
    ("llama", put("packed", 3, 4, dtype=torch.int32), "packed in .* is stored as I32"),
    ("mixtral", drop(f"{EXPERT}.w1.weight"), f"lacks {EXPERT}.w1.weight"),
    ("mixtral", drop(f"{EXPERT}.w2.weight"), f"lacks {EXPERT}.w2.weight"),
    ("mixtral", put(f"{EXPERT}.w1.weight", 3, 4), rf"{EXPERT}.w1.weight in .* shape \[3, 4\]"),
    ("mixtral", put(f"{EXPERT}.w2.weight", 3, 4), rf"{EXPERT}.w2.weight in .* shape \[3, 4\]"),
    (
        "mixtral",
        put(f"{EXPERT}.w3.weight", 48, 32, dtype=torch.int8),
        f"{EXPERT}.w3.weight in .* is stored as I8",
    ),
    (
        "mixtral",
        put(f"{EXPERT[:-1]}4.w2.weight", 32, 48),
        "experts.4.w2.weight in .* is one more than config.json has",
    ),
]


@pytest.mark.parametrize(("name", "damage", "message"), WRONG, ids=[w[2][:48] for w in WRONG])
def test_what_the_files_do_not_hold_is_named(
    name: str, damage: Callable[[Stored], Any], message: str, place_of: PlaceOf
) -> None:
    place = place_of(name)
    store(place.model, damage)
    with pytest.raises(ModelError, match=message):
        check(place.model)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_refuses_experts_in_one_line(command: str, place_of: PlaceOf) -> None:
    place = place_of("mixtral")
    store(place.model, drop(f"{EXPERT}.w1.weight"))
    refused(place, message=f"lacks {EXPERT}.w1.weight", command=command)


def without_prefix(stored: Stored) -> None:
    for name in [*stored]:
        stored[name.removeprefix("model.")] = stored.pop(name)


def mixed(stored: Stored) -> None:
    stored[UP], stored[NORM] = stored[UP].half(), stored[NORM].bfloat16()


def mixed_experts(stored: Stored) -> None:
    stored[f"{EXPERT}.w1.weight"] = stored[f"{EXPERT}.w1.weight"].half()


def old_buffers(stored: Stored) -> None:
    for name, value in {
        "bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        "masked_bias": torch.tensor(-1e4),
        "rotary_emb.inv_freq": torch.ones(4),
    }.items():
        stored[f"gpt_neox.layers.0.attention.{name}"] = value


def head_too(stored: Stored) -> None:
    stored[HEAD] = stored[EMBEDDING].clone()


head_only = rename(EMBEDDING, HEAD)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, lambda _: None) for name in MODELS),
        ("llama", without_prefix),
        ("llama", mixed),
        ("llama", put("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
        ("neox", old_buffers),
        ("bert", put("embeddings.position_ids", 1, 512, dtype=torch.int64)),
        ("tied", head_too),
        ("tied", head_only),
        ("mixtral", mixed_experts),
    ],
)
def test_what_transformers_knows_is_taken(
    name: str, change: Callable[[Stored], Any], place_of: PlaceOf
) -> None:
    place = place_of(name)
    store(place.model, change)
    check(place.model)


@pytest.mark.parametrize(
    ("verb", "name", "change", "sites"),
    [
        ("transform", "llama", without_prefix, 7),
        ("transform", "tied", head_too, 7),
        ("transform", "tied", head_only, 7),
        ("transform", "neox", old_buffers, 8),
        ("quantize", "tied", head_only, 7),
        ("quantize", "neox", old_buffers, 8),
    ],
)
@pytest.mark.slow_unless("transform-llama-without_prefix-7")
def test_such_directories_are_worked_on(
    verb: str, name: str, change: Callable[[Stored], Any], sites: int, place_of: PlaceOf
) -> None:
    """What is no site is in OUT with the same name and bits."""
    place = place_of(name)
    store(place.model, change)
    done(verb, place.model, place.out, "--calib", place.text, *INT3, *SMALL)
    ours, original = tensors(place.out), tensors(place.model)
    same = {n for n in original if n in ours and torch.equal(ours[n], original[n])}
    assert len(original) - len(same) == sites


def as_class(name: str) -> Callable[[Any], Any]:
    return lambda config: config.update(architectures=[name])


HEADS = ["cls.predictions.bias", "cls.seq_relationship.weight"]
POOLER = "bert.pooler.dense.weight"


@pytest.mark.parametrize(
    ("name", "kind", "change", "left_out"),
    [
        ("pretraining", "BertModel", lambda _: None, HEADS),
        ("pretraining", "BertForMaskedLM", lambda _: None, [HEADS[1], POOLER]),
        ("pretraining", "BertForNextSentencePrediction", lambda _: None, HEADS[:1]),
        ("pretraining", "BertModel", put("bert.embeddings.position_ids", 1, 512), HEADS),
        ("llama", "LlamaModel", lambda _: None, [HEAD]),
        ("llama", "LlamaForCausalLM", put("v_head.summary.weight", 1, 32), ["v_head.summary"]),
    ],
)
def test_what_a_class_leaves_out_is_told(
    name: str,
    kind: str,
    change: Callable[[Stored], Any],
    left_out: list[str],
    place_of: PlaceOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = place_of(name)
    store(place.model, change)
    edit(place.model / "config.json", as_class(kind))
    check(place.model)
    (told,) = [r.message for r in caplog.records if r.name == "magr_fx"]
    assert told.startswith(f"{kind} does not use these tensors of ")
    assert all(part in told for part in left_out)
    assert "encoder" not in told


@pytest.mark.parametrize(
    ("name", "kind", "change", "message"),
    [
        (
            "pretraining",
            "BertModel",
            put("bert.encoder.layer.1.output.dense.weight", 32, 48),
            "bert.encoder.layer.1.output.dense.weight in .* is not a tensor of BertModel",
        ),
        (
            "pretraining",
            "BertModel",
            put("bert.extra.weight", 3, 4),
            "bert.extra.weight in .* not a tensor",
        ),
        (
            "pretraining",
            "BertForMaskedLM",
            lambda stored: stored.update({POOLER: torch.ones(3, 4)}),
            f"{POOLER} in .* not a tensor",
        ),
        ("llama", "LlamaModel", put("model.norm.bias", 32), "model.norm.bias in .* not a tensor"),
        ("llama", "LlamaForCausalLM", put("lm_head.bias", 64), "lm_head.bias in .* not a tensor"),
        ("bert", "BertModel", put("extra.weight", 3, 4), "extra.weight in .* not a tensor"),
    ],
)
def test_what_no_class_has_is_refused(
    name: str, kind: str, change: Callable[[Stored], Any], message: str, place_of: PlaceOf
) -> None:
    place = place_of(name)
    store(place.model, change)
    edit(place.model / "config.json", as_class(kind))
    with pytest.raises(ModelError, match=message):
        check(place.model)


@pytest.mark.parametrize("verb", ["transform", "quantize"])
@pytest.mark.slow_unless("transform")
def test_what_is_left_out_stays_in_the_files(verb: str, place_of: PlaceOf) -> None:
    place = place_of("pretraining")
    edit(place.model / "config.json", as_class("BertModel"))
    told = done(verb, place.model, place.out, "--calib", place.text, *INT3, *SMALL).stderr
    assert "BertModel does not use these tensors of" in told
    ours, original = tensors(place.out), tensors(place.model)
    heads = [name for name in original if name.startswith("cls.")]
    assert heads
    assert all(torch.equal(ours[name], original[name]) for name in heads)
    changed = [n for n in original if not (n in ours and torch.equal(ours[n], original[n]))]
    assert {name.split(".")[1] for name in changed} <= {"encoder", "pooler"}
    assert len(changed) >= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 32}, r"shape \[64, 32\], .*it is \[32, 32\]"),
        ({"num_hidden_layers": 0}, r"model.layers.0.\S+ in .* is not a tensor of LlamaForCausalLM"),
        ({"hidden_size": "32"}, "cannot build the model .*hidden_size.*expected int"),
        ({"dtype": "float33"}, "cannot build the model .*float33"),
        ({"architectures": ["LlamaModel"]}, None),
        ({"text_config": [1]}, "config.json does not describe a model"),
        ({"quantization_config": "x"}, "is already quantized, by an unknown method"),
        ({"architectures": "x"}, None),
        ({"architectures": [None]}, None),
        ({"quantization_config": None}, None),
    ],
    ids=str,
)
def test_what_a_configuration_says(
    change: dict[str, Any], message: str | None, place_of: PlaceOf
) -> None:
    place = place_of("llama")
    edit(place.model / "config.json", lambda config: config.update(change))
    if message is None:
        check(place.model)
        return
    with pytest.raises(ModelError, match=message):
        check(place.model)


@pytest.mark.parametrize("text", ["null", "{}", "[" * 100_000, "{", "\xff"], ids=range(5))
def test_a_configuration_that_is_none_is_refused(text: str, place_of: PlaceOf) -> None:
    place = place_of("llama")
    (place.model / "config.json").write_text(text, encoding="latin-1")
    refused(place, message="(.*config.json|.*model_type)", command="plan")


def index_with(**more: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        edit(index, lambda record: record["weight_map"].update(more))

    return damage


def forget(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", lambda record: record["weight_map"].pop(UP))


def misplace(folder: Path) -> None:
    own = shard_with(folder, UP).name
    other = next(f.name for f in sorted(folder.glob("model-*")) if f.name != own)
    index_with(**{UP: other})(folder)


def empty_index(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", lambda record: record.update(weight_map={}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (index_with(other="model-00001-of-00003.safetensors"), "other is in no file, but .*says"),
        (forget, f"{UP} is in model-0.* does not name it"),
        (misplace, f"{UP} is in model-0.* says that it is in model-0"),
        (empty_index, "has no weights: .*names no file"),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    damage: Callable[[Path], None], message: str, place_of: PlaceOf
) -> None:
    place = place_of("shards")
    damage(place.model)
    refused(place, message=message, command="quantize")
    refused(place, message=message, command="plan")


def overlapping(header: Any) -> None:
    """Two tensors of one shape in one place, and a hole in the other."""
    q, o = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
    header[q]["data_offsets"] = header[o]["data_offsets"]


def no_shape(header: Any) -> None:
    header[UP]["shape"] = [-48, -32]


def no_dtype(header: Any) -> None:
    header[UP]["dtype"] = "F12"


def a_list_of_dtypes(header: Any) -> None:
    header[UP]["dtype"] = ["F32"]


def no_metadata(header: Any) -> None:
    header["__metadata__"] = {"format": 3}


@pytest.mark.parametrize("damage", [overlapping, no_shape, no_dtype, a_list_of_dtypes, no_metadata])
def test_a_header_that_safetensors_cannot_read_is_refused(
    damage: Callable[[Any], None], place_of: PlaceOf
) -> None:
    place = place_of("llama")
    file = place.model / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    damage(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(place, message=".*is not a valid safetensors file: ", command="quantize")


@pytest.mark.parametrize("content", [b"", b"\xff" * 200, b"\x03" + bytes(7) + b"[1]"])
def test_a_file_of_something_else_is_refused(content: bytes, place_of: PlaceOf) -> None:
    place = place_of("llama")
    (place.model / "model.safetensors").write_bytes(content)
    refused(place, message=".*is not a valid safetensors file: ", command="quantize")


def no_unknown(made: Any) -> None:
    made["model"]["vocab"].pop("w5")
    made["model"]["unk_token"] = "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda made: made["model"]["vocab"].update(w5=500),
            "uses the id 500 for 'w5', but the model's embedding has only 64 rows",
        ),
        (no_unknown, "tokenizer cannot read .*text.txt"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    change: Callable[[Any], Any], message: str, place_of: PlaceOf
) -> None:
    place = place_of("llama")
    edit(place.model / "tokenizer.json", change)
    refused(place, message=message)


def test_what_cannot_be_copied_is_found_first(place_of: PlaceOf) -> None:
    place = place_of("llama")
    (place.model / "LICENSE").symlink_to(place.model.parent / "nowhere")
    refused(place, message="LICENSE, which would be copied into OUT, cannot be read")
    (place.model / "LICENSE").unlink()
    (place.model / "more").mkdir()
    os.mkfifo(place.model / "more" / "pipe")
    refused(place, message="more/pipe, which would be copied into OUT, .*not a regular file")


def test_positions_are_counted_from_behind_the_padding(tmp_path: Path) -> None:
    config = RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=1)
    model = RobertaModel(config).eval()
    model(torch.full((1, 16), 5))  # which the model itself can do, and no more
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))
    config.architectures = ["RobertaModel"]
    config.save_pretrained(tmp_path)
    raw = read_config(tmp_path)
    made = empty_model(tmp_path, raw)
    check_length(raw, made, 16)
    with pytest.raises(ConfigError, match=r"17 tokens are longer than the 16 .*--length 16"):
        check_length(raw, made, 17)


@pytest.mark.slow
def test_reports_that_are_damaged_are_refused(place_of: PlaceOf) -> None:
    place = place_of("llama")
    done("transform", place.model, place.out, "--calib", place.text, *INT3, *SMALL)
    rows, channels = place.out / "magr_report.json", place.out / "magr_report.npz"
    text, arrays = rows.read_text(), channels.read_bytes()
    record = json.loads(text)
    site = record["sites"][0]
    for damaged in (
        "[1]",
        "null",
        text[:-9],
        json.dumps({**record, "sites": "x"}),
        json.dumps({**record, "sites": [{**site, "shape": 3}]}),
        json.dumps({**record, "sites": [{**site, "output_error": "x"}]}),
        json.dumps({**record, "seconds": "x"}),
    ):
        rows.write_text(damaged)
        unreadable(place.out, "the report in .* cannot be read: ")
    rows.write_text(text)
    for other in (b"", arrays[:-100], b"PK\x03\x04" + bytes(99)):
        channels.write_bytes(other)
        unreadable(place.out, "the report in .* cannot be read: ")
    channels.write_bytes(arrays)
    assert run("report", place.out).exit_code == 0


@pytest.mark.parametrize("state", [[1], {"a": 1}])
def test_states_of_something_else_are_refused(state: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out.unfinished" / "checkpoint"
    folder.mkdir(parents=True)
    torch.save(state, folder / "state-000000.pt")
    unreadable(tmp_path / "out", "")


def unreadable(out: Path, message: str) -> None:
    result = run("report", out)
    assert result.exit_code == 2
    assert re.fullmatch(rf"magr-fx: error: {message}.*\n", result.stderr)
