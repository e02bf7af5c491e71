from __future__ import annotations

from typing import Any

import pytest
import transformers
from pydantic import TypeAdapter

from bmm.kinds.model_classes import HEADS, kind_of_class, task_of
from bmm.kinds.registry import _KINDS, kind_of
from bmm.kinds.settings import Task


def test_each_kind_is_known_by_the_class_of_its_models() -> None:
    for name in HEADS:
        # The names alone: to import every class would take most of a minute.
        names = getattr(transformers, kind_of(name).architecture.auto_class)._model_mapping._model_mapping.values()
        named = [one[0] if isinstance(one, tuple) else one for one in names]
        share = sum(kind_of_class(one) == name for one in named) / len(named)
        assert share > 0.8, name
        assert share == 1 or name != "audio-classification"
    assert HEADS.keys() <= _KINDS.keys()


@pytest.mark.parametrize(
    ("architectures", "kind"),
    [
        (["BertForSequenceClassification"], "text-classification"),
        (["ViTForImageClassification"], "image-classification"),
        (["ASTForAudioClassification"], "audio-classification"),
        (["Wav2Vec2ForSequenceClassification"], "audio-classification"),
        (["BertModel"], None),
        ([], None),
        (None, None),
    ],
)
def test_a_task_without_words_is_what_the_model_is_for(architectures: Any, kind: str | None) -> None:
    task = task_of({"architectures": architectures})
    assert (task and task["kind"]) == kind
    if task is not None:
        assert {"calibration", "validation", "test"}.isdisjoint(task)
        assert TypeAdapter[Any](Task).validate_python(task).splits() == {}
