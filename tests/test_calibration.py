"""Reading the calibration: every form of item, once, and an error for what is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny_models import activations, tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from magr_fx.errors import CalibrationError
from magr_fx.passes.calibration import read_calib

model = nn.Linear(4, 3)
IDS, MASK = token_ids(2, 5), torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("item", "args", "kwargs"),
    [
        (IDS, (IDS,), {}),
        ((IDS, MASK), (IDS, MASK), {}),
        ([IDS, MASK], (IDS, MASK), {}),
        ((IDS, None, 3), (IDS, None, 3), {}),
        ((), (), {}),
        (
            {"input_ids": IDS, "attention_mask": MASK},
            (),
            {"input_ids": IDS, "attention_mask": MASK},
        ),
        (MappingProxyType({"input_ids": IDS}), (), {"input_ids": IDS}),
        (BatchEncoding({"input_ids": IDS, "n": 2}), (), {"input_ids": IDS, "n": 2}),
        ({"nested": (IDS, [MASK])}, (), {"nested": (IDS, [MASK])}),
    ],
)
def test_forms_of_an_item(item: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    (batch,) = read_calib([item], model)
    assert batch.index == 0
    torch.testing.assert_close((batch.args, batch.kwargs), (args, kwargs), rtol=0, atol=0)


def test_a_mapping_is_one_signature_in_any_order() -> None:
    one, two = read_calib([{"b": IDS, "a": MASK}, {"a": MASK, "b": IDS}], model)
    assert list(one.kwargs) == list(two.kwargs) == ["a", "b"]


def test_a_data_loader_gives_lists_of_arguments() -> None:
    x, y = activations(5, 4, seed=1), activations(5, 2, seed=2)
    batches = read_calib(DataLoader(TensorDataset(x, y), batch_size=2), model)
    assert [batch.index for batch in batches] == [0, 1, 2]
    assert [len(batch.args[0]) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([batch.args[0] for batch in batches]), x)
    torch.testing.assert_close(torch.cat([batch.args[1] for batch in batches]), y)


def test_a_generator_is_consumed_once_and_in_order() -> None:
    read: list[int] = []

    def items() -> Iterator[Tensor]:
        for seed in range(3):
            read.append(seed)
            yield activations(2, 4, seed=seed)

    calib = items()
    batches = read_calib(calib, model)
    assert read == [0, 1, 2]
    for seed, batch in enumerate(batches):
        torch.testing.assert_close(batch.args[0], activations(2, 4, seed=seed))
    with pytest.raises(CalibrationError, match=r"calib is empty.*generator that was iterated"):
        read_calib(calib, model)


def test_inputs_have_one_memory_layout() -> None:
    """A slice or a transposed tensor leads to the same trace as any other."""
    x = activations(4, 6)
    (sliced, transposed) = read_calib([x[:, ::2], {"x": x.T}], model)
    assert sliced.args[0].is_contiguous()
    assert transposed.kwargs["x"].is_contiguous()
    torch.testing.assert_close(sliced.args[0], x[:, ::2])
    torch.testing.assert_close(transposed.kwargs["x"], x.T)


def test_inputs_go_to_the_models_device(device: torch.device) -> None:
    (batch,) = read_calib([(IDS, {"mask": MASK})], nn.Linear(4, 3).to(device))
    assert batch.args[0].device.type == device.type
    assert batch.args[1]["mask"].device.type == device.type


def test_a_model_without_parameters_leaves_inputs_where_they_are() -> None:
    (batch,) = read_calib([IDS], nn.ReLU())
    assert batch.args[0] is IDS


class Caching(nn.Module):
    def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
        return x


@pytest.mark.parametrize("item", [IDS, (IDS,), {"x": IDS}, {"x": IDS, "use_cache": True}])
def test_no_cache_where_forward_takes_the_argument(item: Any) -> None:
    (batch,) = read_calib([item], Caching())
    assert batch.kwargs["use_cache"] is False


def test_no_cache_for_a_language_model_only() -> None:
    (batch,) = read_calib([IDS], tiny_llama())
    assert batch.kwargs == {"use_cache": False}
    (batch,) = read_calib([IDS], model)
    assert batch.kwargs == {}


def test_use_cache_given_by_position_stays() -> None:
    (batch,) = read_calib([(IDS, True)], Caching())
    assert batch.args[1] is True
    assert batch.kwargs == {}


def test_use_cache_of_an_exported_graph_stays() -> None:
    graph_module = torch.export.export(Caching(), (IDS,), {"use_cache": True}).module()
    (batch,) = read_calib([{"x": IDS, "use_cache": True}], graph_module)
    assert batch.kwargs["use_cache"] is True


def test_the_callers_mapping_is_not_changed() -> None:
    item = {"x": IDS}
    read_calib([item], Caching())
    assert item == {"x": IDS}


@pytest.mark.parametrize(
    ("calib", "kind"),
    [
        (IDS, "Tensor"),
        ({"input_ids": IDS}, "dict"),
        (BatchEncoding({"input_ids": IDS}), "BatchEncoding"),
        ("some text", "str"),
        (b"some bytes", "bytes"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_iterable_of_inputs(calib: Any, kind: str) -> None:
    with pytest.raises(CalibrationError, match=rf"iterable of model inputs.*got {kind}.*\[calib\]"):
        read_calib(calib, model)


@pytest.mark.parametrize("calib", [[], (), iter(()), DataLoader([])])  # type: ignore[arg-type]
def test_empty(calib: Any) -> None:
    with pytest.raises(CalibrationError, match="calib is empty"):
        read_calib(calib, model)


@pytest.mark.parametrize("item", ["text", 3, None, {1, 2}, object()])
def test_a_wrong_item_is_named(item: Any) -> None:
    with pytest.raises(CalibrationError, match=f"batch 1 is a {type(item).__name__}; each must be"):
        read_calib([IDS, item], model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: (IDS, x), lambda x: {"x": [x]}])
def test_an_input_that_is_not_finite_is_named(bad: float, dtype: torch.dtype, form: Any) -> None:
    x = torch.zeros(3, 4, dtype=dtype)
    x[0, 1] = x[2, 3] = bad
    with pytest.raises(CalibrationError, match=r"batch 2 holds 2 NaN or Inf .* shape \(3, 4\)"):
        read_calib([IDS, IDS, form(x), form(x)], model)


def test_minus_infinity_is_an_additive_mask() -> None:
    mask = torch.full((2, 2), float("-inf")).triu(1)
    (batch,) = read_calib([(IDS, mask)], model)
    assert batch.args[1].isneginf().sum() == 1


def test_a_mapping_type_is_kept_out_of_the_arguments() -> None:
    """Whatever the mapping was, forward receives plain keyword arguments."""

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            return {"b": IDS, "a": MASK}[key]

        def __iter__(self) -> Iterator[str]:
            return iter(["b", "a"])

        def __len__(self) -> int:
            return 2

    (batch,) = read_calib([Lazy()], model)
    assert type(batch.kwargs) is dict
    torch.testing.assert_close(batch.kwargs, {"a": MASK, "b": IDS}, rtol=0, atol=0)
