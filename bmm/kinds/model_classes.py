"""Which kind of task a model is for, by the name of its class: for experts whose recipe does not say.

What a task's settings are is `bmm.kinds.settings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from bmm.kinds.settings import SPLITS, Task
from bmm.part import Part

# What the class of such a model ends in, as config.json names it.
HEADS = {
    "text-classification": "ForSequenceClassification",
    "image-classification": "ForImageClassification",
    "token-classification": "ForTokenClassification",
    "audio-classification": "ForAudioClassification",
    "causal-lm": "ForCausalLM",
    "seq2seq-lm": "ForConditionalGeneration",
}
# Classes of models that read sounds, and are called as those that read texts are.
_SOUND_CLASSES = re.compile(r"(Wav2Vec2|Hubert|SEW|UniSpeech|WavLM|Data2VecAudio)\w*ForSequenceClassification")


def task_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a task without rows, as JSON, for a model of which only the configuration is known.

    It is None where that names no class, or one of no kind.
    """
    for name in config.get("architectures") or ():
        if (kind := kind_of_class(str(name))) is not None:
            task: Part = TypeAdapter[Part](Task).validate_python({"kind": kind})
            return task.model_dump(mode="json", exclude=SPLITS)
    return None


def kind_of_class(name: str) -> str | None:
    """Return the kind of task that a class of transformers is for, by its name; None for a class of no kind."""
    if _SOUND_CLASSES.fullmatch(name):
        return "audio-classification"
    return next((kind for kind, ending in HEADS.items() if name.endswith(ending)), None)
