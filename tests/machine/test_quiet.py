"""Beside the library's own message nothing of torch's is on stderr, and its loggers stay."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_helpers import Formula
from torch import Tensor, nn
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from toys import WIDTH, vectors

from magr_fx import MagRConfig, MagRError, magr_quantize, magr_transform
from magr_fx.machine.quiet import stdout_of_c_silenced, torch_silenced, torch_unlogged


def linears() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, 8)}


def by_value(m: Any, x: Tensor) -> Any:  # torch logs which guard failed, and prints the graph
    return m.b(m.a(x))[: int(x.abs().sum()) % 3 + 1]


def branches_of_two_types(m: Any, x: Tensor) -> Any:  # torch.export names a case of its database
    return torch.cond(x.sum() > 0, m.a, lambda x: m.a(x).double(), (x,))


def no_meta(m: Any, x: Tensor) -> Any:  # torch logs a traceback
    return m.b(torch.ops.magr_fx_test.no_meta(m.a(x)))


def assigns(m: Any, x: Tensor) -> Any:  # torch.export warns
    m.last = x.sum()
    return m.b(m.a(x)) * m.last


def fails(m: Any, x: Tensor) -> Any:
    raise RuntimeError("not today")


def only_the_graph_fails(m: Any, x: Tensor) -> Any:
    y = m.b(m.a(x))
    return y + torch.linalg.cholesky(-torch.eye(8)).sum() if torch.compiler.is_exporting() else y


def reads_a_list(m: Any, x: Tensor) -> Any:  # a long graph is printed
    return m.b(m.a(x)) + x.new_tensor(x[:1].tolist()).sum()


FUNCTIONS = (
    by_value,
    branches_of_two_types,
    no_meta,
    assigns,
    fails,
    only_the_graph_fails,
    reads_a_list,
)


def run_all() -> Iterator[str]:
    """Every function by every way; what was raised."""
    library: Any = torch.library.Library("magr_fx_test", "DEF")  # type: ignore[no-untyped-call]
    library.define("no_meta(Tensor x) -> Tensor")
    library.impl("no_meta", lambda x: x * 3, "CPU")
    library.impl("no_meta", _no_meta, "Meta")
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    config: Any = MagRConfig(alpha=1e-3)
    for function in FUNCTIONS:
        for way in ("auto", "export", "make_fx", "pt2e"):
            model = Formula(function, **linears()).eval()
            try:
                if way == "pt2e":
                    magr_quantize(model, vectors(8, 9), quantizer, config=config, progress=False)
                else:
                    magr_transform(model, vectors(8, 9), config, trace=way, progress=False)
            except MagRError as error:
                yield f"{function.__name__} {way} {type(error).__name__}"


def _no_meta(x: Tensor) -> Tensor:
    raise ValueError("no shape is known")


_CODE = """
import logging, sys, test_quiet
def state():
    loggers = [l for l in logging.root.manager.loggerDict.values() if isinstance(l, logging.Logger)]
    of_loggers = {l.name: (l.level, l.disabled, l.propagate, len(l.filters)) for l in loggers}
    return of_loggers, [len(h.filters) for l in loggers for h in l.handlers]
logging.getLogger("magr_fx").setLevel(logging.CRITICAL)
print("from here on", file=sys.stderr, flush=True)
raised = list(test_quiet.run_all())
print(*raised, sep="\\n")
known, filters = state()
assert not any(filters), filters
assert not any(l[3] for n, l in known.items() if n.startswith("torch.")), known
"""


@pytest.mark.slow
def test_nothing_is_printed_beside_our_own_message() -> None:
    # In a process of its own: torch logs to what was stderr when it was imported.
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    run = subprocess.run(
        [sys.executable, "-c", _CODE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr.partition("from here on\n")[2] == ""
    assert run.returncode == 0
    raised = run.stdout.splitlines()
    for way, count in (("export", 6), ("make_fx", 1), ("pt2e", 6)):
        assert sum(way in line for line in raised) == count, raised


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("silenced", [torch_unlogged, torch_silenced])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (None, "torch"),
        ("torch", "torch"),
        ("torch", "torch.magr_fx_test.made_later"),
        ("torch._dynamo", "torch._dynamo.magr_fx_test"),
    ],
)
def test_only_this_thread_s_records_of_torch_are_kept_away(
    silenced: Any, where: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = _Kept()
    owner = logging.getLogger(where)
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", where is None)
    owner.addHandler(kept)
    try:
        with contextlib.suppress(KeyError), silenced():
            logger = logging.getLogger(name)
            logger.error("ours")
            logging.getLogger("torchvision").error("of a namesake")
            other = threading.Thread(target=logger.error, args=("of another thread",))
            other.start()
            other.join()
            raise KeyError
        assert kept.filters == []
        logging.getLogger(name).error("afterwards")
    finally:
        owner.removeHandler(kept)
    namesake = ["of a namesake"] if where is None else []
    assert kept.messages == [*namesake, "of another thread", "afterwards"]


def test_the_standard_output_of_compiled_code(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    sys.stdout.write("before\n")
    with stdout_of_c_silenced():
        os.write(1, b"lost")
        libc.puts(b"lost as well")
    os.write(1, b"after")
    assert capfd.readouterr().out == "before\nafter"
    kept = os.dup(1)
    os.close(1)
    try:
        with stdout_of_c_silenced():
            pass
    finally:
        os.dup2(kept, 1)
        os.close(kept)
