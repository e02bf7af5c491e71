"""Classifiers of every kind of network answer each row alike, alone and among longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from family_checkpoints import CLASSES, config_of, move, save_tokenizer, texts

from bmm.errors import CheckpointError, DataError
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import TextRow

KIND = TextClassificationKind()
READING = {"max_length": 16}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "padding"), [("gpt2", None), ("llama", None), ("llama", 3), ("mixtral", 0), ("t5", 0)]
)
def test_answers_do_not_depend_on_the_batch(tmp_path: Path, family: str, padding: int | None, side: str) -> None:
    config = config_of(family, pad_token_id=padding, **CLASSES)
    torch.manual_seed(0)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    move(classifier, 1, by=0.25)
    tokenizer = save_tokenizer(tmp_path, side=side)
    rows = [TextRow(text, None, 0) for text in texts(0, 12)]
    model = KIND.build(config.to_dict(), tmp_path, READING, 12, "task")
    state = classifier.state_dict()
    inner = f"{classifier.base_model_prefix}."
    model.load_head({name: tensor for name, tensor in state.items() if not name.startswith(inner)})
    model.load_encoder({name.removeprefix(inner): state[name] for name in state if name.startswith(inner)})
    with torch.inference_mode():
        alone = [
            classifier.eval()(**tokenizer(row.text, return_tensors="pt", return_token_type_ids=False)).logits[0]
            for row in rows
        ]
    torch.testing.assert_close(model.logits(model.prepare(rows)), torch.stack(alone), atol=1e-5, rtol=1e-4)
    (batch,) = model.batches(model.prepare(rows))
    assert ("decoder_input_ids" in batch) is (family == "t5")
    if family == "t5":
        assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
        model.encoder(**batch)


def test_a_tokenizer_without_the_end_that_an_encoder_decoder_classifies_by_is_refused(tmp_path: Path) -> None:
    config = config_of("t5", eos_token_id=9, **CLASSES)
    save_tokenizer(tmp_path)
    model = KIND.build(config.to_dict(), tmp_path, READING, 2, "news")
    with pytest.raises(CheckpointError, match=r"^news: .*'b c'.*eos_token_id 9"):
        model.prepare([TextRow("b c", None, 0)])


def test_a_text_longer_than_gpt2_has_positions_is_refused(tmp_path: Path) -> None:
    config = config_of("gpt2", n_positions=4, **CLASSES)
    save_tokenizer(tmp_path)
    model = KIND.build(config.to_dict(), tmp_path, READING, 2, "news")
    with pytest.raises(DataError, match="6 tokens, but the model has 4 positions"):
        model.prepare([TextRow("b c d e", None, 0)])
