from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, T5Config, T5ForSequenceClassification, T5Model

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.comparison import compare
from bmm.checkpoint.layout import Layout
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError

CLASSIFIER = Architecture("AutoModelForSequenceClassification", "text classifier")


def layout(base: Path, **experts: Path) -> Layout:
    opened = {name: Checkpoint.open(folder) for name, folder in experts.items()}
    return compare(Checkpoint.open(base), opened, dict.fromkeys(experts, CLASSIFIER))


def refused(base: Path, *words: str, **experts: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        layout(base, **experts)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


POOLER = {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("kind", ["classifier", "encoder", "masked"])
def test_base_and_experts_share_the_encoder(save, kind: str) -> None:
    base, news, mail = save("base", kind), save("news", num_labels=3), save("mail", num_labels=5, seed=1)
    found = layout(base, news=news, mail=mail)
    checkpoint = Checkpoint.open(base)
    wanted = {
        name.removeprefix("bert."): parameter
        for name, parameter in AutoModelForSequenceClassification.from_pretrained(news).named_parameters()
        if name.startswith("bert.")
    }
    has_pooler = kind != "masked"
    assert {parameter.name for parameter in found.shared} == set(wanted) - (set() if has_pooler else POOLER)
    assert [parameter.name for parameter in found.shared] == sorted(parameter.name for parameter in found.shared)
    for parameter in found.shared:
        assert parameter.shape == tuple(wanted[parameter.name].shape) == checkpoint.info(parameter.base_key).shape
        assert parameter.expert_keys == {"news": f"bert.{parameter.name}", "mail": f"bert.{parameter.name}"}
        assert parameter.base_key == ("" if kind == "encoder" else "bert.") + parameter.name
        assert parameter.info == checkpoint.info(parameter.base_key).__class__(parameter.name, parameter.shape, "F32")
    head = {"classifier.weight", "classifier.bias"} | (set() if has_pooler else {f"bert.{name}" for name in POOLER})
    assert found.heads == {expert: {name: name for name in head} for expert in ("news", "mail")}
    used = {parameter.base_key for parameter in found.shared}
    assert found.dropped == tuple(sorted(set(checkpoint.names()) - used))
    assert any(name.startswith("cls.") for name in found.dropped) == (kind == "masked")


def test_the_head_and_the_shared_parameters_are_the_whole_classifier(save) -> None:
    news = save("news")
    found = layout(save("base", "masked"), news=news, mail=save("mail"))
    state = {f"bert.{parameter.name}" for parameter in found.shared} | set(found.heads["news"])
    model = AutoModelForSequenceClassification.from_pretrained(news)
    assert state == {name for name, _ in model.named_parameters()}


def test_a_layout_survives_json(save) -> None:
    found = layout(
        save("base", "roberta"),
        news=save("news", "roberta"),
        mail=save("mail", "roberta", dtype=torch.float16),
    )
    assert found.prefix == "roberta"
    assert Layout.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_floats_of_another_precision_are_recorded(save) -> None:
    found = layout(save("base", "encoder"), news=save("news", dtype=torch.bfloat16), mail=save("mail"))
    assert {parameter.dtype for parameter in found.shared} == {"F32"}
    assert all(parameter.expert_dtypes == {"news": "BF16", "mail": "F32"} for parameter in found.shared)


def test_base_parameters_that_no_expert_has_are_dropped(save, edit_weights) -> None:
    base, news, mail = save("base", "encoder"), save("news"), save("mail")
    assert layout(base, news=news, mail=mail).dropped == ()
    edit_weights(base, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    assert layout(base, news=news, mail=mail).dropped == ("extra.weight",)


def test_integer_buffers_count_only_where_all_have_them(save, edit_weights) -> None:
    base, news, mail = save("base", "encoder"), save("news"), save("mail")
    plain = layout(base, news=news, mail=mail)
    positions = torch.arange(40)[None]
    edit_weights(base, lambda tensors: tensors.update({"embeddings.position_ids": positions}))
    edit_weights(news, lambda tensors: tensors.update({"bert.embeddings.position_ids": positions}))
    assert layout(base, news=news, mail=mail) == plain
    edit_weights(mail, lambda tensors: tensors.update({"bert.embeddings.position_ids": positions}))
    found = layout(base, news=news, mail=mail)
    assert {p.name: p.dtype for p in found.shared if p.dtype != "F32"} == {"embeddings.position_ids": "I64"}


def test_another_architecture_is_refused(save) -> None:
    refused(
        save("base"),
        "expert 'news' is a roberta, the base a bert",
        news=save("news", "roberta"),
        mail=save("mail"),
    )


def test_a_base_without_a_classifier_is_refused(save, edit_json) -> None:
    base = save("base")
    edit_json(base / "config.json", lambda value: value.update(model_type="vit"))
    refused(base, str(base), "'vit'", news=save("news"), mail=save("mail"))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
def test_settings_that_shapes_do_not_show_are_compared(save, key: str) -> None:
    other = save("mail", **{key: 4})
    refused(save("base"), "expert 'mail'", f"'{key}' 4", "base 2", news=save("news"), mail=other)


def test_other_vocabularies_share_the_bases_rows_and_keep_their_own(save) -> None:
    table, name = "embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.extra_weight"
    found = layout(save("base"), news=save("news"), mail=save("mail", vocab_size=120), chat=save("chat", vocab_size=96))
    rows = {parameter.name: parameter.shared_rows for parameter in found.shared if parameter.shared_rows is not None}
    assert rows == {table: 96}
    (parameter,) = (parameter for parameter in found.shared if parameter.name == table)
    assert parameter.shape == (100, 16)
    assert found.vocabulary == 100
    assert found.extra == {"mail": {name: (f"bert.{table}", 100, 20)}}
    assert found.extra_rows("mail") == {name: 20}
    assert found.extra_rows("news") == found.extra_rows("chat") == {}
    assert Layout.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert layout(save("base"), news=save("news"), mail=save("other")).vocabulary is None


def test_rows_that_no_vocabulary_explains_are_refused(save, edit_json) -> None:
    mail = save("mail", vocab_size=120)
    edit_json(mail / "config.json", lambda value: value.update(vocab_size=110))
    refused(save("base"), "expert 'mail'", "(120, 16)", "(100, 16)", news=save("news"), mail=mail)
    wide = save("wide", vocab_size=120, hidden_size=32)
    refused(save("base"), "expert 'wide'", news=save("news"), wide=wide)


def test_tokenizers_that_disagree_are_refused(save) -> None:
    base, news, mail = save("base"), save("news"), save("mail")
    (base / "vocab.txt").write_text("one\ntwo\n")
    (news / "vocab.txt").write_text("one\ntwo\nthree\n")
    assert layout(base, news=news, mail=mail).tokenizers == ("news",)
    (mail / "vocab.txt").write_text("one\ndos\n")
    refused(base, "expert 'mail'", "token 1 'dos'", "'two'", news=news, mail=mail)


def test_another_shape_is_refused_with_both_shapes(save) -> None:
    refused(
        save("base"), "expert 'mail'", "intermediate.dense", "(64", "(32",
        news=save("news"), mail=save("mail", intermediate_size=64),
    )  # fmt: skip


def test_one_tensor_of_another_shape_is_named(save, edit_weights) -> None:
    name = "encoder.layer.1.attention.self.query.weight"
    mail = save("mail")
    edit_weights(mail, lambda tensors: tensors.update({f"bert.{name}": torch.zeros(16, 8)}))
    refused(save("base"), "expert 'mail'", f"'{name}'", "(16, 8)", "(16, 16)", news=save("news"), mail=mail)


def test_a_tensor_that_one_expert_lacks_is_named(save, edit_weights) -> None:
    name = "encoder.layer.1.attention.self.query.weight"
    mail = save("mail")
    edit_weights(mail, lambda tensors: tensors.pop(f"bert.{name}"))
    refused(save("base"), "expert 'mail' lacks", f"'{name}'", "'news'", news=save("news"), mail=mail)


def test_a_tensor_that_all_experts_lack_is_named(save, edit_weights) -> None:
    name = "bert.encoder.layer.1.attention.self.query.weight"
    experts = {"news": save("news"), "mail": save("mail")}
    for folder in experts.values():
        edit_weights(folder, lambda tensors: tensors.pop(name))
    refused(save("base"), "expert 'news'", f"'{name}'", "lacks the parameter", **experts)


def test_a_tensor_that_only_one_expert_has_is_named(save, edit_weights) -> None:
    base, news, mail = save("base", "masked"), save("news"), save("mail")
    edit_weights(mail, lambda tensors: tensors.pop("bert.pooler.dense.bias"))
    refused(base, "expert 'news' has", "'pooler.dense.bias'", "'mail'", news=news, mail=mail)


LEFT_OVER = {
    "bert.encoder.adapter": torch.ones(2),
    "cls.predictions.transform.dense.weight": torch.ones(16, 16),
}


@pytest.mark.parametrize("holders", [("news",), ("news", "mail")])
@pytest.mark.parametrize("in_base", [True, False])
def test_tensors_that_no_model_loads_are_left_out_and_named(
    save, edit_weights, in_base: bool, holders: tuple[str, ...]
) -> None:
    base, news, mail = save("base", "encoder"), save("news"), save("mail")
    plain = layout(base, news=news, mail=mail)
    assert "unused" not in plain.to_json()
    for name in holders:
        edit_weights({"news": news, "mail": mail}[name], lambda tensors: tensors.update(LEFT_OVER))
    if in_base:
        edit_weights(base, lambda tensors: tensors.update({"encoder.adapter": torch.ones(2)}))
    found = layout(base, news=news, mail=mail)
    assert found.unused == tuple(sorted(LEFT_OVER))
    assert found.dropped == found.unmatched == (("encoder.adapter",) if in_base else ())
    assert replace(found, unused=(), dropped=(), unmatched=()) == plain
    assert Layout.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("name", ["bert.encoder.layer.2.output.dense.weight", "bert.encoder.layer.17.adapter"])
@pytest.mark.parametrize("holders", [("news",), ("news", "mail")])
def test_a_layer_that_the_config_does_not_count_is_refused(
    save, edit_weights, name: str, holders: tuple[str, ...]
) -> None:
    experts = {"news": save("news"), "mail": save("mail")}
    for holder in holders:
        edit_weights(experts[holder], lambda tensors: tensors.update({name: torch.ones(16, 16)}))
    refused(save("base", "encoder"), "expert 'news'", f"'{name}'", "config.json", "number of layers", **experts)


def test_masks_that_are_floats_in_one_checkpoint_and_truths_in_another_are_left_out(save, edit_weights) -> None:
    base, news, mail = save("base", "encoder"), save("news"), save("mail")
    shared = layout(base, news=news, mail=mail).shared
    mask = torch.ones(4, 4)
    edit_weights(base, lambda tensors: tensors.update({"encoder.mask": mask}))
    for folder in (news, mail):
        edit_weights(folder, lambda tensors: tensors.update({"bert.encoder.mask": mask.bool()}))
    found = layout(base, news=news, mail=mail)
    assert found.shared == shared
    assert found.dropped == ("encoder.mask",)


def test_a_pooler_that_one_kind_of_model_ignores_travels_with_the_heads_of_the_other(save, edit_weights) -> None:
    base, words, news = save("base", "encoder"), save("words", "masked"), save("news")
    opened = {"words": Checkpoint.open(words), "news": Checkpoint.open(news)}
    kinds = {"words": MASKED, "news": CLASSIFIER}
    plain = compare(Checkpoint.open(base), opened, kinds)
    edit_weights(words, lambda tensors: tensors.update({"bert.pooler.dense.weight": torch.ones(16, 16)}))
    found = compare(Checkpoint.open(base), {**opened, "words": Checkpoint.open(words)}, kinds)
    assert found.unused == ("bert.pooler.dense.weight",)
    assert replace(found, unused=()) == plain
    assert "bert.pooler.dense.weight" in found.heads["news"]


def test_integers_for_floats_are_refused(save, edit_weights) -> None:
    name = "encoder.layer.1.attention.self.query.weight"
    mail = save("mail")
    edit_weights(mail, lambda tensors: tensors.update({f"bert.{name}": tensors[f"bert.{name}"].to(torch.int8)}))
    refused(save("base"), "expert 'mail'", f"'{name}'", "I8", "F32", news=save("news"), mail=mail)


def test_a_head_of_fewer_classes_than_its_config_names_is_refused(save, edit_json) -> None:
    news = save("news")
    names = {str(index): f"class {index}" for index in range(5)}
    numbers = {name: int(index) for index, name in names.items()}
    edit_json(news / "config.json", lambda value: value.update(id2label=names, label2id=numbers))
    refused(save("base"), "expert 'news'", "classifier.", "config.json describes one of [5", "id2label", news=news)


def test_an_expert_without_a_head_is_refused(save) -> None:
    refused(
        save("base"),
        "expert 'mail'",
        "'classifier.bias' and 1 more",
        news=save("news"),
        mail=save("mail", "encoder"),
    )


@pytest.mark.parametrize("max_shard_size", [None, "10KB"])
def test_an_expert_stored_without_the_prefix_or_with_old_names_is_as_transformers_loads_it(
    save, edit_weights, max_shard_size: str | None
) -> None:
    base, news, mail = save("base", "encoder"), save("news"), save("mail", max_shard_size=max_shard_size)
    wanted = layout(base, news=news, mail=mail)

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            modern = name.removeprefix("bert.")
            modern = modern.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[modern] = tensors.pop(name)

    edit_weights(news, older)
    _, said = AutoModelForSequenceClassification.from_pretrained(news, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    found = layout(base, news=news, mail=mail)
    assert [parameter.name for parameter in found.shared] == [parameter.name for parameter in wanted.shared]
    assert found.heads == wanted.heads
    assert all(parameter.expert_keys["news"] == parameter.name for parameter in found.shared)


def test_an_expert_that_shares_nothing_is_refused(save, edit_weights) -> None:
    mail = save("mail")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"other.{name}"] = tensors.pop(name)

    edit_weights(mail, rename)
    refused(save("base"), "expert 'mail'", str(mail), "shares no parameter", news=save("news"), mail=mail)


SHARED, ENCODERS = "shared.weight", "encoder.embed_tokens.weight"
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 30, "num_labels": 2}


@pytest.fixture
def save_t5(tmp_path: Path) -> Callable[..., Path]:
    """Save a T5, whose embedding has three names, under the names that are wanted."""

    def run(name: str, model_class: type = T5ForSequenceClassification, wanted: tuple[str, ...] = (SHARED,)) -> Path:
        torch.manual_seed(len(name))
        model = model_class(T5Config(**T5))
        model.save_pretrained(tmp_path / name)
        prefix = "transformer." if model_class is T5ForSequenceClassification else ""
        state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("embed_tokens.weight")}
        table = state.pop(prefix + SHARED)
        state |= {prefix + key: table.clone() for key in wanted}
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    return run


@pytest.mark.parametrize("base_names", [(SHARED,), (ENCODERS,), (SHARED, ENCODERS)])
@pytest.mark.parametrize("names", [(SHARED,), (ENCODERS,), (SHARED, ENCODERS)])
def test_a_tied_parameter_is_one_whatever_its_names(
    save_t5: Callable[..., Path], base_names: tuple[str, ...], names: tuple[str, ...]
) -> None:
    news = save_t5("news", wanted=names)
    found = layout(save_t5("base", T5Model, base_names), news=news, mail=save_t5("mails"))
    (parameter,) = (parameter for parameter in found.shared if parameter.shape == (30, 16))
    assert parameter.name == SHARED
    assert parameter.base_key == base_names[0]
    assert parameter.expert_keys == {"news": f"transformer.{names[0]}", "mail": f"transformer.{SHARED}"}
    assert found.copies == dict.fromkeys(base_names[1:], SHARED)
    assert not [name for name in found.heads["news"] if "embed" in name or "shared" in name]
    assert found.dropped == ()
    assert Layout.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_names_of_one_parameter_with_different_values_are_refused(save_t5, edit_weights) -> None:
    news = save_t5("news", wanted=(SHARED, ENCODERS))
    edit_weights(news, lambda tensors: tensors[f"transformer.{ENCODERS}"].add_(1))
    base, mail = save_t5("base", T5Model), save_t5("mails")
    refused(base, str(news), f"'transformer.{SHARED}'", f"'transformer.{ENCODERS}'", "ties", news=news, mail=mail)


MASKED = Architecture("AutoModelForMaskedLM", "masked language model")


def test_an_untied_expert_over_a_tied_base_is_refused(save) -> None:
    base, news = save("base", "masked"), save("news", "masked")
    untied = save("mail", "masked", tie_word_embeddings=False)
    opened = {"news": Checkpoint.open(news), "mail": Checkpoint.open(untied)}
    with pytest.raises(CheckpointError, match=r"expert 'mail' keeps apart '.*word_embeddings.weight' and '.*decoder.w"):
        compare(Checkpoint.open(base), opened, dict.fromkeys(opened, MASKED))
    with pytest.raises(CheckpointError, match=r"expert 'news' ties '.*word_embeddings.weight' and '.*decoder.weight'"):
        compare(Checkpoint.open(untied), opened, dict.fromkeys(opened, MASKED))


def test_an_output_tied_to_the_merged_embedding_travels_with_no_head(save, edit_weights) -> None:
    base, news, mail = (save(name, "masked", seed=index) for index, name in enumerate(("base", "news", "mail")))
    table, output = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    edit_weights(news, lambda tensors: tensors.update({output: tensors[table].clone()}))
    edit_weights(mail, lambda tensors: tensors.update({output: tensors.pop(table)}))
    opened = {"news": Checkpoint.open(news), "mail": Checkpoint.open(mail)}
    found = compare(Checkpoint.open(base), opened, dict.fromkeys(opened, MASKED))
    (parameter,) = (parameter for parameter in found.shared if parameter.shape == (100, 16))
    assert parameter.expert_keys == {"news": table, "mail": output}
    assert all(output not in head for head in found.heads.values())
