"""Options of the command line do what they say, or are refused: none is passed over in silence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import INT3, SMALL, Place, contents, done, refused, run, tensors
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama, tiny_mixtral
from transformers import AutoTokenizer

from magr_fx.directories.skipped import check_skipped, is_skipped, rewritable
from magr_fx.errors import ConfigError
from magr_fx.model_files.calibration_text import text_batches


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model", tiny_llama(num_hidden_layers=2))
    save_text(folder / "text.txt")
    return folder


@pytest.fixture
def place(made: Path) -> Iterator[Place]:
    """Of a model that no test changes."""
    before = contents(made)
    found = Place(made / "model", made / "out", made / "text.txt")
    yield found
    shutil.rmtree(found.out, ignore_errors=True)
    assert contents(made) == before


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("*.donw_proj", r"\*\.down_proj"),
        ("*.DOWN_PROJ", r"\*\.down_proj"),
        ("down_proj", "down_proj"),
        ("model.layers.7.mlp.up_proj", r"model\.layers\.\*\.mlp\.up_proj"),
        ("model.layers.0.mlp.up_proj.weight", r"mlp\.up_proj"),
        ("layers.0", "layers"),
        ("*.up_proj,*.down_proj", "proj"),
        ("", "model.layers.0.self_attn.q_proj"),
        ("xyzzy", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_pattern_that_names_nothing_is_an_error(pattern: str, close: str) -> None:
    message = rf"--skip {re.escape(repr(pattern))} names no module .*names .*{close}"
    for skip in ((pattern,), ("*.up_proj", pattern)):
        with pytest.raises(ConfigError, match=message):
            check_skipped(tiny_llama(), skip)


@pytest.mark.parametrize("command", ["transform", "quantize", "plan"])
def test_each_command_refuses_such_patterns(command: str, place: Place) -> None:
    refused(place, "--skip", "", message="--skip '' names no module", command=command)
    refused(place, "--skip", "model", message="nothing is left to rewrite", command=command)


@pytest.mark.parametrize("pattern", ["model.layers.0", "*.0", "model.layers.0.*"])
def test_a_pattern_takes_all_that_is_in_what_it_names(pattern: str) -> None:
    model = tiny_llama()
    chosen = rewritable(model, (pattern,))
    names = {name for name, m in model.named_modules() if name and chosen(m, name)}
    assert "model.layers.1.mlp.up_proj" in names
    assert not any(name.startswith("model.layers.0.") for name in names)


def test_quantize_leaves_the_same_alone(place: Place) -> None:
    command = ("quantize", place.model, place.out, "--calib", place.text, *INT3, *SMALL)
    done(*command, "--skip", "*.0.mlp")
    names = {name.split("._weight")[0] for name in tensors(place.out) if "_weight_" in name}
    assert len(names) == 11
    assert not any(".0.mlp." in name for name in names)


@pytest.mark.parametrize(
    ("pattern", "warned"),
    [("lm_head", True), ("*.embed_tokens", True), ("*norm", True), ("*.rotary_emb", True),
     ("*.up_proj", False), ("*.mlp", False)],
)  # fmt: skip
def test_a_pattern_of_what_is_left_alone_anyway_is_warned_of(
    pattern: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_skipped(tiny_llama(), (pattern,))
    assert [f"--skip {pattern!r} changes nothing" in m for m in caplog.messages] == [True] * warned
    if pattern == "lm_head":
        caplog.clear()
        check_skipped(tiny_llama(), (pattern,), head=True)
        assert caplog.messages == []


def test_experts_are_no_linears(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_mixtral()
    check_skipped(model, ("*.experts",))
    assert caplog.messages == []
    check_skipped(model, ("*.experts",), linears_only=True)
    assert "changes nothing" in caplog.messages[0]
    with pytest.raises(ConfigError, match=r"names no module .*experts"):
        check_skipped(model, ("*.experts.3",))


def test_names_are_matched_whole_and_as_they_are_written() -> None:
    assert is_skipped("model.layers.0.mlp.up_proj", ("model.layers.0",))
    assert not is_skipped("model.layers.01.mlp", ("model.layers.0",))
    assert not is_skipped("model.mlp", ("Model.*",))
    assert not is_skipped("model.mlp", ("mlp",))
    assert is_skipped("model.mlp", ("other", "*.ml?"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alpha", "nan"), "alpha must be a finite number"),
        (("--damping", "inf"), "damping must be a finite number"),
        (("--max-steps", "-3"), "max_steps must be an int"),
        (("--device", ""), "--device must be auto, cpu"),
        (("--target", ""), "no target is called ''"),
    ],
)
def test_values_out_of_range_are_refused(
    options: tuple[str, ...], message: str, place: Place
) -> None:
    refused(place, *options, message=message)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("transform", option, "") for option in ("--calib", "--log-json", "--spill")),
        *(("transform", option, "x" * 300) for option in ("--calib", "--log-json", "--spill")),
        *(("transform", "--timeout", value) for value in ("nan", "inf", "1e30", "0", "-1")),
        *(("plan", "--tflops", value) for value in ("nan", "inf", "1e308", "0", "-1")),
        *(("plan", "--tokens", value) for value in ("0", "9" * 400)),
        *(("plan", "--length", value) for value in ("1", "9" * 30)),
    ],
    ids=lambda value: str(value)[:12],
)
def test_values_that_mean_nothing_are_usage_errors(
    command: str, option: str, value: str, place: Place
) -> None:
    rest: tuple[Any, ...] = () if command == "plan" else (place.out, "--calib", place.text)
    result = run(command, place.model, *rest, option, value)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"Error: Invalid value for '{option}'" in result.stderr


@pytest.mark.parametrize("out", ["", "x" * 300, "x" * 250], ids=len)
def test_an_out_that_can_have_no_name_is_refused(
    out: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("transform", place.model, out, "--calib", place.text, *SMALL)
    assert (result.exit_code, result.stdout) == (2, "")
    told = r"^(Error: Invalid value for 'OUT'|magr-fx: error: ).*name"
    assert re.search(told, result.stderr, re.MULTILINE)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("model", ["", "x" * 3000], ids=len)
def test_a_model_that_can_have_no_name_is_refused(model: str) -> None:
    result = run("plan", model)
    assert result.exit_code == 2
    assert re.fullmatch("magr-fx: error: .* is not a directory.*\n", result.stderr)


def test_lines_are_appended_to_no_file_of_the_run(place: Place) -> None:
    for log, what in (
        (place.text, "is --calib"),
        (place.model / "log", "lies in MODEL"),
        (place.model / "config.json", "lies in MODEL"),
        (place.out / "log", "lies in OUT"),
        (place.out.with_name("out.unfinished") / "log", "lies in OUT.unfinished"),
    ):
        refused(place, "--log-json", log, message=f"--log-json .* {what}")


def test_a_run_that_is_refused_leaves_no_log(place: Place, tmp_path: Path) -> None:
    log = tmp_path / "log"
    refused(place, "--log-json", log, "--skip", "nothing", message="--skip .* names no module")
    assert not log.exists()
    log.touch()
    refused(place, "--log-json", log, "--skip", "nothing", message="--skip .* names no module")
    assert log.exists()


def test_what_is_spilled_is_not_where_out_will_be(place: Place) -> None:
    for folder in (place.out, place.out / "spilled", place.out.with_name("out.unfinished") / "x"):
        refused(place, "--spill", folder, message="--spill, .*, lies in .*outside")


def test_a_directory_that_no_run_made_is_never_removed(place: Place, tmp_path: Path) -> None:
    """Such as a model whose name ends in .unfinished."""
    shutil.copytree(place.model, tmp_path / "it.unfinished")
    own = Place(tmp_path / "it.unfinished", tmp_path / "it", place.text)
    refused(own, "--resume", message="it.unfinished, .*was not made by a run; name another OUT")
    other = own._replace(model=place.model)
    refused(other, "--resume", message="it.unfinished, .*was not made by a run; name another OUT")
    assert contents(own.model) == contents(place.model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 tokens"),
        (("w1 w2 " * 200).encode("utf-16"), "cannot be read as text: .*UTF-8"),
        (("w1 w2 " * 200).encode("utf-16-le"), "cannot be read as text: it has zero bytes"),
    ],
    ids=["empty", "UTF-16", "UTF-16 without a mark"],
)
def test_a_text_that_is_none_is_refused(
    content: bytes, message: str, place: Place, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    refused(place._replace(text=text), message=message)


def test_the_mark_of_utf_8_is_no_token(place: Place, tmp_path: Path) -> None:
    marked = tmp_path / "marked"
    marked.write_bytes(b"\xef\xbb\xbf" + place.text.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    plain, other = (
        text_batches(tokenizer, file, tokens=128, length=16) for file in (place.text, marked)
    )
    assert all(map(torch.equal, plain, other))
