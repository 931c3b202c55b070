"""Masks on their way through models: grams against hooks on the tokens that are no padding."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graph_helpers import Analysis, analyse, assert_gram, collect, gram_of, hook_grams
from tiny_models import activations, tiny_bert, tiny_llama, tiny_mixtral, token_ids
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig
from toys import INT, report_of
from transformers.utils import ModelOutput

from magr_fx import magr_transform

RIGHT = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
LEFT = RIGHT.flip(1)
IDS = token_ids(3, 7, 1)


def added(allowed: Tensor, low: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, low)


def causal(real: Tensor) -> Tensor:
    """[batch, 1, queries, keys], with open rows for the padding that would see nothing."""
    length = real.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
    return sees | ~sees.any(-1, keepdim=True)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda real: real.long(),
    "parameter": lambda real: nn.Parameter(real.float()),
    "4-D bool": causal,
    "4-D added": lambda real: added(causal(real)),
    "4-D added, each head": lambda real: added(causal(real), -1e9).expand(-1, 4, -1, -1),
}


def assert_as_hooks(analysis: Analysis, real: Tensor) -> None:
    """The grams of all nn.Linear are those of the real tokens alone, in float64."""

    def keep(name: str, x: Tensor) -> Tensor | None:
        if x.dim() == 3:
            return real if x.shape[:2] == real.shape else real.T
        return real.flatten() if len(x) == real.numel() else None

    expected, tokens = hook_grams(analysis.model, analysis.calib, keep)
    collected = collect(analysis)
    assert expected
    for name, gram in expected.items():
        assert_gram(collected[name].gram, gram, 1e-4)
        assert collected[name].tokens == tokens[name], name
        assert not collected[name].padding_counted, name
    assert analysis.run().notes == []


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("real", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.slow_unless("left-4-D added")
def test_llama(form: str, real: Tensor) -> None:
    calib = [{"input_ids": IDS, "attention_mask": FORMS[form](real)}]
    assert_as_hooks(analyse(tiny_llama(num_hidden_layers=1), calib), real)


def test_bert_with_an_added_mask() -> None:
    real = RIGHT
    mask = added(real[:, None, None, :], -1e4)
    assert_as_hooks(analyse(tiny_bert(), [{"input_ids": IDS, "attention_mask": mask}]), real)


@pytest.mark.slow
def test_experts_with_an_added_mask() -> None:
    model: Any = tiny_mixtral(num_hidden_layers=1)
    by_pairs = collect(analyse(model, [{"input_ids": IDS, "attention_mask": added(causal(RIGHT))}]))
    plain = collect(analyse(model, [{"input_ids": IDS, "attention_mask": RIGHT.long()}]))
    for name, shared in plain.items():
        assert by_pairs[name].tokens == shared.tokens
        if shared.tokens:
            assert shared.gram is not None
            assert_gram(by_pairs[name].gram, shared.gram.double(), 1e-4)
    experts = [s.tokens for name, s in plain.items() if "gate_up" in name]
    assert sum(experts) == 2 * int(RIGHT.sum())


# ---- ways that a mask takes


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.a = nn.Embedding(64, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.a(self.table(input_ids))
        return result if attention_mask is None else result * attention_mask[..., None]


class Wrapper(nn.Module):
    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.read = Inner(), read

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*self.read(*args, **kwargs))


Named = namedtuple("Named", "input_ids attention_mask")
OtherNames = namedtuple("OtherNames", "tokens valid")


@dataclass
class Record:
    tokens: Tensor
    valid: Tensor
    what: str = "text"


@dataclass
class Output(ModelOutput):  # type: ignore[misc]
    input_ids: Any = None
    attention_mask: Any = None


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        result: Tensor = self.inner(tokens, attention_mask=valid)
        return result


REAL = RIGHT.long()
WAYS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "args": (lambda: Wrapper(lambda *args: args), (IDS, REAL)),
    "list": (lambda: Wrapper(lambda one: one), ([IDS, REAL],)),
    "dict": (lambda: Wrapper(lambda d: (d["a"], d["b"])), ({"a": IDS, "b": REAL},)),
    "kwargs": (lambda: Wrapper(lambda a, b: (a, b)), {"a": IDS, "b": REAL}),
    "named tuple": (lambda: Wrapper(lambda n: (n[0], n[1])), (Named(IDS, REAL),)),
    "other names": (lambda: Wrapper(lambda n: (n.tokens, n.valid)), (OtherNames(IDS, REAL),)),
    "dataclass": (lambda: Wrapper(lambda n: (n.tokens, n.valid)), (Record(IDS, REAL),)),
    "ModelOutput": (
        lambda: Wrapper(lambda n: (n.input_ids, n.attention_mask)),
        (Output(input_ids=IDS, attention_mask=REAL),),
    ),
    "renamed": (Renamed, (IDS, REAL)),
    "DataParallel": (lambda: nn.DataParallel(Inner()), (IDS, REAL)),
    "DataParallel, kwargs": (
        lambda: nn.DataParallel(Inner()),
        {"input_ids": IDS, "attention_mask": REAL},
    ),
}


@pytest.mark.parametrize("name", sorted(WAYS))
@pytest.mark.parametrize("tracer", ["export", "make_fx"])
def test_a_mask_is_known_by_the_module_that_takes_it(name: str, tracer: str) -> None:
    make, item = WAYS[name]
    model = make()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    analysis = analyse(model, [item], tracer=tracer)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert_as_hooks(analysis, RIGHT)


def test_dataclasses_are_no_node_of_trees_afterwards() -> None:
    analyse(WAYS["dataclass"][0](), [WAYS["dataclass"][1]])
    record = Record(IDS, REAL)
    assert torch.utils._pytree.tree_leaves(record) == [record]


class TwoTexts(nn.Module):
    """One encoder, twice; each text has a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Inner(), nn.Linear(8, 2)

    def forward(self, a: Tensor, mask_a: Tensor, b: Tensor, mask_b: Tensor) -> Tensor:
        one, other = self.encoder(a, mask_a).mean(1), self.encoder(b, mask_b).mean(1)
        result: Tensor = self.head(torch.cat([one, other], -1))
        return result


def test_two_texts_have_their_own_masks() -> None:
    model = TwoTexts()
    ids, real = token_ids(3, 5, 2), torch.arange(5) < torch.tensor([2, 5, 1])[:, None]
    collected = collect(analyse(model, [(IDS, REAL, ids, real.long())]))
    with torch.no_grad():
        rows = model.encoder.table(torch.cat([IDS[RIGHT], ids[real]]))
    assert_gram(collected["encoder.a.weight"].gram, gram_of(rows))
    assert collected["encoder.a.weight"].tokens == 16 + 8
    assert collected["head.weight"].tokens == 3


# ---- nn.Transformer and nn.MultiheadAttention


@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", ["bool", "added"])
@pytest.mark.slow_if("bool-True-export", "bool-False-export", "added-True-export")
def test_the_encoder_of_nn_transformer(batch_first: bool, tracer: str, form: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = activations(3, 7, 16)
    src = x if batch_first else x.transpose(0, 1)
    mask = ~RIGHT if form == "bool" else added(RIGHT, -torch.inf)
    analysis = analyse(model, [{"src": src, "src_key_padding_mask": mask}], tracer=tracer)
    assert_as_hooks(analysis, RIGHT)
    collected = collect(analysis)
    assert_gram(collected["layers.0.self_attn.in_proj_weight"].gram, gram_of(x[RIGHT]))
    assert {shared.tokens for shared in collected.values()} == {16}


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 16)
        self.model = nn.Transformer(16, 2, 1, 1, 24, batch_first=True)

    def forward(
        self, source: Tensor, target: Tensor, source_pad: Tensor, target_pad: Tensor
    ) -> Any:
        return self.model(
            self.table(source),
            self.table(target),
            src_key_padding_mask=source_pad,
            memory_key_padding_mask=source_pad,
            tgt_key_padding_mask=target_pad,
        )


@pytest.mark.parametrize("lengths", [[5, 2, 3], [5, 2, 7]])
@pytest.mark.slow_unless("lengths1")
def test_nn_transformer_inside_a_model_of_other_names(lengths: list[int]) -> None:
    """Also where both texts are as long."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    model = Translator().eval()
    target = token_ids(3, max(lengths), 2)
    collected = collect(analyse(model, [(IDS, target, ~RIGHT, ~real)]))
    tokens = {name: shared.tokens for name, shared in collected.items()}
    cross = "model.decoder.layers.0.multihead_attn.in_proj_weight[16:48]"
    assert not any(shared.padding_counted for shared in collected.values())
    for name, count in tokens.items():
        encoder = ".encoder." in name or name == cross
        assert count == (16 if encoder else sum(lengths)), name


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.slow_unless("False")
def test_key_padding_is_of_keys(cross: bool) -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x, query = activations(3, 7, 16), activations(3, 7, 16, seed=5)
    collected = collect(analyse(model, [(query if cross else x, x, x, ~RIGHT)]))
    tokens = {name: shared.tokens for name, shared in collected.items()}
    if cross:  # as many queries as keys, and all of them count
        assert tokens == {
            "in_proj_weight[0:16]": 21,
            "in_proj_weight[16:48]": 16,
            "out_proj.weight": 21,
        }
        assert_gram(collected["in_proj_weight[16:48]"].gram, gram_of(x[RIGHT]))
        assert_gram(collected["in_proj_weight[0:16]"].gram, gram_of(query))
    else:
        assert tokens == {"in_proj_weight": 16, "out_proj.weight": 16}
        assert_gram(collected["in_proj_weight"].gram, gram_of(x[RIGHT]))


# ---- square masks, and what is not understood


@pytest.mark.parametrize("batch", [3, 7])
@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@pytest.mark.slow_unless("make_fx-7")
def test_a_square_mask_takes_nothing_away(batch: int, tracer: str) -> None:
    class Scores(Inner):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            x = self.table(input_ids)
            result: Tensor = self.a((x @ x.mT + attention_mask).softmax(-1) @ x)
            return result

    calib = [(token_ids(batch, 7, 3), torch.full((7, 7), -torch.inf).triu(1))]
    shared = collect(analyse(Scores(), calib, tracer=tracer))["a.weight"]
    assert shared.tokens == 7 * batch
    assert not shared.padding_counted


def test_an_input_that_may_be_a_mask_is_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    model = Wrapper(lambda x, valid: (x * valid,))
    target = IntxWeightOnlyConfig(weight_dtype=INT[4])
    with caplog.at_level("WARNING", "magr_fx"):
        magr_transform(model, [(IDS, REAL)], target=target)
    (note,) = report_of(model).notes
    assert "'valid' of shape (3, 7) looks like a mask" in note or "'args'" in note
    assert "padding is counted" in note
    assert note in caplog.text
    assert f"note: {note}" in str(report_of(model))
    other = Wrapper(lambda x, valid: (x * valid,))
    magr_transform(other, [(IDS, torch.ones_like(REAL))], target=target)
    assert report_of(other).notes == []


def test_a_mask_of_an_exported_graph_beside_other_values() -> None:
    model = tiny_llama(num_hidden_layers=1)
    item = {"input_ids": IDS, "attention_mask": REAL, "use_cache": False}
    graph_module: Any = torch.export.export(model, (), item).module()
    collected = collect(analyse(graph_module, [item]))
    assert {shared.tokens for shared in collected.values()} == {16}


# ---- what the report says of padding that is counted


class Padded(nn.Module):
    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.read = nn.Embedding(64, 16), read
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Any:
        mask = self.read(tokens, lengths)
        return self.encoder(self.table(tokens), src_key_padding_mask=mask)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama(num_hidden_layers=1)

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits


def by_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]) >= lengths[:, None]


UNEVEN = RIGHT.sum(1)
SQUARE = torch.arange(7) < torch.tensor([3, 3, 5, 5, 6, 7, 7])[:, None]
UNREAD: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "of ids": (
        lambda: Padded(lambda x, _: x == 0),
        (IDS,),
        "makes the mask 'src_key",
    ),
    "of lengths": (lambda: Padded(by_lengths), (IDS, UNEVEN), "'lengths' may be the lengths"),
    "of a model inside": (Around, (IDS,), "makes the mask 'attention_mask' itself"),
    "as many sequences as tokens": (
        lambda: tiny_llama(num_hidden_layers=1),
        {"input_ids": token_ids(7, 7), "attention_mask": SQUARE.long()},
        "read as a mask for pairs",
    ),
}


@pytest.mark.parametrize("name", sorted(UNREAD))
@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@pytest.mark.slow_if(
    "export-as many sequences as tokens",
    "export-of a model inside",
    "export-of ids",
    "export-of lengths",
)
def test_padding_that_cannot_be_told_is_noted(name: str, tracer: str) -> None:
    make, item, words = UNREAD[name]
    notes = analyse(make(), [item], tracer=tracer).run().notes
    assert sum(words in note for note in notes) == 1
    assert all("padding is counted" in note for note in notes)


PLAIN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "no mask": (lambda: Padded(lambda *_: None), (IDS,)),
    "no length is less": (lambda: Padded(lambda *_: None), (IDS, torch.full((3,), 7))),
    "llama": (lambda: tiny_llama(num_hidden_layers=1), IDS),
    "bert": (tiny_bert, IDS),
}


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("tracer", ["export", "make_fx"])
@pytest.mark.slow_if("export-llama", "export-no length is less", "export-no mask")
def test_what_marks_no_padding_is_not_noted(name: str, tracer: str) -> None:
    make, item = PLAIN[name]
    assert analyse(make(), [item], tracer=tracer).run().notes == []


def test_a_batch_of_other_sizes_tells_how_a_square_mask_is_meant() -> None:
    square = {"input_ids": token_ids(7, 7), "attention_mask": SQUARE.long()}
    analysis = analyse(
        tiny_llama(num_hidden_layers=1), [square, {"input_ids": IDS, "attention_mask": REAL}]
    )
    assert analysis.run().notes == []
    assert {s.tokens for s in collect(analysis).values()} == {int(SQUARE.sum() + RIGHT.sum())}
