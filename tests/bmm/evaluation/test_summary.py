from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bmm.errors import BMMError
from bmm.evaluation.metrics import Measured
from bmm.evaluation.scores import ACCURACY, CLASSIFICATION, share
from bmm.evaluation.summary import Method, method_rows, summarise

SETTINGS: dict[str, Any] = {"samples": 500, "seed": 0, "confidence": 0.95}
MODELS = ("base", "expert", "anchor", "merged")


def made(correct: int, rows: int) -> Measured:
    return Measured(ACCURACY, share(np.arange(rows) < correct))


def test_the_summary_is_the_metrics_part_of_merge_json() -> None:
    correct = {
        "a": {
            "base": made(5, 10),
            "expert": made(9, 10),
            "anchor": made(7, 10),
            "merged": made(8, 10),
            "ta": made(6, 10),
        },
        "b": {
            "base": made(1, 4),
            "expert": made(4, 4),
            "anchor": made(2, 4),
            "merged": made(3, 4),
            "ta": made(3, 4),
        },
    }
    summary = json.loads(json.dumps(summarise(correct, **SETTINGS), allow_nan=False))
    assert set(summary) == {"a", "b", "mean"}
    assert {key: value for key, value in summary["a"].items() if key != "intervals"} == {
        "metric": "accuracy", "rows": 10, "base": 0.5, "expert": 0.9, "anchor": 0.7, "merged": 0.8,
    }  # fmt: skip
    assert set(summary["a"]["intervals"]) == set(MODELS)
    assert all(low < high for low, high in list(summary["a"]["intervals"].values()))
    mean = summary["mean"]
    assert set(mean) == {*MODELS, "share_of_experts", "intervals"}
    assert mean["merged"] == pytest.approx(0.775)
    assert mean["share_of_experts"] == pytest.approx(
        {"base": 0.375 / 0.95, "anchor": 0.6 / 0.95, "merged": 0.775 / 0.95}
    )
    assert set(mean["intervals"]["share_of_experts"]) == {"base", "anchor", "merged"}

    rows = method_rows(
        correct, [Method("ta", "ta", {"scale": 0.3}), Method("anchor", "tsv", {"scale": 1.0})], **SETTINGS
    )
    assert [row["method"] for row in rows] == ["base", "experts", "ta", "tsv", "merged"]
    assert [row["settings"] for row in rows] == [{}, {}, {"scale": 0.3}, {"scale": 1.0}, {}]
    assert rows[1]["share_of_experts"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert rows[2]["tasks"] == {"a": 0.6, "b": 0.75}
    assert rows[2]["mean"] == pytest.approx(0.675)
    assert rows[4]["share_of_experts"]["mean"] == mean["share_of_experts"]["merged"]
    assert [rows[4]["share_of_experts"][end] for end in ("low", "high")] == mean["intervals"]["share_of_experts"][
        "merged"
    ]


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ({}, "there is no task"),
        ({"mean": dict.fromkeys(MODELS, made(1, 2))}, "a task cannot be called 'mean'"),
        ({"a": dict.fromkeys(MODELS[:3], made(1, 2))}, "the task a has no result of the model 'merged'"),
        (
            {"a": {**dict.fromkeys(MODELS, made(1, 2)), "base": made(1, 3)}},
            "of the task a were not run over the same rows",
        ),
        ({"a": dict.fromkeys(MODELS, made(0, 0))}, "of the task a were not run over the same rows"),
        (
            {"a": {**dict.fromkeys(MODELS, made(1, 2)), "base": Measured(CLASSIFICATION["f1"], np.ones((2, 2)))}},
            "the models of the task a were not measured alike: accuracy, f1",
        ),
        (
            {"a": {**dict.fromkeys(MODELS, made(1, 2)), "base": Measured(ACCURACY, np.full((2, 2), np.nan))}},
            "the result of 'base' on the task a is not finite",
        ),
    ],
)
def test_arrays_that_cannot_be_summarised(correct: Any, message: str) -> None:
    with pytest.raises(BMMError, match=message):
        summarise(correct, **SETTINGS)
