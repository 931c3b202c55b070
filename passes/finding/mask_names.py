"""Which inputs of a trace are masks, and of whose tokens, by what modules call them."""

from __future__ import annotations

from magr_fx.passes.graphs.module_calls import ModuleCall
from magr_fx.passes.graphs.trace import Trace

TEXT = frozenset({"input_ids", "inputs_embeds"})
DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels"})
# Whether True is padding; None: modules differ, and the values have to tell.
MARKS_PADDING: dict[str, bool | None] = {
    "attention_mask": False,
    "decoder_attention_mask": False,
    "encoder_attention_mask": False,
    "key_padding_mask": True,
    "src_key_padding_mask": True,
    "tgt_key_padding_mask": True,
    "memory_key_padding_mask": True,
    "padding_mask": None,
    "pad_mask": None,
    "src_padding_mask": None,
    "tgt_padding_mask": None,
    "attn_mask": None,
    "input_mask": None,
}
# Whose tokens a mask is of, by the names of the other arguments.
_TOKENS: dict[str, frozenset[str]] = {
    "decoder_attention_mask": DECODER,
    "encoder_attention_mask": frozenset({"encoder_hidden_states"}),
    "key_padding_mask": frozenset({"key", "value"}),
    "src_key_padding_mask": frozenset({"src"}),
    "src_padding_mask": frozenset({"src"}),
    "tgt_key_padding_mask": frozenset({"tgt"}),
    "tgt_padding_mask": frozenset({"tgt"}),
    "memory_key_padding_mask": frozenset({"memory", "src"}),
}
# Tokens that look at others, and have no part in their masks.
UNMASKED = DECODER | {"tgt", "query"}
OTHERS = UNMASKED | {"encoder_hidden_states", "memory"}
_LATER = ("decoder_", "tgt_")  # masks of tokens that descend from all others
_READ = ("encoder_", "src_", "memory_", "key_padding")  # of tokens that others look at
# Inputs that are no masks of padding, whatever they hold.
_NO_MASKS = (
    *("head_mask", "perm_mask", "causal_mask", "masked_pos", "global_attention_mask"),
    *("token_type", "position", "segment", "label", "target"),
)

Role = tuple[str, ModuleCall]  # what a mask is called, and by whose call


def calls_of(trace: Trace) -> list[ModuleCall]:
    """The call of the model itself, and those of the modules inside."""
    root = ModuleCall(tuple((name, at) for at, name in enumerate(trace.input_names)))
    return [root, *trace.calls]


def roles_of(trace: Trace) -> dict[int, Role]:
    """What each mask is, by its position among the inputs.

    A module inside knows better how a mask is meant than a wrapper that only hands it on.
    """
    roles: dict[int, Role] = {}
    for call in calls_of(trace):
        for name, at in call.arguments:
            if name not in MARKS_PADDING:
                continue
            if at not in roles or _tells_more(name, roles[at][0]):
                roles[at] = (name, call)
                continue
            known, by = roles[at]
            order = next((c.batch_first for c in (by, call) if c.batch_first is not None), None)
            if known == name and not _names_tokens(by, name) and _names_tokens(call, name):
                by = call
            roles[at] = (known, by._replace(batch_first=order))
    return roles


def masks_made(trace: Trace) -> list[str]:
    """The masks of padding that the model made itself, and gave to modules inside.

    Where True is padding a mask is for nothing else; any other one is of padding if it is given
    beside the input's own tokens, as to a model inside a wrapper.
    """
    return [
        name
        for call in trace.calls
        for name in call.masks
        if MARKS_PADDING.get(name)
        or (MARKS_PADDING.get(name) is False and _names_tokens(call, name))
    ]


def tokens_of(role: str) -> frozenset[str]:
    """The names of the arguments whose tokens a mask is of."""
    return _TOKENS.get(role, TEXT)


def order_of(role: str) -> int:
    """Which masks come first: a decoder's values descend from the encoder's tokens as well."""
    if role.startswith(_LATER):
        return 0
    return 2 if is_read(role) else 1


def is_read(role: str) -> bool:
    """Whether a mask is of tokens that others look at, so that what mixes both is not theirs."""
    return role.startswith(_READ)


def is_named_as_mask(name: str) -> bool | None:
    """Whether an input is called a mask; None where its name tells nothing."""
    if any(part in name for part in _NO_MASKS):
        return False
    return True if "mask" in name or "padding" in name else None


def is_named_as_lengths(name: str) -> bool:
    """Whether an input is called the lengths of sequences that are padded."""
    words = name.lower().split("_")
    return "cu" not in words and any(
        word in ("len", "lens", "seqlen", "seqlens") or "length" in word for word in words
    )


def _tells_more(name: str, known: str) -> bool:
    """Whether a module says otherwise of how a mask is meant than the module around it."""
    marks = MARKS_PADDING[name]
    return marks is not None and marks != MARKS_PADDING[known]


def _names_tokens(call: ModuleCall, role: str) -> bool:
    return any(argument in tokens_of(role) for argument, _ in call.arguments)
