"""A model's configuration → the class of transformers that its weights belong to."""

from __future__ import annotations

from typing import Any

import transformers

from magr_fx.errors import ModelError


def model_class(config: dict[str, Any]) -> Any:
    """What ``config.json`` names first, if it is of the model's type; else that of causal LMs.

    Raises:
        ModelError: it takes more than one text: it is an encoder with a decoder.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{name or 'the model'} is an encoder with a decoder, which one text does not feed: "
            "call magr_transform(model, calib) with inputs for both"
        )
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        own = getattr(getattr(found, "config_class", None), "model_type", None)
        if own == config.get("model_type", own):
            return found
    return transformers.AutoModelForCausalLM
