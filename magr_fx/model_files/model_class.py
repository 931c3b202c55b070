"""Choose the class of transformers to load a model with, from its configuration."""

from __future__ import annotations

from typing import Any

import transformers

from magr_fx.errors import ModelError


def model_class(config: dict[str, Any]) -> Any:
    """The class to load a model with.

    It is the first of the ``architectures`` in ``config.json``, if transformers has this class and
    it is of the same ``model_type``; otherwise it is ``AutoModelForCausalLM``.

    Raises:
        ModelError: the model is an encoder with a decoder, which needs two texts.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{name or 'the model'} is an encoder with a decoder, which cannot be calibrated on "
            "one text: call magr_transform(model, calib) from Python, with inputs for both"
        )
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        own = getattr(getattr(found, "config_class", None), "model_type", None)
        if own == config.get("model_type", own):
            return found
    return transformers.AutoModelForCausalLM
