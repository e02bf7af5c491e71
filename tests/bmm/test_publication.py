from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from bmm.errors import OutputError
from bmm.pipeline import Merge, merge
from bmm.publication import read_document, rewrite_report
from bmm.recipe import Recipe

Edit = Callable[..., Path]
TOLD = {"merge.json", "report.html", "README.md"}


def again(folder: Path) -> Merge:
    return merge(Recipe.from_yaml(folder / "recipe.yaml"), store=folder / "store")


def marks(output: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def head_of(output: Path, task: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = output / "heads" / f"{task}.safetensors"
    with safe_open(path, framework="pt") as handle:
        return load_file(path), json.loads(handle.metadata()["config"])


def test_the_folder_is_an_ordinary_checkpoint(merged_source: Path) -> None:
    output = merged_source / "merged"
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(output / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    tokens = AutoTokenizer.from_pretrained(output)("w1 w2")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(merged_source / "base")("w1 w2")["input_ids"]
    config = AutoConfig.from_pretrained(output)
    assert config.architectures == ["BertModel"]
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert TOLD | {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {f"heads/task{index}.safetensors" for index in range(3)} <= names
    assert "manifest.json" not in names


@pytest.mark.parametrize("task", ["task0", "task1", "task2"])
def test_encoder_and_head_together_have_the_accuracy_in_the_document(merged_source: Path, task: str) -> None:
    output = merged_source / "merged"
    head, values = head_of(output, task)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**values)).eval()
    encoder = {f"bert.{name}": tensor for name, tensor in load_file(output / "model.safetensors").items()}
    model.load_state_dict({**encoder, **head})
    tokenizer = AutoTokenizer.from_pretrained(output)
    rows = [json.loads(line) for line in (merged_source / "data" / task / "test.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        tokens = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)["input_ids"]
        with torch.inference_mode():
            right += model.config.id2label[int(model(input_ids=tokens).logits.argmax())] == row["label"]
    assert right / len(rows) == pytest.approx(read_document(output)["metrics"]["test"][task]["merged"])


def test_a_second_merge_keeps_the_model_and_refreshes_what_tells_of_the_run(merged: Path) -> None:
    output = merged / "merged"
    before = marks(output)
    document = again(merged).document
    after = marks(output)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} <= TOLD
    assert after["merge.json"] != before["merge.json"]
    assert read_document(output) == document
    assert all(stage["state"] == "cached" for stage in document["stages"].values())


@pytest.mark.parametrize("name", ["model.safetensors", "heads/task1.safetensors", "config.json"])
def test_a_damaged_output_is_put_right_from_the_store(merged: Path, name: str) -> None:
    file = merged / "merged" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    again(merged)
    assert file.read_bytes() == content
    file.unlink()
    again(merged)
    assert file.read_bytes() == content


def test_the_report_is_built_again_from_the_document_alone(merged: Path) -> None:
    output = merged / "merged"
    texts = {name: (output / name).read_text(encoding="utf-8") for name in TOLD}
    (output / "report.html").unlink()
    (output / "README.md").write_text("scribbles")
    rewrite_report(output, read_document(output))
    assert {name: (output / name).read_text(encoding="utf-8") for name in TOLD} == texts
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_no_output_has_no_document(tmp_path: Path) -> None:
    for text in (None, "{", "[]", '{"schema": 99}', "[" * 100_000):
        if text is not None:
            (tmp_path / "merge.json").write_text(text)
        with pytest.raises(OutputError, match=r"holds no readable merge\.json"):
            read_document(tmp_path)


@pytest.mark.slow
def test_a_base_may_have_what_its_experts_lack_and_the_output_is_whole(
    pico: Path, edit_recipe: Edit, in_process: None
) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    config = RobertaConfig(vocab_size=65, max_position_embeddings=40, pad_token_id=0, type_vocab_size=1, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(pico / "base")
    base = RobertaModel(config)
    base.save_pretrained(pico / "base")
    for index in range(3):
        config.update(names)
        expert = RobertaForSequenceClassification(config)
        expert.roberta.load_state_dict(base.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        expert.save_pretrained(pico / "experts" / f"task{index}")
        tokenizer.save_pretrained(pico / "experts" / f"task{index}")
    edit_recipe(pico, search={"trials": 3}, dtype="bfloat16", max_shard_size="5kB", evaluation={"compare": ["average"]})
    output = again(pico).output
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    files = list(output.glob("model-*.safetensors"))
    assert len(files) > 1
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["pooler.dense.weight"], base.pooler.dense.weight.bfloat16())
    assert model.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    coverage = {entry["parameter"]: entry for entry in read_document(output)["coverage"]}
    assert "pooler.dense.weight" not in coverage
