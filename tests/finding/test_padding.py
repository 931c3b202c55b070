"""Padding does not count: which rows a mask takes out, and what is reported where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_helpers import (
    Formula,
    analyse,
    assert_gram,
    collect,
    gram_of,
    hook_grams,
    weight,
)
from tiny_models import VOCABULARY, activations, tiny_bert, tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from magr_fx.passes.finding.mask_inputs import MaskInputs
from magr_fx.passes.finding.padding import token_masks
from magr_fx.passes.graphs.trace import calibration_mode

IN, OUT = 8, 6


def padding(*lengths: int, left: bool = False) -> Tensor:
    """[batch, tokens]: 1 for the tokens of each sequence, 0 for what fills it up to the longest."""
    places = torch.arange(max(lengths))
    mask = (places < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


def text(*lengths: int, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    mask = padding(*lengths, left=left)
    return {"input_ids": token_ids(len(mask), mask.shape[1], seed), "attention_mask": mask}


def masked_text() -> list[dict[str, Tensor]]:
    """Uneven batches, one of them without padding, padded on either side."""
    return [
        text(7, 4, seed=1),
        text(5, 5, 5, seed=2),
        text(2, 9, 6, seed=3, left=True),
        text(1, 3, seed=4),
    ]


def test_the_helper_pads() -> None:
    assert padding(1, 3).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert padding(1, 3, left=True).tolist() == [[0, 0, 1], [1, 1, 1]]


# ---- language models, against hooks on the model itself


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.slow_unless("tiny_bert")
def test_only_tokens_count(make: Callable[[], nn.Module]) -> None:
    model, calib = make(), masked_text()
    analysis = analyse(model, calib)
    expected: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for item in calib:

        def keep(name: str, x: Tensor, mask: Tensor = item["attention_mask"]) -> Tensor | None:
            return mask.bool() if x.dim() == 3 else None  # a pooled token is [batch, in]

        grams, counts = hook_grams(model, [item], keep)
        for name, gram in grams.items():
            expected[name] = expected.get(name, 0) + gram
            tokens[name] = tokens.get(name, 0) + counts[name]
    collected = collect(analysis)
    assert set(collected) == set(expected)
    for name, shared in collected.items():
        assert_gram(shared.gram, expected[name])
        assert shared.tokens == tokens[name]
        assert not shared.padding_counted
    everything = sum(item["attention_mask"].numel() for item in calib)
    padded = [shared.tokens for name, shared in collected.items() if "pooler" not in name]
    assert set(padded) == {sum(int(item["attention_mask"].sum()) for item in calib)}
    assert padded[0] < everything


def test_a_padded_batch_is_as_good_as_its_sequences_alone() -> None:
    """Right padding changes nothing before it: the grams are those of the sequences one by one."""
    model = tiny_llama(num_hidden_layers=1)
    padded = text(7, 4, 5, seed=1)
    single = [padded["input_ids"][i : i + 1, :n] for i, n in enumerate((7, 4, 5))]
    together, apart = collect(analyse(model, [padded])), collect(analyse(model, single))
    for name, shared in together.items():
        other = apart[name]
        assert other.gram is not None
        assert_gram(shared.gram, other.gram.double())
        assert shared.tokens == other.tokens == 16


def t5_item(encoder: Tensor, decoder: Tensor | None, length: int, seed: int) -> dict[str, Tensor]:
    item = {
        "input_ids": token_ids(len(encoder), encoder.shape[1], seed),
        "attention_mask": encoder,
        "decoder_input_ids": token_ids(len(encoder), length, seed + 1),
    }
    return item if decoder is None else {**item, "decoder_attention_mask": decoder}


@pytest.mark.parametrize("decoder_is_masked", [True, False])
@pytest.mark.slow
def test_encoder_and_decoder_have_their_own_mask(decoder_is_masked: bool) -> None:
    """Also where both are as long; cross-attention's keys and values are the encoder's tokens."""
    model = tiny_t5()
    encoder, decoder = padding(6, 3), padding(2, 6)
    item = t5_item(encoder, decoder if decoder_is_masked else None, 6, seed=1)
    analysis = analyse(model, [item])

    def keep(name: str, x: Tensor) -> Tensor | None:
        if name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
            return encoder.bool()
        return decoder.bool() if decoder_is_masked else None

    expected, tokens = hook_grams(model, [item], keep)
    collected = collect(analysis)
    assert len(collected) >= 32
    for name, shared in collected.items():
        assert_gram(shared.gram, expected[name])
        assert shared.tokens == tokens[name]
        assert not shared.padding_counted
    assert set(tokens.values()) == {9, 8 if decoder_is_masked else 12}


# ---- activations that the model flattens to [batch * tokens, in]


def rows_of(
    model: nn.Module, kind: type[nn.Module], calib: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """name → float64 gram of what reaches each module of a kind, padding left out."""
    grams: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            grams[name] = grams.get(name, 0) + gram_of(x[mask.reshape(-1).bool()])

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    for item in calib:
        mask = item["attention_mask"]
        with calibration_mode(model):
            model(**item)
    for handle in handles:
        handle.remove()
    return grams


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def tiny_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "kind", "sites"), [(tiny_gpt2, Conv1D, 8), (tiny_opt, nn.Linear, 12)]
)
@pytest.mark.slow_unless("tiny_opt-Linear-12")
def test_flattened_tokens(make: Callable[[], nn.Module], kind: type[nn.Module], sites: int) -> None:
    """GPT-2 flattens around each addmm, OPT before a layer norm and two linears."""
    model, calib = make(), [text(7, 4, seed=1), text(2, 9, 6, seed=3)]
    collected = collect(analyse(model, calib))
    expected = rows_of(model, kind, calib)
    assert len(collected) == sites
    for name, shared in collected.items():
        assert_gram(shared.gram, expected[name])
        assert shared.tokens == 28
        assert not shared.padding_counted


# ---- one rule at a time


class Masked(Formula):
    """``function(model, x, attention_mask)``, the mask under the name that models give it."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
        return self.function(self, x, attention_mask)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


MASK = padding(5, 3, 4)
X = activations(3, 5, IN, seed=1)
KEPT = X[MASK.bool()]


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.bool(), MASK.float(), MASK.to(torch.uint8), 2 * MASK],
    ids=["int64", "bool", "float32", "uint8", "segments"],
)
def test_whatever_is_not_zero_is_a_token(mask: Tensor) -> None:
    shared = collect(analyse(Masked(lambda m, x, mask: m.a(x), a=linear()), [(X, mask)]))[
        "a.weight"
    ]
    assert_gram(shared.gram, gram_of(KEPT))
    assert shared.tokens == 12


def test_nan_in_padding_poisons_nothing() -> None:
    def function(m: Masked, x: Tensor, mask: Tensor) -> Any:
        return m.b(m.a(x / mask[..., None]).relu())  # x / 0 is Inf, and then Inf - Inf

    model = Masked(function, a=linear(), b=nn.Linear(OUT, 2))
    analysis = analyse(model, [(X, MASK)])
    with torch.no_grad():
        assert not model.a(X / MASK[..., None]).isfinite().all()
        hidden = model.a(KEPT).relu()
    with calibration_mode(model):
        analysis.run().check(progress=False)
    collected = collect(analysis)
    assert_gram(collected["a.weight"].gram, gram_of(KEPT))
    assert_gram(collected["b.weight"].gram, gram_of(hidden))


def test_only_padding() -> None:
    empty = torch.zeros_like(MASK)
    shared = collect(analyse(Masked(lambda m, x, mask: m.a(x), a=linear()), [(X, empty)]))[
        "a.weight"
    ]
    assert shared.tokens == 0
    assert shared.gram is not None
    assert not shared.gram.any()


# name → (function, weight's shape, activation that reaches it); all of its tokens are told apart
TOLD_APART: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "F.linear": (lambda m, x, mask: F.linear(x, m.w), (OUT, IN)),
    "columns": (lambda m, x, mask: m.w @ x.mT, (OUT, IN)),
    "flattened": (lambda m, x, mask: F.linear(x.view(-1, IN), m.w), (OUT, IN)),
    "flattened in two ways": (
        lambda m, x, mask: F.linear(x.reshape(-1, IN).view(x.shape[0] * x.shape[1], IN), m.w),
        (OUT, IN),
    ),
    "flattened, then row by row": (
        lambda m, x, mask: F.linear(
            F.dropout(F.relu(x.flatten(0, 1)) - F.relu(-x.flatten(0, 1)), 0.5, False), m.w
        ),
        (OUT, IN),
    ),
    "bmm, expanded": (lambda m, x, mask: torch.bmm(x, m.w.T.expand(len(x), -1, -1)), (OUT, IN)),
    "tokens first": (lambda m, x, mask: F.linear(x.transpose(0, 1), m.w), (OUT, IN)),
    "tokens first, flattened": (
        lambda m, x, mask: F.linear(x.transpose(0, 1).reshape(-1, IN), m.w),
        (OUT, IN),
    ),
    "turned and turned back": (
        lambda m, x, mask: F.linear(x.mT.relu().mT + x - x.relu(), m.w),
        (OUT, IN),
    ),
}


@pytest.mark.parametrize("name", sorted(TOLD_APART))
@pytest.mark.parametrize("shape", [(3, 5), (3, IN), (IN, 5), (IN, IN)])
def test_tokens_that_are_told_apart(name: str, shape: tuple[int, int]) -> None:
    """By where they come from, whatever sizes agree by chance."""
    function, size = TOLD_APART[name]
    mask = (activations(*shape, seed=2) > 0).long()
    x = activations(*shape, IN, seed=3)
    shared = collect(analyse(Masked(function, w=weight(*size)), [(x, mask)]))["w"]
    assert_gram(shared.gram, gram_of(x[mask.bool()]))
    assert shared.tokens == int(mask.sum())
    assert not shared.padding_counted


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, IN // 2).transpose(1, 2)


# name → (function, weight's shape, what reaches it, and whether padding is among it)
NOT_TOLD_APART: dict[
    str, tuple[Callable[..., Any], tuple[int, int], Callable[[Tensor], Tensor], bool]
] = {
    "heads": (lambda m, x, mask: F.linear(heads(x), m.w), (OUT, IN // 2), heads, True),
    "every second token": (
        lambda m, x, mask: F.linear(x[:, ::2], m.w),
        (OUT, IN),
        lambda x: x[:, ::2],
        True,
    ),
    "one more token": (
        lambda m, x, mask: F.linear(F.pad(x, (0, 0, 1, 0)), m.w),
        (OUT, IN),
        lambda x: F.pad(x, (0, 0, 1, 0)),
        True,
    ),
    "pooled": (lambda m, x, mask: F.linear(x.mean(1), m.w), (OUT, IN), lambda x: x.mean(1), False),
    "the first token": (
        lambda m, x, mask: F.linear(x[:, 0], m.w),
        (OUT, IN),
        lambda x: x[:, 0],
        False,
    ),
}


@pytest.mark.parametrize("name", sorted(NOT_TOLD_APART))
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.slow_if(
    "False-every second token", "False-heads", "True-every second token", "True-heads"
)
def test_rows_that_are_no_tokens_of_the_mask_all_count(name: str, square: bool) -> None:
    """And it is reported, where there may be padding among them."""
    function, size, reaches, may_be_padding = NOT_TOLD_APART[name]
    # As many sequences as tokens: the shapes agree, the order does not.
    x = activations(5, 5, IN, seed=3) if square else X
    mask = padding(5, 3, 4, 1, 2) if square else MASK
    model = Masked(function, w=weight(*size))
    if square:  # traced with sizes that differ, then run where they agree
        analysis = analyse(model, [(X, torch.ones_like(MASK)), (x, mask)])
        assert len(analysis.traces) == 1
        expected = gram_of(reaches(X), reaches(x))
    else:
        analysis = analyse(model, [(x, mask)])
        expected = gram_of(reaches(x))
    shared = collect(analysis)["w"]
    assert_gram(shared.gram, expected)
    assert shared.padding_counted == may_be_padding
    without = collect(analyse(model, [(x, torch.ones_like(mask))]))["w"]
    assert not without.padding_counted, "there is no padding"


def test_a_mask_longer_than_the_tokens_does_not_match() -> None:
    """As beside a key-value cache."""
    longer = padding(9, 3, 4)
    shared = collect(analyse(Masked(lambda m, x, mask: m.a(x), a=linear()), [(X, longer)]))[
        "a.weight"
    ]
    assert_gram(shared.gram, gram_of(X))
    assert shared.padding_counted


@pytest.mark.parametrize("mask", [torch.zeros(3, 1, 5, 5), torch.zeros(3, 5, 5), torch.zeros(5)])
def test_masks_of_other_dimensions_say_nothing_about_padding(mask: Tensor) -> None:
    shared = collect(analyse(Masked(lambda m, x, mask: m.a(x), a=linear()), [(X, mask)]))[
        "a.weight"
    ]
    assert_gram(shared.gram, gram_of(X))
    assert shared.tokens == 15
    assert not shared.padding_counted


def test_no_mask() -> None:
    analysis = analyse(tiny_llama(num_hidden_layers=1), [token_ids(2, 5)])
    calls = [call for site in analysis.found.sites for call in site.calls]
    assert token_masks(analysis.traces[0], calls, MaskInputs(analysis.traced)) == {}


def test_what_descends_from_a_size_alone_has_no_padding() -> None:
    """Learned positions, as many as there are tokens."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(VOCABULARY, IN), linear(), linear()
            self.steps = torch.linspace(0, 1, IN)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            places = torch.arange(input_ids.shape[1])[:, None] * self.steps
            return self.a(self.table(input_ids)) + self.b(places)

    model = Positions()
    collected = collect(analyse(model, [text(5, 3, seed=1)]))
    assert collected["a.weight"].tokens == 8
    assert collected["b.weight"].tokens == 5
    assert not collected["b.weight"].padding_counted


def test_another_modality_is_not_masked() -> None:
    """As many patches as tokens; what mixes both is text."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, IN)
            self.vision, self.text, self.fused = (nn.Linear(IN, IN) for _ in range(3))

        def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Any:
            seen = self.vision(pixel_values)
            read = self.text(self.table(input_ids))
            return self.fused(read + seen)

    item = {**text(5, 3, seed=1), "pixel_values": activations(2, 5, IN)}
    collected = collect(analyse(Both(), [item]))
    assert {name: shared.tokens for name, shared in collected.items()} == {
        "vision.weight": 10,
        "text.weight": 8,
        "fused.weight": 8,
    }
    assert not any(shared.padding_counted for shared in collected.values())


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(VOCABULARY, IN), linear()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.a(self.table(input_ids))


def test_each_trace_has_its_own_mask() -> None:
    """Batches with and without a mask, by name or by place: a site's tokens are the sum."""
    padded, placed, full = text(7, 4, seed=1), text(5, 3, seed=2), text(2, seed=3)
    calib = [
        padded,
        {"input_ids": token_ids(2, 5)},
        token_ids(1, 3),
        (placed["input_ids"], placed["attention_mask"]),
        full,
    ]
    model = Text()
    analysis = analyse(model, calib)
    assert len(analysis.traces) == 4
    shared = collect(analysis)["a.weight"]
    assert shared.tokens == 11 + 10 + 3 + 8 + 2
    assert not shared.padding_counted
    seen = [item["input_ids"][item["attention_mask"].bool()] for item in (padded, placed, full)]
    seen += [token_ids(2, 5).ravel(), token_ids(1, 3).ravel()]
    with torch.no_grad():
        assert_gram(shared.gram, gram_of(model.table(torch.cat(seen))))


class Nested(nn.Module):
    """Takes its inputs in one mapping, as sentence encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_bert()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        inner: Tensor = self.model(
            input_ids=features["input_ids"], attention_mask=features["attention_mask"]
        ).last_hidden_state
        return inner


@pytest.mark.parametrize("wrap", [dict, BatchEncoding])
def test_a_mask_inside_a_mapping_counts(wrap: Callable[[Any], Any]) -> None:
    grams = collect(analyse(Nested(), [(wrap(text(3, 5)),)]))
    shared = grams["model.encoder.layer.0.attention.self.query.weight"]
    assert int(shared.tokens) == 3 + 5
    assert not shared.padding_counted
