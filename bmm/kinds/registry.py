"""The kinds of task by name."""

from __future__ import annotations

from bmm.kinds.audio_classification import AudioClassificationKind
from bmm.kinds.causal_lm import CausalLMKind
from bmm.kinds.image_classification import ImageClassificationKind
from bmm.kinds.interface import Kind
from bmm.kinds.lm_eval import LmEvalKind
from bmm.kinds.seq2seq_lm import Seq2SeqLMKind
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.text_regression import TextRegressionKind
from bmm.kinds.token_classification import TokenClassificationKind
from bmm.kinds.zero_shot_image_classification import ZeroShotImageClassificationKind

_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        TextClassificationKind(),
        TextRegressionKind(),
        TokenClassificationKind(),
        ImageClassificationKind(),
        ZeroShotImageClassificationKind(),
        AudioClassificationKind(),
        CausalLMKind(),
        Seq2SeqLMKind(),
        LmEvalKind(),
    )
}


def kind_of(name: str) -> Kind:
    """Return a kind of task by the recipe's word for it."""
    return _KINDS[name]
