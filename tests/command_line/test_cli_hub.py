"""Models by their names on the Hub, from a server on this machine that answers as it does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from cli_helpers import INT3, SMALL, contents, done, run
from hub_server import COMMIT, Hub
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama

from magr_fx.errors import ModelError
from magr_fx.model_files.model_directory import find_model

NAME = "owner/tiny"
# What the directory on the Hub has beside the model, and nobody needs.
UNNEEDED = ("pytorch_model.bin", "model.gguf", "original/consolidated.safetensors", "onnx/m.onnx")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards, a text, and what a run on that directory makes of them."""
    folder = tmp_path_factory.mktemp("origin")
    save_model(folder / "model", tiny_llama(num_hidden_layers=1), max_shard_size="20KB")
    save_text(folder / "text.txt")
    done("transform", folder / "model", folder / "wanted", *options(folder))
    return folder


@pytest.fixture
def hub(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub of this process, with an empty cache."""
    shutil.copytree(origin / "model", tmp_path / "remote")
    for name in UNNEEDED:
        (tmp_path / "remote" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "remote" / name).write_bytes(b"not needed")
    hub = Hub({NAME: tmp_path / "remote"})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    resolve = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    with hub.served():
        yield hub
        huggingface_hub.close_session()


def options(folder: Path) -> list[Any]:
    return ["--calib", folder / "text.txt", *INT3, *SMALL]


def transform(origin: Path, out: Path, name: str = NAME) -> list[Any]:
    return ["transform", name, out, *options(origin)]


def refused(*command: Any, message: str) -> None:
    """It fails in one line, and nothing is left of it."""
    result = run(*command)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert re.match(rf"magr-fx: error: {message}", lines[0]), lines[0]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


@pytest.mark.slow
def test_a_plan_downloads_no_weights_and_is_that_of_the_directory(origin: Path, hub: Hub) -> None:
    rest = (*INT3, *SMALL, "--tflops", "1")
    plans = [done("plan", name, *rest).stdout for name in (origin / "model", NAME)]
    of_directory, of_name = (plan.partition("disk: room for")[0] for plan in plans)  # rates differ
    assert "disk: room for" in plans[1]
    assert of_name == of_directory.replace(str(origin / "model"), NAME)
    assert "config.json" in hub.downloaded()
    asked = [path for _, path in hub.requests if re.search(r"safetensors|\.bin|gguf|onnx", path)]
    assert asked == []


@pytest.mark.slow
def test_a_run_by_name_is_that_of_the_directory(origin: Path, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = done(*transform(origin, out))
    assert result.stderr == ""
    assert contents(out) == contents(origin / "wanted")
    assert not any(path.is_symlink() for path in out.rglob("*"))  # as they are in the cache
    assert set(shards(origin / "model")) <= set(hub.downloaded())
    assert not {Path(name).name for name in UNNEEDED} & set(hub.downloaded())


@pytest.mark.slow
def test_a_download_that_is_interrupted_is_taken_up_again(
    origin: Path, hub: Hub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hub.broken = shards(origin / "model")[-1]
    refused(
        *transform(origin, out),
        message=f"{NAME} is not a directory here, and cannot be downloaded: .*503.*check the name, "
        "the connection .*files that are complete are not downloaded again",
    )
    assert hub.cut >= 2  # the client itself has tried again
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
    snapshot = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / COMMIT
    assert hub.broken not in shards(snapshot)
    whole = {path.name for path in snapshot.iterdir()}
    assert whole

    # A process that is killed leaves its part of a file behind as well.
    (snapshot.parents[1] / "blobs" / "0a1b.2c3d.incomplete").write_bytes(b"half")
    # What there is does for a plan, which is of the whole model.
    plan = ("plan", NAME, *INT3, *SMALL, "--tflops", "1")
    assert "rewritten: 7 sites" in done(*plan).stdout

    hub.broken, before = None, len(hub.downloaded())
    done(*transform(origin, out))
    assert contents(out) == contents(origin / "wanted")
    assert not whole & set(hub.downloaded()[before:])


@pytest.mark.parametrize("name", ["owner/none", "none"])
def test_a_name_that_is_nobodys(name: str, origin: Path, hub: Hub, tmp_path: Path) -> None:
    message = (
        f"{name} is not a directory here, and cannot be downloaded: RepositoryNotFoundError: .*"
        r"Give a directory, or check the name, .*private need a login \(hf auth login\)"
    )
    refused("plan", name, message=message)
    refused(*transform(origin, tmp_path / "out", name), message=message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["remote"]


@pytest.mark.parametrize("status", [401, 403])  # to who has not logged in, or not accepted
def test_a_gated_model(status: int, origin: Path, hub: Hub, tmp_path: Path) -> None:
    hub.refusals["/resolve/"] = (status, "GatedRepo", "Access to this model is restricted")
    message = (
        f"{NAME} is not a directory here, and cannot be downloaded: GatedRepoError: .*Access to "
        r"this model is restricted\..* gated or private need a login \(hf auth login\)"
    )
    refused("plan", NAME, message=message)
    refused(*transform(origin, tmp_path / "out"), message=message)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_a_token_that_is_not_taken(hub: Hub) -> None:
    hub.refusals["/"] = (401, None, "Invalid credentials in Authorization header")
    refused("plan", NAME, message=rf"{NAME} is .*401.*Invalid credentials.*\(hf auth login\)")


def test_what_is_in_the_cache_does_without_the_hub(
    origin: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("plan", NAME, *INT3, *SMALL, "--tflops", "1")
    hub.close()
    unreachable = (
        r"is not a directory here, and cannot be downloaded: the Hub cannot be reached "
        r"\(.*refused\), and the cache does not hold all of it. Give a directory, "
        "or check .* the connection"
    )
    refused(*transform(origin, tmp_path / "out"), message=f"{NAME} {unreachable}")
    refused("plan", "owner/other", message=f"owner/other {unreachable}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = r".*the Hub cannot be reached \(.*HF_HUB_OFFLINE.*\), and the cache does not hold"
    refused(*transform(origin, tmp_path / "out"), message=offline)
    done("plan", NAME, *INT3, *SMALL, "--tflops", "1")


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.slow_unless("False")
def test_a_cached_model_is_rewritten_without_the_hub(
    offline: bool, origin: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_model(NAME)
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    done(*transform(origin, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(origin / "wanted")


def test_a_hub_that_does_not_answer_is_not_waited_for(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = find_model(NAME)
    monkeypatch.setattr("magr_fx.model_files.hub.PATIENCE", 0.2)
    hub.silent.set()
    assert find_model(NAME) == wanted
    with pytest.raises(ModelError, match=r"the Hub cannot be reached .*, and the cache does not"):
        find_model("owner/other")
    hub.silent.clear()


def test_a_cache_that_cannot_be_written_is_no_lost_connection(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"NotADirectoryError: .*check .*the disk"):
        find_model(NAME)


@pytest.mark.parametrize(("more", "shown"), [("", False), ("--progress", True)])
def test_a_download_shows_its_bars_where_they_are_wanted(
    more: str,
    shown: bool,
    origin: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def download(*_: Any) -> Path:
        seen.append(are_progress_bars_disabled())
        raise ModelError("enough")

    monkeypatch.setattr("magr_fx.model_files.model_directory.download", download)
    refused(*transform(origin, tmp_path / "out"), *more.split(), message="enough")
    assert seen == [not shown]  # by default: this is no terminal
    assert not are_progress_bars_disabled()


@pytest.mark.slow
def test_as_a_user_runs_it(origin: Path, hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, to which only the environment says where the Hub is."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}  # fmt: skip
    for gone in ("HF_HUB_CACHE", "HF_TOKEN", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"):
        environment.pop(gone, None)
    command = [sys.executable, "-m", "magr_fx", *transform(origin, tmp_path / "out")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert contents(tmp_path / "out").keys() == contents(origin / "wanted").keys()
    assert (tmp_path / "home" / "hub" / "models--owner--tiny").is_dir()
