"""Which inputs of a trace are masks, and for which tokens, by the names that modules give them."""

from __future__ import annotations

from magr_fx.passes.graphs.module_calls import ModuleCall
from magr_fx.passes.graphs.trace import Trace

TEXT = frozenset({"input_ids", "inputs_embeds"})
DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels"})
# Whether True is padding; None if modules differ, so that the values have to tell.
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
# The arguments whose tokens a mask is for; TEXT for any other mask.
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
# Arguments whose tokens attend to other tokens, but are not in the masks of these.
UNMASKED = DECODER | {"tgt", "query"}
OTHERS = UNMASKED | {"encoder_hidden_states", "memory"}
_LATER = ("decoder_", "tgt_")  # masks for a decoder's tokens, which depend on all other tokens
_READ = ("encoder_", "src_", "memory_", "key_padding")  # masks for tokens that others attend to
# Parts of the names of inputs that are no padding masks, whatever they hold.
_NO_MASKS = (
    *("head_mask", "perm_mask", "causal_mask", "masked_pos", "global_attention_mask"),
    *("token_type", "position", "segment", "label", "target"),
)

Role = tuple[str, ModuleCall]  # the name of a mask, and the call that uses this name


def calls_of(trace: Trace) -> list[ModuleCall]:
    """The call of the model itself, then those of the modules inside it."""
    root = ModuleCall(tuple((name, at) for at, name in enumerate(trace.input_names)))
    return [root, *trace.calls]


def roles_of(trace: Trace) -> dict[int, Role]:
    """The role of each mask, by its position among the inputs.

    An inner module's name for a mask tells more than that of a wrapper, which only passes it on.
    """
    roles: dict[int, Role] = {}
    for call in calls_of(trace):
        for name, at in call.arguments:
            if name not in MARKS_PADDING:
                continue
            if at not in roles or _says_more(name, roles[at][0]):
                roles[at] = (name, call)
                continue
            known, by = roles[at]
            order = next((c.batch_first for c in (by, call) if c.batch_first is not None), None)
            if known == name and not _names_tokens(by, name) and _names_tokens(call, name):
                by = call
            roles[at] = (known, by._replace(batch_first=order))
    return roles


def masks_made(trace: Trace) -> list[str]:
    """The padding masks that the model made itself, and passed to modules inside it.

    A mask in which True is padding is always one. Any other mask is one if it is passed together
    with the input's own tokens, as to a model inside a wrapper.
    """
    return [
        name
        for call in trace.calls
        for name in call.masks
        if MARKS_PADDING.get(name)
        or (MARKS_PADDING.get(name) is False and _names_tokens(call, name))
    ]


def tokens_of(role: str) -> frozenset[str]:
    """The names of the arguments whose tokens a mask is for."""
    return _TOKENS.get(role, TEXT)


def order_of(role: str) -> int:
    """Sort key: a decoder's masks come first, as its values depend on the encoder's tokens too."""
    if role.startswith(_LATER):
        return 0
    return 2 if is_read(role) else 1


def is_read(role: str) -> bool:
    """Whether a mask is for tokens that others attend to; values that mix both are not theirs."""
    return role.startswith(_READ)


def is_named_as_mask(name: str) -> bool | None:
    """Whether an input is named as a mask; None if the name does not tell."""
    if any(part in name for part in _NO_MASKS):
        return False
    return True if "mask" in name or "padding" in name else None


def is_named_as_lengths(name: str) -> bool:
    """Whether an input is named as the lengths of padded sequences."""
    words = name.lower().split("_")
    return "cu" not in words and any(
        word in ("len", "lens", "seqlen", "seqlens") or "length" in word for word in words
    )


def _says_more(name: str, known: str) -> bool:
    """Whether ``name`` says what True means, and ``known`` does not say the same."""
    marks = MARKS_PADDING[name]
    return marks is not None and marks != MARKS_PADDING[known]


def _names_tokens(call: ModuleCall, role: str) -> bool:
    return any(argument in tokens_of(role) for argument, _ in call.arguments)
