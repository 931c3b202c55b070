"""Reading the calibration: every form of item, once, and an error for what is none."""

from __future__ import annotations

import itertools
import warnings
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import activations, tiny_llama, token_ids
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from magr_fx.errors import CalibrationError
from magr_fx.passes.inputs import calibration
from magr_fx.passes.inputs.calibration import read_calib
from magr_fx.passes.inputs.dataclass_inputs import dataclasses_open

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


# ---- batches that lie in the same memory


def refilled(kind: str) -> Iterator[Any]:
    """Three batches of ones, twos and threes, all of them in one buffer."""
    array = np.zeros((2, 4), dtype=np.float32)
    buffer = torch.from_numpy(array) if kind == "NumPy" else torch.zeros(2, 4)
    if kind == "shared memory":
        buffer = torch.empty(0).new_zeros(2, 4).share_memory_()  # type: ignore[no-untyped-call]
    for value in (1.0, 2.0, 3.0):
        buffer.fill_(value)
        forms: dict[str, Any] = {
            "dict": {"x": buffer},
            "tuple": (buffer, (buffer, [buffer])),
            "view": buffer[:, :2],
            "strided": buffer.T,
            "BatchEncoding": BatchEncoding({"x": buffer}),
            "parameter": nn.Parameter(buffer),
            "dataclass": (Record(buffer, {"n": 1}),),
        }
        yield forms.get(kind, buffer)


@dataclass
class Record:
    x: Tensor
    options: dict[str, int]


class Items:
    """An iterable that is no generator, and one that is a list by its type."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        return refilled(self.kind)


class LazyList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return refilled("plain")


KINDS = ["plain", "NumPy", "shared memory", "dict", "tuple", "view", "strided"]
KINDS += ["BatchEncoding", "parameter", "dataclass"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [refilled, Items, lambda kind: iter(Items(kind))])
def test_a_buffer_that_is_refilled(kind: str, wrap: Any) -> None:
    batches = read_calib(wrap(kind), model)
    for value, batch in zip((1.0, 2.0, 3.0), batches, strict=True):
        with dataclasses_open((batch.args, batch.kwargs)):
            tensors = [t for t in tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
        assert tensors
        assert all(bool((t == value).all()) for t in tensors)
    assert not batches[0].notes


def test_a_list_that_makes_its_items() -> None:
    batches = read_calib(LazyList(range(3)), model)
    assert [float(batch.args[0].mean()) for batch in batches] == [1, 2, 3]


def test_what_is_no_tensor_is_copied_too() -> None:
    def items() -> Iterator[Any]:
        array, options = np.zeros(3), {"n": object()}
        for value in range(3):
            array[:] = value
            yield (IDS, array, options)

    batches = read_calib(items(), model)
    assert [float(batch.args[1].mean()) for batch in batches] == [0, 1, 2]


def test_one_tensor_stays_one() -> None:
    (batch,) = read_calib(iter([(IDS, IDS, {"x": IDS})]), model)
    assert batch.args[0] is batch.args[1]
    assert batch.args[0] is batch.args[2]["x"]


@pytest.mark.parametrize("kind", ["plain", "NumPy", "dict", "tuple", "view", "BatchEncoding"])
def test_a_list_of_one_buffer_is_noted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its values are lost already."""
    (note,) = read_calib(list(refilled(kind)), model)[0].notes
    assert "batches 0 and 1 lie in the same memory" in note
    assert "clone each" in note
    assert note in caplog.text


def test_what_batches_have_in_common_by_right_is_not_noted() -> None:
    mask = torch.ones(2, 4)
    calib = [{"x": activations(2, 4, seed=at), "attention_mask": mask} for at in range(3)]
    assert not read_calib(calib, model)[0].notes
    whole = activations(6, 4)
    assert not read_calib([whole[:2], whole[2:4], whole[4:]], model)[0].notes
    positions = torch.arange(4)
    placed = [(activations(2, 4, seed=at), positions) for at in range(3)]
    assert not read_calib(placed, model)[0].notes


# ---- calibrations without an end


def test_an_endless_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_BATCHES", 20)
    with pytest.raises(CalibrationError, match=r"yielded 20 batches.*itertools\.islice"):
        read_calib(itertools.repeat(IDS), model)
    assert len(read_calib(itertools.repeat(IDS, 20), model)) == 20
    assert len(read_calib([IDS] * 30, model)) == 30  # all there is, as everybody sees


def test_more_than_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "available", lambda device: 3.5 * IDS.nbytes)
    with pytest.raises(CalibrationError, match=r"first 4 batches .* memory of cpu.*islice"):
        read_calib(itertools.repeat(IDS), model)


def test_empty_batches_are_left_out() -> None:
    batches = read_calib([IDS[:0], IDS, {"x": IDS[:, :0]}], model)
    assert [batch.index for batch in batches] == [1]
    assert batches[0].notes == ("2 of 3 calibration batches are empty",)
    with pytest.raises(CalibrationError, match="no token of the 2 calibration batches counts"):
        read_calib([IDS[:0], IDS[:, :0]], model)


# ---- forms that are often given


NUMBERS, ARRAYS, TEXT = "torch.tensor", r"torch\.from_numpy", "tokenize text"


class Rows:
    """Like a list, as data sets of one's own often are."""

    def __getitem__(self, index: int) -> Tensor:
        return IDS

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("item", "remedy"),
    [
        ([1, 2, 3], NUMBERS),
        ([3], NUMBERS),
        ((1, 2), NUMBERS),
        ([[1, 2], [3, 4]], NUMBERS),
        (([1.0, 2.0],), NUMBERS),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, NUMBERS),
        (BatchEncoding({"input_ids": [1, 2]}), NUMBERS),
        ({"input_ids": [[1, 2]], "extra": IDS}, NUMBERS),
        (IDS.numpy(), ARRAYS),
        ((IDS.numpy(),), ARRAYS),
        ([IDS.numpy(), 3], ARRAYS),
        ({"input_ids": IDS.numpy()}, ARRAYS),
        ({"input_ids": IDS.numpy(), "attention_mask": MASK}, ARRAYS),
        (np.float32(3), ARRAYS),
        ("text", TEXT),
        (["a", "b"], TEXT),
        ({"text": ["a", "b"]}, TEXT),
        (3, NUMBERS),
        (DataLoader(TensorDataset(IDS)), "DataLoader itself"),
        (TensorDataset(IDS), "torch DataLoader"),
        (Record(IDS, {}), r"tuple: \(batch,\)"),
        ({0: IDS, 1: IDS}, r"key 0, .*tuple: \(features,\)"),
        (UserDict({("x", 1): IDS, "y": IDS}), r"key \('x', 1\), .*tuple: \(features,\)"),
    ],
)
def test_what_to_do_about_a_form(item: Any, remedy: str) -> None:
    with pytest.raises(CalibrationError, match=f"batch 1 .*{remedy}"):
        read_calib([IDS, item], model)


@pytest.mark.parametrize(
    ("calib", "remedy"),
    [
        (IDS.numpy(), r"\[torch\.from_numpy\(calib\)\]"),
        (TensorDataset(IDS), "DataLoader"),
        (Rows(), "DataLoader"),
        (lambda: iter([IDS]), r"called: calib\(\)"),
    ],
)
def test_what_to_do_about_a_calib(calib: Any, remedy: str) -> None:
    with pytest.raises(CalibrationError, match=remedy):
        read_calib(calib, model)


@pytest.mark.parametrize("item", [(), (None,), (IDS, 3), {"n": 3}, {"sizes": (None,)}])
def test_what_is_no_tensor_may_be_right(item: Any) -> None:
    assert len(read_calib([item], model)) == 1


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(
        self, x: Tensor, head_mask: Any = None, labels: Any = None, timesteps: Any = None
    ) -> Tensor:
        result: Tensor = self.a(x)
        return result


def test_labels_that_would_be_an_option_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = activations(4, 4), torch.arange(4)
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    (note,) = read_calib(loader, Classifier())[0].notes
    assert "'head_mask'. If those are labels, pass the images alone" in note
    assert note in caplog.text
    for item in ([images, images], {"x": images, "labels": labels}, [images]):
        assert not read_calib([item], Classifier())[0].notes
    assert not read_calib([[images, images, labels]], Classifier())[0].notes  # forward's labels


# ---- tensors of other kinds


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "is nested: pad it"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
            "is nested: pad it",
        ),
        (lambda: torch.ones(3, 4).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.ones(3, 4).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.ones(3, 4, device="meta"), "meta device"),
        (lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), "is quantized"),
        (lambda: FakeTensorMode().from_tensor(torch.ones(3, 4)), "is fake"),
        (lambda: masked_tensor(torch.ones(3, 4), torch.ones(3, 4) > 0), "is a MaskedTensor"),
    ],
)
@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"x": (IDS, x)}])
def test_a_tensor_that_is_no_ordinary_one(make: Any, kind: str, form: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = make()
        with pytest.raises(CalibrationError, match=rf"batch 1 holds a tensor .*{kind}"):
            read_calib([IDS, form(tensor)], model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn])
def test_values_of_any_dtype_are_looked_at(dtype: torch.dtype) -> None:
    good, bad = torch.ones(2, 4).to(dtype), torch.full((2, 4), torch.nan).to(dtype)
    assert read_calib([good], model)[0].args[0].dtype == dtype
    with pytest.raises(CalibrationError, match="8 NaN or Inf"):
        read_calib([bad], model)


@pytest.mark.parametrize("make", [nn.Parameter, lambda x: x.clone().requires_grad_()])
@pytest.mark.parametrize("wrap", [list, iter])
def test_inputs_have_no_gradient(make: Any, wrap: Any) -> None:
    x = make(activations(2, 4))
    (batch,) = read_calib(wrap([{"x": x}]), model)
    assert type(batch.kwargs["x"]) is Tensor
    assert not batch.kwargs["x"].requires_grad
    assert x.requires_grad
