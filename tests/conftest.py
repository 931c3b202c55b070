"""What every test runs under: quiet imports, no network, and no global state left changed."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torchao is imported: no attempt to load kernels that were built for other machines.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from other_rounding import perturb

# Before Triton is imported, by torchao for one: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--perturb",
        type=int,
        metavar="SEED",
        help="compute as another processor may: every product off by up to 1e-6 of itself",
    )
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="of what a test leaves to chance, such as when a run is killed; 0 unless given",
    )


def pytest_configure(config: pytest.Config) -> None:
    """With `--dist loadfile`: files in their order, not those with the fewest tests at the end.

    Some of these are the longest, and a worker that has one last is waited for.
    """
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist is there
        config.option.loadscopereorder = False
    # The same examples in every run, and none fails because the machine is busy.
    hypothesis.settings.register_profile(
        "repeatable", deadline=None, derandomize=True, database=None, print_blob=True
    )
    hypothesis.settings.load_profile("repeatable")
    if config.option.perturb is not None:
        perturb(config.option.perturb)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the parameters that `slow_if` names, and those that `slow_unless` does not.

    They are named by the whole id, or by a part of it between dashes.
    """
    for item in items:
        whole = getattr(getattr(item, "callspec", None), "id", "")
        named = {whole, *whole.split("-")}
        slow = [bool(named & {*mark.args}) for mark in item.iter_markers("slow_if")]
        slow += [not named & {*mark.args} for mark in item.iter_markers("slow_unless")]
        if any(slow):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_global_state_changed() -> Iterator[None]:
    """The library may draw no global random numbers and must restore every global switch."""
    torch.manual_seed(0)
    grad, fastpath = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    assert torch.is_grad_enabled() == grad
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.get_float32_matmul_precision() == precision


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each test that takes it runs on the CPU, and on a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of what a test leaves to chance: the same in every run unless `--seed` says another."""
    given: int = request.config.getoption("--seed")
    return given


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small matrices: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
