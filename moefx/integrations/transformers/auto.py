"""The auto class of Transformers that builds and loads the model of a configuration, and the types of language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_MULTIMODAL = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
#: Each class's own classes, by the type of model.
_CLASSES: dict[Any, Mapping[str, Any]] = {
    AutoModelForCausalLM: _CAUSAL,
    AutoModelForImageTextToText: _MULTIMODAL,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
#: The types of language models, with images or without.
LANGUAGE_MODELS = tuple(sorted({*_CAUSAL, *_MULTIMODAL}))


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class for ``config.architectures``; by default that of a causal language model, if the type has one."""
    named = config.architectures or ()
    for auto, names in _CLASSES.items():
        if names.get(config.model_type) in named:
            return auto
    only_with_images = config.model_type in _MULTIMODAL and config.model_type not in _CAUSAL
    return AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM
