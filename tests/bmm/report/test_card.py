"""The model card: valid front matter, the document's numbers, and loading code that runs."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bmm.report.card import FOLDER_PLACEHOLDER, cell, common_licence, hub_id, model_card

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
    "num_labels": 3,
    "id2label": {0: "red", 1: "green", 2: "blue"},
    "label2id": {"red": 0, "green": 1, "blue": 2},
}
FAMILIES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def output_folder(folder, family, task, travels):
    """Write an encoder, a tokenizer and one head, as a finished merge leaves them; return the whole expert.

    Encoder parameters with `travels` in their names go with the head, as they do when the base lacks them.
    """
    torch.manual_seed(3)
    config_class, model_class = FAMILIES[family]
    expert = model_class(config_class(**SIZES)).eval()
    kept = {name: value for name, value in expert.base_model.state_dict().items() if travels not in name}
    expert.base_model.save_pretrained(folder, state_dict=kept)
    words = {"[PAD]": 0, "[UNK]": 1, "a": 5, "text": 6, "to": 7, "classify": 8}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    prefix = expert.base_model_prefix + "."
    head = {
        name: value for name, value in expert.state_dict().items() if not name.startswith(prefix) or travels in name
    }
    (folder / "heads").mkdir()
    config = json.dumps({**expert.config.to_dict(), "architectures": [model_class.__name__]})
    save_file(head, folder / "heads" / f"{task}.safetensors", metadata={"format": "pt", "config": config})
    return expert


@pytest.mark.parametrize(
    ("family", "travels"), [("bert", "nothing does"), ("bert", "pooler"), ("roberta", "nothing does")]
)
def test_the_code_in_the_card_runs(document, tmp_path, family, travels):
    expert = output_folder(tmp_path, family, "newsgroups", travels)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(document), flags=re.DOTALL)
    assert code.count(FOLDER_PLACEHOLDER) == 1
    names: dict[str, object] = {}
    exec(code.replace(FOLDER_PLACEHOLDER, str(tmp_path)), names)  # noqa: S102
    logits = expert(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    with torch.no_grad():
        assert torch.equal(names["model"](**names["batch"]).logits, logits)
    assert names["label"] == ("red", "green", "blue")[logits.argmax().item()]


def test_front_matter(document):
    values = front(model_card(document))
    assert values["license"] == "apache-2.0"
    assert values["tags"] == ["merge", "bayesian-model-merging"]
    assert values["library_name"] == "transformers"
    assert values["metrics"] == ["accuracy"]
    assert "datasets" not in values
    assert "base_model" not in values
    document["base"] = {"source": "org/encoder@abc", "digest": "d"}
    assert front(model_card(document))["base_model"] == "org/encoder"


@pytest.mark.parametrize(
    ("licences", "expected"),
    [(["mit", "mit"], "mit"), (["mit", None], "other"), (["mit", "gpl-3.0"], "other"), ([], "other")],
)
def test_the_licence_is_the_common_one_or_other(licences, expected):
    assert common_licence({"experts": [{"license": licence} for licence in licences]}) == expected


def test_a_folder_has_no_hub_id():
    assert hub_id({"source": "org/name", "revision": "abc"}) == "org/name"
    assert hub_id({"source": "org/name", "revision": None}) is None
    for source in ("./base", "/data/base", "../a/b", "models:/name/1", "base", ""):
        assert hub_id({"source": source}) is None


def test_the_card_holds_the_documents_numbers_and_digests(document):
    text = model_card(document)
    for name, entry in document["metrics"]["test"].items():
        if name != "mean":
            low, high = entry["intervals"]["merged"]
            (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} | accuracy")]
            assert f"| {100 * entry['merged']:.1f} ({100 * low:.1f}–{100 * high:.1f}) |" in row
    for expert in document["experts"]:
        assert f"`{expert['digest']}`" in text
    recipe = re.search(r"````yaml\n(.*?)````", text, flags=re.DOTALL)
    assert recipe is not None
    assert yaml.safe_load(recipe[1]) == document["recipe"]


def test_tables_are_whole_whatever_the_names(make):
    document = make(("<script>alert(1)</script>", "a | b `c` [d](e)"))
    text = model_card(document)
    assert "<script>" not in text.replace(re.search(r"```python.*?```", text, re.DOTALL)[0], "").split("````yaml")[0]
    for line in text.splitlines():
        if line.startswith("| ") and "accuracy" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 9
    assert cell("a|b\nc") == "a\\|b c"


def test_warnings_and_missing_parts(document, make):
    assert model_card(document) == model_card(make())
    document["metrics"]["test"]["mean"]["share_of_experts"]["merged"] = 0.9
    assert "> On the test split the merged model is below its own anchor" in model_card(document)
    for part in ("methods", "coverage", "data", "search", "metrics"):
        del document[part]
        assert not re.search(r"\b(None|nan)\b", model_card(document))
