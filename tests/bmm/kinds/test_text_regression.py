"""Pairs of texts with a number each, through a whole merge, against transformers and SciPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from scipy.stats import pearsonr

import bmm
from bmm.errors import CheckpointError, DataError, RecipeError
from bmm.kinds.settings import SplitSource, TextRegression
from bmm.kinds.text_regression import TextRegressionKind


def score(text: str, task: int) -> float:
    """Return the share of words that are the task's own, which its classifier has learnt to see."""
    return sum(10 * task <= int(word[1:]) < 10 * task + 20 for word in text.split()) / len(text.split())


def as_regression(folder: Path, experts: int = 2) -> Path:
    """Turn the pico classifiers into regressors of the number that their classes were made from."""
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["experts"] = recipe["experts"][:experts]
    for index, expert in enumerate(recipe["experts"]):
        target = folder / "experts" / expert["name"]
        torch.manual_seed(index)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            target, num_labels=1, ignore_mismatched_sizes=True, problem_type="regression"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for split in ("calibration", "validation", "test"):
            file = folder / "data" / expert["name"] / f"{split}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            pairs = [
                {"text": row["text"], "other": row["text"].split()[0], "score": score(row["text"], index)}
                for row in rows
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
            for start in [*range(0, len(pairs), 16)] * (25 if split == "calibration" else 0):
                some = pairs[start : start + 16]
                inputs = tokenizer(
                    [r["text"] for r in some], [r["other"] for r in some], padding=True, return_tensors="pt"
                )
                inputs.pop("token_type_ids", None)
                model(**inputs, labels=torch.tensor([r["score"] for r in some])).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
        model.save_pretrained(target)
        expert["task"] |= {"kind": "text-regression", "text_pair": "other", "label": "score"}
    recipe |= {"search": {"per": "model", "trials": 2}, "cluster": {"workers": 1}}
    recipe["evaluation"] = {"bootstrap_samples": 100, "compare": ["average"]}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_merge_of_regressors_is_measured_by_correlation(pico: Path, in_process: None, edit_recipe: Any) -> None:
    path = as_regression(pico)
    merge = bmm.merge(bmm.Recipe.from_yaml(path), store=pico / "store")
    for task in ("task0", "task1"):
        head = load_file(merge.output / "heads" / f"{task}.safetensors")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(pico / "experts" / task).eval()
        encoder = transformers.AutoModel.from_pretrained(merge.output, add_pooling_layer=True)
        model.base_model.load_state_dict(encoder.state_dict())
        model.load_state_dict(head, strict=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pico / "experts" / task)
        rows = [json.loads(line) for line in (pico / "data" / task / "test.jsonl").read_text().splitlines()]
        answers = []
        for row in rows:
            inputs = tokenizer(row["text"], row["other"], return_tensors="pt", truncation=True, max_length=16)
            with torch.inference_mode():
                answers.append(model(**inputs).logits.item())
        measured = merge.document["metrics"]["test"][task]
        assert measured["metric"] == "pearson"
        assert measured["merged"] == pytest.approx(
            pearsonr(answers, [row["score"] for row in rows]).statistic, abs=1e-4
        )
        assert measured["expert"] > 0.5
        low, high = measured["intervals"]["merged"]
        assert low < measured["merged"] < high
    edit_recipe(pico, anchor={"method": "fisher"})
    with pytest.raises(RecipeError, match="'fisher' needs the classes of a classification, but the expert task0"):
        bmm.merge(bmm.Recipe.from_yaml(path), store=pico / "store")


def test_labels_that_are_no_numbers_and_models_with_classes(tmp_path: Path, pico: Path) -> None:
    unused = SplitSource(path="json", data_files="rows.jsonl")
    task = TextRegression(kind="text-regression", calibration=unused, validation=unused, test=unused)
    for odd in ("good", None):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": odd}) + "\n")
        with pytest.raises(DataError, match=f"row 1 has {odd!r} in column 'label' where a number belongs"):
            TextRegressionKind().load_split(unused, task, (), tmp_path, "expert sts, test")
    from bmm.checkpoint.reader import Checkpoint

    with (
        Checkpoint.open(pico / "experts" / "task0") as checkpoint,
        pytest.raises(CheckpointError, match="text regression has one output"),
    ):
        TextRegressionKind().labels(checkpoint, task)
