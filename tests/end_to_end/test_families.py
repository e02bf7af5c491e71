"""Whole merges of every family: no parameter is left at the base, and the coverage says the truth about each.

Checkpoints are as `save_pretrained` writes them and everything is read back by transformers alone.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from family_checkpoints import (
    EXPERTS,
    LABELS,
    answers,
    build_classifiers,
    build_language_models,
    build_seq2seq,
    config_of,
    move,
)
from images import SHAPE, build_clip, build_images, save_processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sounds import answer, build_sounds, rows_of

import bmm
from bmm.report.card import FOLDER_PLACEHOLDER

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]

CLASSIFIERS = (
    *("bert", "roberta", "distilbert", "deberta-v2", "t5", "gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2"),
    *("mixtral", "qwen2-moe", "qwen3-moe"),
)
LANGUAGE_MODELS = (
    *(("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)),
    *(("gemma", True), ("gemma2", True), ("mixtral", False), ("qwen2-moe", True), ("qwen3-moe", False)),
)
"""With whether input and output tables are tied."""
# Looked up or added, never multiplied with anything; all else of two dimensions and more is a linear map.
TABLES = ("embed", "wte", "wpe", "shared", "relative_attention_bias", "cls_token", "mask_token", "probe")
# Over patches that overlap: they follow the anchor.
CONVOLUTIONS = ("conv1.", "conv2.", "conv_layers.", "pos_conv_embed", "distillation_token", "patch_embeddings")


def merge(path: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """Merge by a changed recipe; return the model's folder and `merge.json`."""
    recipe = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    output = bmm.merge(bmm.Recipe.from_yaml(path), store=path.parent / "store").output
    return output, json.loads((output / "merge.json").read_text())


def loaded(auto_class: Any, folder: Path) -> Any:
    """Load a model by transformers alone; every tensor must be found and none be left over."""
    model, told = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(told[word] for word in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def check_coverage(
    document: dict[str, Any],
    base: Any,
    experts: list[Any],
    merged: Any,
    mode: str,
    *,
    anchor: str = "tsv",
    beside: tuple[str, ...] = (),
) -> None:
    """Hold what the coverage says of each parameter against the models themselves."""
    models = [dict(model.named_parameters()) for model in (base, *experts, merged)]
    buffers = dict(merged.named_buffers())
    coverage = {entry["parameter"]: entry for entry in document["coverage"] if entry["parameter"] not in buffers}
    alone = models[-1].keys() - coverage.keys()
    assert all(name not in model for model in models[1:-1] for name in alone), f"{alone} are left at the base"
    assert bool(alone) is any("there the merged model is the base" in note for note in document["notes"])
    assert coverage.keys() <= models[-1].keys()
    for name, entry in coverage.items():
        origin, *tuned, found = (model[name] for model in models)
        treatment = entry["treatment"]
        assert entry["shape"] == list(found.shape)
        assert not torch.equal(found, origin), f"{name} is left at the base"
        mean = torch.stack(tuned).mean(0)
        if found.ndim >= 2 and not any(word in name for word in (*TABLES, *beside)):
            assert treatment == "regressed", f"{name} is {treatment}"
        if treatment == "regressed":
            assert entry["lambda"] > 0
            assert not torch.allclose(found, mean, atol=1e-4), f"{name} is said to be regressed, and is the mean"
            assert found.ndim >= 2 or mode == "propagated"
        elif anchor == "tsv":
            assert treatment == "averaged", f"{name} is {treatment}"
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)


def check_answers(output: Path, document: dict[str, Any]) -> None:
    """Put encoder and heads together by transformers alone, and ask them the test rows one at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    for name in EXPERTS:
        head = output / "heads" / f"{name}.safetensors"
        with safe_open(head, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        settings = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(output, config=settings)
        assert not model.load_state_dict(load_file(head), strict=False).unexpected_keys
        rows = [json.loads(line) for line in (output.parent / "data" / f"{name}-test.jsonl").read_text().splitlines()]
        inputs = [tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False) for row in rows]
        right = [said == row["label"] for said, row in zip(answers(model, inputs), rows, strict=True)]
        told = document["metrics"]["test"][name]
        assert told["merged"] == pytest.approx(sum(right) / len(right))
        # The labels are what the expert itself answers, alone; here it saw them padded, in batches.
        assert told["expert"] == 1.0
        assert {row["label"] for row in rows} <= set(LABELS)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_merge_whole(tmp_path: Path, family: str) -> None:
    path = build_classifiers(tmp_path, config_of(family))
    classifier, encoder = transformers.AutoModelForSequenceClassification, transformers.AutoModel
    experts = [loaded(classifier, tmp_path / name).base_model for name in EXPERTS]
    base = loaded(encoder, tmp_path / "base")
    for mode in ("propagated", "module-wise"):
        output, document = merge(path, regression={"mode": mode})
        check_coverage(document, base, experts, loaded(encoder, output), mode)
        check_answers(output, document)
        assert all(document["search"]["heads"]["layers"].values()), "a head was not fitted"
        stored = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "base", output)]
        assert stored[0] == stored[1]


@pytest.mark.parametrize(("family", "tied"), LANGUAGE_MODELS)
def test_language_models_merge_whole(tmp_path: Path, family: str, tied: bool) -> None:
    path = build_language_models(tmp_path, config_of(family, tie_word_embeddings=tied))
    auto_class = transformers.AutoModelForCausalLM
    base, *experts = (loaded(auto_class, tmp_path / name) for name in ("base", *EXPERTS))
    output, document = merge(path, regression={"mode": "propagated"})
    merged = loaded(auto_class, output)
    assert ("lm_head.weight" in dict(merged.named_parameters())) is not tied
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
    check_coverage(document, base, experts, merged, "propagated")


@pytest.mark.parametrize(("family", "mode"), [("t5", "propagated"), ("bart", "propagated"), ("bart", "module-wise")])
def test_encoder_decoders_merge_whole(tmp_path: Path, family: str, mode: str) -> None:
    path = build_seq2seq(tmp_path, config_of(family))
    auto_class = transformers.AutoModelForSeq2SeqLM
    base, *experts = (loaded(auto_class, tmp_path / name) for name in ("base", *EXPERTS))
    output, document = merge(path, regression={"mode": mode})
    check_coverage(document, base, experts, loaded(auto_class, output), mode)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_image_classifiers_merge_whole(tmp_path: Path, family: str) -> None:
    path = build_images(tmp_path, family, trained=False)
    classifier, encoder = transformers.AutoModelForImageClassification, transformers.AutoModel
    experts = []
    for seed in (1, 2):
        model = classifier.from_pretrained(tmp_path / "base", num_labels=2, id2label={0: "dark", 1: "light"})
        move(model, seed)
        folder = tmp_path / "experts" / f"task{seed - 1}"
        model.save_pretrained(folder)
        save_processor(folder)
        experts.append(loaded(classifier, folder).base_model)
    base = loaded(encoder, tmp_path / "base")
    for mode in ("propagated", "module-wise"):
        output, document = merge(path, regression={"mode": mode}, search="none", tracking={"enabled": False})
        check_coverage(document, base, experts, loaded(encoder, output), mode)


def test_a_vision_tower_merges_whole(tmp_path: Path) -> None:
    path = build_clip(tmp_path)
    base = loaded(transformers.CLIPModel, tmp_path / "base")
    experts = []
    for seed in (1, 2):
        model = transformers.CLIPModel.from_pretrained(tmp_path / "base")
        move(model.vision_model, seed)
        folder = tmp_path / "experts" / f"task{seed - 1}"
        model.save_pretrained(folder)
        save_processor(folder)
        experts.append(model.vision_model)
    for mode in ("propagated", "module-wise"):
        output, document = merge(path, regression={"mode": mode}, search="none", tracking={"enabled": False})
        merged = loaded(transformers.CLIPModel, output)
        check_coverage(document, base.vision_model, experts, merged.vision_model, mode)
        frozen = dict(base.named_parameters())
        assert all(
            torch.equal(parameter, frozen[name])
            for name, parameter in merged.named_parameters()
            if not name.startswith("vision_model.")
        )


def test_an_image_classifier_over_one_of_two_towers_merges_whole(tmp_path: Path) -> None:
    path = build_images(tmp_path, "vit", trained=False)
    shutil.rmtree(tmp_path / "base")
    sizes = {name: value for name, value in SHAPE.items() if name not in ("image_size", "patch_size")}
    base = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=SHAPE, text_config={**sizes, "vocab_size": 40})
    )
    move(base, 0, by=0.25)
    base.eval().save_pretrained(tmp_path / "base")
    save_processor(tmp_path / "base")
    experts = []
    for seed in (1, 2):
        folder = tmp_path / "experts" / f"task{seed - 1}"
        model = transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / "base", num_labels=2, id2label={0: "dark", 1: "light"}
        )
        move(model, seed)
        model.save_pretrained(folder)
        save_processor(folder)
        experts.append(loaded(transformers.AutoModelForImageClassification, folder).vision_model)
    frozen = dict(base.named_parameters())
    for mode in ("propagated", "module-wise"):
        output, document = merge(path, regression={"mode": mode}, search="none", tracking={"enabled": False})
        merged = loaded(transformers.AutoModel, output)
        check_coverage(document, base.vision_model, experts, merged.vision_model, mode)
        fused = next(entry for entry in document["coverage"] if entry["parameter"].endswith("in_proj_weight"))
        # The query reads the pooling head's probe, key and value what the encoder says.
        assert (fused["treatment"], fused["shape"]) == ("regressed", [48, 16])
        assert all(
            torch.equal(parameter, frozen[name])
            for name, parameter in merged.named_parameters()
            if not name.startswith("vision_model.")
        )


def check_heard(output: Path, document: dict[str, Any], family: str) -> None:
    """Put encoder and heads together as the model card says, and let them hear the test rows one at a time."""
    (code,) = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), flags=re.DOTALL)
    for name in EXPERTS:
        names: dict[str, Any] = {}
        exec(code.replace(FOLDER_PLACEHOLDER, str(output)).replace(repr(EXPERTS[0]), repr(name)), names)  # noqa: S102
        assert names["label"] in LABELS
        rows = rows_of(output.parent, name)
        right = [answer(names["model"], family, heard) == label for heard, label in rows]
        told = document["metrics"]["test"][name]
        assert told["merged"] == pytest.approx(sum(right) / len(right))
        # The labels are what the expert itself answers, alone.
        assert told["expert"] == 1.0


@pytest.mark.parametrize(("base_class", "layers"), [("WhisperForConditionalGeneration", False), ("WhisperModel", True)])
def test_a_whisper_encoder_merges_whole_and_the_decoder_stays(tmp_path: Path, base_class: str, layers: bool) -> None:
    whisper, classifier = getattr(transformers, base_class), transformers.AutoModelForAudioClassification
    path = build_sounds(tmp_path, "whisper", whisper, use_weighted_layer_sum=layers)
    experts = [loaded(classifier, tmp_path / name) for name in EXPERTS]
    base = loaded(whisper, tmp_path / "base")
    for mode in ("propagated", "module-wise"):
        output, document = merge(path, regression={"mode": mode})
        merged = loaded(whisper, output)
        towers = [expert.encoder for expert in experts]
        check_coverage(document, base.get_encoder(), towers, merged.get_encoder(), mode, beside=CONVOLUTIONS)
        frozen = dict(base.named_parameters())
        assert all(
            torch.equal(parameter, frozen[name])
            for name, parameter in merged.named_parameters()
            if ".encoder." not in f".{name}"
        )
        assert load_file(output / "model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()
        check_heard(output, document, "whisper")
    heads = [load_file(output / "heads" / f"{name}.safetensors") for name in EXPERTS]
    assert all(("layer_weights" in head) is layers for head in heads)


@pytest.mark.parametrize("family", ["wav2vec2", "ast"])
def test_other_audio_classifiers_merge_whole(tmp_path: Path, family: str) -> None:
    path = build_sounds(tmp_path, family)
    experts = [loaded(transformers.AutoModelForAudioClassification, tmp_path / name).base_model for name in EXPERTS]
    base = loaded(transformers.AutoModel, tmp_path / "base")
    for mode in ("propagated", "module-wise"):
        output, document = merge(path, regression={"mode": mode})
        merged = loaded(transformers.AutoModel, output)
        check_coverage(document, base, experts, merged, mode, beside=CONVOLUTIONS)
        check_heard(output, document, family)


@pytest.mark.parametrize(("family", "anchor"), [("gpt2", "wudi"), ("gpt2", "ties"), ("mixtral", "wudi")])
def test_transposed_and_stacked_matrices_merge_around_other_anchors(tmp_path: Path, family: str, anchor: str) -> None:
    path = build_classifiers(tmp_path, config_of(family))
    experts = [loaded(transformers.AutoModelForSequenceClassification, tmp_path / name).base_model for name in EXPERTS]
    base = loaded(transformers.AutoModel, tmp_path / "base")
    output, document = merge(path, anchor={"method": anchor}, regression={"mode": "module-wise"})
    check_coverage(document, base, experts, loaded(transformers.AutoModel, output), "module-wise", anchor=anchor)
    output, document = merge(path, regression={"mode": "module-wise", "lambda": 1e9}, anchor={"method": anchor})
    anchored = dict(loaded(transformers.AutoModel, output).named_parameters())
    # The anchor itself, from the definition: on rows of the other orientation it would be another matrix.
    name = "h.1.mlp.c_fc.weight" if family == "gpt2" else "layers.1.mlp.experts.down_proj"
    origin, *tuned = (dict(model.named_parameters())[name] for model in (base, *experts))
    assert not torch.equal(anchored[name], origin)
    if anchor == "wudi":
        turned = [[part.T for part in (origin, *tuned)]] if family == "gpt2" else zip(origin, *tuned, strict=True)
        expected = torch.stack([wudi(*parts) for parts in turned])
        found = anchored[name].T[None] if family == "gpt2" else anchored[name]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def wudi(origin: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    """Return WUDI's minimiser `W_0 + Σ τ G (Σ G)⁻¹`, `G = τᵀτ / |τ|²` (arXiv 2503.08099), in float64."""
    vectors = [(one - origin).double() for one in tuned]
    grams = [vector.T @ vector / vector.square().sum() for vector in vectors]
    total = sum(vector @ gram for vector, gram in zip(vectors, grams, strict=True))
    return (origin.double() + total @ torch.linalg.pinv(sum(grams))).float()


@pytest.mark.parametrize("mode", ["propagated", "module-wise"])
def test_experts_of_a_mixture_that_no_token_reaches_keep_the_anchor(tmp_path: Path, mode: str) -> None:
    path = build_classifiers(tmp_path, config_of("mixtral", num_experts_per_tok=1))
    for folder in ("base", *EXPERTS):
        # Of v·h, -v·h and 0 the last is never the largest.
        file = tmp_path / folder / "model.safetensors"
        tensors = load_file(file)
        for name, router in tensors.items():
            if name.endswith("block_sparse_moe.gate.weight"):
                tensors[name] = torch.stack([router[0], -router[0], torch.zeros_like(router[0])])
        save_file(tensors, file, metadata={"format": "pt"})
    experts = [loaded(transformers.AutoModelForSequenceClassification, tmp_path / name).base_model for name in EXPERTS]
    output, document = merge(path, regression={"mode": mode}, anchor={"method": "average"})
    merged = dict(loaded(transformers.AutoModel, output).named_parameters())
    (note,) = (note for note in document["notes"] if note.startswith("Too few calibration tokens"))
    assert " reached 4 matrices of experts of a mixture" in note
    for entry in document["coverage"]:
        if ".experts." not in entry["parameter"]:
            continue
        name = entry["parameter"]
        assert entry["treatment"] == "regressed"
        assert entry["anchored_maps"] == [f"{name}.2"]
        mean = torch.stack([dict(model.named_parameters())[name] for model in experts]).mean(0)
        torch.testing.assert_close(merged[name][2], mean[2], rtol=1e-5, atol=1e-6)
        for index in (0, 1):
            assert not torch.allclose(merged[name][index], mean[index], atol=1e-3)
