"""Commands on two ranks, as torchrun starts them: one writes and speaks, all end together."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from cli_helpers import INT3, SMALL, contents, done, tensors
from cli_rank_helpers import Ended, on_cli_ranks
from hub_server import Hub
from huggingface_hub import constants
from tiny_directories import save_model, save_text
from tiny_models import tiny_llama
from torch import distributed as dist

from magr_fx.directories import prepare_directory
from magr_fx.directories.convert_directory import report_of
from magr_fx.directories.write_directory import StoredWeights
from magr_fx.errors import CalibrationError
from magr_fx.passes.rewriting import checkpoint
from magr_fx.passes.rewriting.checkpoint import Checkpoint

SAVED = "the same command with --resume continues from the last saved state"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and what two ranks make of them that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    save_model(
        folder / "model",
        tiny_llama(num_hidden_layers=1, tie_word_embeddings=True),
        max_shard_size="20KB",
    )
    save_text(folder / "text.txt")
    log = ("--log-json", folder / "log.jsonl")
    both = on_cli_ranks(2, command(folder, folder / "wanted", *log), folder, before=no_reading_back)
    succeeded(both)
    assert both[0].stdout.count("7 rewritten") == 1
    assert both[0].stdout.count("is written; magr-fx report") == 1
    assert len((folder / "log.jsonl").read_text().splitlines()) == 4  # of one rank
    assert not (folder / "wanted.unfinished").exists()
    return folder


def command(folder: Path, out: Path, *more: Any, verb: str = "transform") -> list[Any]:
    text = ("--calib", folder / "text.txt")
    return [verb, folder / "model", out, *text, *INT3, *SMALL, "--timeout", "1", *more]


def no_reading_back() -> None:
    """A rank that keeps no rewritten weight must not ask for one, whose old values it would get."""
    let_go: set[str] = set()
    whole = StoredWeights.__getitem__

    def store(self: StoredWeights, name: str, weight: torch.Tensor) -> None:
        let_go.add(name)

    def read(self: StoredWeights, name: str) -> torch.Tensor:
        if name in let_go:
            raise KeyError(f"{name} was rewritten, and is read once more")
        return whole(self, name)

    patched: Any = StoredWeights
    patched.store, patched.__getitem__ = store, read


def die_at_step_2() -> None:
    no_reading_back()
    _at_step_2(lambda: os.kill(os.getpid(), signal.SIGKILL), rank=1)


def interrupt_at_step_2() -> None:
    _at_step_2(lambda: os.kill(os.getpid(), signal.SIGINT), rank=None)


def _at_step_2(what: Any, rank: int | None) -> None:
    whole = Checkpoint.save

    def save(self: Checkpoint, step: int, *rest: Any) -> None:
        if step == 2 and rank in (None, dist.get_rank()):
            what()
        whole(self, step, *rest)

    patched: Any = Checkpoint
    patched.save = save
    module: Any = checkpoint
    module.BETWEEN_STATES = 0


def succeeded(both: list[Ended]) -> None:
    """And only the first has written anything: so few tokens are worth a warning."""
    assert [one.code for one in both] == [0, 0], both
    assert all("warning: 1 sites gain" in line for line in both[0].stderr.splitlines())
    assert (both[1].stdout, both[1].stderr) == ("", "")


def no_text_on_rank_1() -> None:
    def calibration_batches(*_: Any, **__: Any) -> Any:
        raise CalibrationError("the text is not here")

    if os.environ["RANK"] == "1":
        patched: Any = prepare_directory
        patched.calibration_batches = calibration_batches


def told_once(both: list[Ended], message: str, code: int = 2) -> None:
    assert [one.code for one in both] == [code, code], both
    assert [one.stdout for one in both] == ["", ""]
    assert both[1].stderr == ""
    assert both[0].stderr.startswith("magr-fx: ")
    assert len(both[0].stderr.splitlines()) == 1, both[0].stderr
    assert message in both[0].stderr


def close(ours: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> float:
    """The largest difference between what is written in floating point."""
    assert ours.keys() == one.keys()
    return max(float((ours[name].float() - one[name].float()).abs().max()) for name in ours)


@pytest.mark.slow
def test_two_ranks_make_what_one_process_makes(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(*command(reference, out))
    ours, one = tensors(reference / "wanted"), tensors(out)
    original = tensors(reference / "model")
    assert sum(not torch.equal(ours[name], original[name]) for name in ours) == 7
    assert max(float((ours[n] - original[n]).abs().max()) for n in ours) > 1e-2
    assert close(ours, one) < 1e-3
    assert contents(reference / "wanted").keys() == contents(out).keys()
    rows = zip(report_of(reference / "wanted").sites, report_of(out).sites, strict=True)
    assert all((a.name, a.outcome) == (b.name, b.outcome) for a, b in rows)


@pytest.mark.slow
def test_quantize_with_gptq(reference: Path, tmp_path: Path) -> None:
    gptq = ("--rounding", "gptq")
    done(*command(reference, tmp_path / "one", *gptq, verb="quantize"))
    both = on_cli_ranks(2, command(reference, tmp_path / "out", *gptq, verb="quantize"), tmp_path)
    succeeded(both)
    assert "7 quantized by torchao" in both[0].stdout
    ours, one = tensors(tmp_path / "out"), tensors(tmp_path / "one")
    assert ours.keys() == one.keys()
    codes = [name for name in ours if name.endswith("qdata")]
    assert len(codes) == 7
    alike = torch.cat([(ours[name] == one[name]).flatten() for name in codes])
    assert float(alike.float().mean()) > 0.99
    assert report_of(tmp_path / "out").target.startswith("IntxWeightOnlyConfig")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", "4096"), "windows of 4,096 tokens are longer"),
        (("--log-json", "/proc/none/log"), "name another file"),  # which only the first opens
    ],
)
@pytest.mark.slow_if("options0-windows of 4,096 tokens are longer")
def test_bad_input_is_told_once(
    options: tuple[str, ...], message: str, reference: Path, tmp_path: Path
) -> None:
    told_once(on_cli_ranks(2, command(reference, tmp_path / "out", *options), tmp_path), message)
    assert not any(tmp_path.glob("out*/"))


def test_an_error_of_another_rank_is_told_by_the_first(reference: Path, tmp_path: Path) -> None:
    given = command(reference, tmp_path / "out")
    both = on_cli_ranks(2, given, tmp_path, before=no_text_on_rank_1)
    told_once(both, "magr-fx: error: the text is not here")
    assert not any(tmp_path.glob("out*/"))


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_and_they_go_on(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = on_cli_ranks(2, command(reference, out), tmp_path, before=die_at_step_2)
    assert [one.code for one in killed] == [2, -signal.SIGKILL]
    assert "magr-fx: error: rank 0 of 2 lost the others" in killed[0].stderr
    assert SAVED in killed[0].stderr
    assert len(killed[0].stderr.splitlines()) == 1
    assert not out.exists()
    alone = on_cli_ranks(1, command(reference, out, "--resume"), tmp_path)
    assert alone[0].code == 2
    assert "number of ranks (was 2, now 1)" in alone[0].stderr
    again = command(reference, out, "--resume")
    both = on_cli_ranks(2, again, tmp_path, before=no_reading_back)
    succeeded(both)
    assert contents(out) == contents(reference / "wanted")
    assert not Path(f"{out}.unfinished").exists()


def test_ctrl_c_is_told_once(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = on_cli_ranks(2, command(reference, out), tmp_path, before=interrupt_at_step_2)
    told_once(both, f"interrupted; {SAVED}", code=130)


def on_the_hub() -> None:
    """The Hub and the cache that the environment names: the forked process has read another one."""
    patched: Any = constants
    patched.ENDPOINT = os.environ["HUB"]
    patched.HUGGINGFACE_CO_URL_TEMPLATE = (
        os.environ["HUB"] + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patched.HF_HUB_CACHE, patched.HF_HUB_OFFLINE = os.environ["CACHE"], False
    patched.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    huggingface_hub.close_session()


def test_one_rank_of_a_machine_downloads(reference: Path, tmp_path: Path) -> None:
    """What is wrong with the options is seen when the configuration is there, after the weights."""
    hub = Hub({"owner/tiny": reference / "model"})
    given = command(reference, tmp_path / "out", "--length", "4096")
    given[1] = "owner/tiny"
    environment = {"HUB": hub.url, "CACHE": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    with hub.served():
        both = on_cli_ranks(2, given, tmp_path, before=on_the_hub, environment=environment)
    told_once(both, "windows of 4,096 tokens are longer")
    fetched = [path for kind, path in hub.requests if kind == "GET" and "/resolve/" in path]
    assert sum(path.endswith(".safetensors") for path in fetched) > 1
    assert len(fetched) == len(set(fetched))
