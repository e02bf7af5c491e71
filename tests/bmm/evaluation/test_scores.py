"""Metrics against scikit-learn and SciPy, on whole samples and on resamples of their rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bmm.errors import BMMError
from bmm.evaluation.metrics import Bootstrap, Measured
from bmm.evaluation.scores import CLASSIFICATION, REGRESSION, ratio

REFERENCES = {
    "accuracy": accuracy_score,
    "f1": lambda true, found: f1_score(true == 1, found == 1, zero_division=0),
    "f1-macro": lambda true, found: f1_score(true, found, average="macro", zero_division=0),
    "matthews": matthews_corrcoef,
}


@pytest.mark.parametrize("name", CLASSIFICATION)
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(1, 40))
def test_classification_scores_are_scikit_learns_on_any_resample(name: str, seed: int, classes: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    logits, true = generator.normal(size=(rows, classes)), generator.integers(0, classes, rows)
    metric = CLASSIFICATION[name]
    statistics = metric.statistics(logits, true.tolist())
    counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=4)
    counts[0] = 1
    for count, found in zip(counts, metric.score(counts.astype(float) @ statistics), strict=True):
        taken = np.repeat(np.arange(rows), count)
        expected = REFERENCES[name](true[taken], logits.argmax(1)[taken])
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", REGRESSION)
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(3, 50), st.floats(-1e4, 1e4))
def test_correlations_are_scipys(name: str, seed: int, rows: int, shift: float) -> None:
    generator = np.random.default_rng(seed)
    answers = generator.normal(size=(rows, 1)) + shift
    labels = np.round(answers[:, 0] - shift + generator.normal(size=rows), 1)
    expected = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](answers[:, 0], labels).statistic
    metric = REGRESSION[name]
    statistics = metric.statistics(answers, labels.tolist())
    assert float(metric.score(statistics.sum(0))) == pytest.approx(expected if np.isfinite(expected) else 0, abs=1e-6)
    # Pearson's coefficient is SciPy's on resamples too; Spearman's keeps the ranks of the whole sample.
    taken = generator.integers(0, rows, rows)
    source = (answers[:, 0], labels)
    if name == "spearman":
        source = (stats.rankdata(answers[:, 0]), stats.rankdata(labels))
    x, y = (values[taken] for values in source)
    if len(set(x)) > 1 and len(set(y)) > 1:
        found = float(metric.score(statistics[taken].sum(0)))
        assert found == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-5)


def test_scores_that_are_not_defined_are_zero() -> None:
    for metric, labels in ((CLASSIFICATION["f1"], [0, 0]), (CLASSIFICATION["matthews"], [0, 0])):
        assert metric.score(metric.statistics(np.array([[1.0, 0.0]] * 2), labels).sum(0)) == 0
    constant = REGRESSION["pearson"].statistics(np.full((3, 1), 0.1), [1.0, 2.0, 4.0])
    assert REGRESSION["pearson"].score(constant.sum(0)) == 0
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("metric", [CLASSIFICATION["accuracy"], REGRESSION["pearson"], REGRESSION["spearman"]])
def test_answers_that_do_not_belong_to_the_labels(metric: object) -> None:
    with pytest.raises(BMMError, match=r"of shape \(3, 3\) do not belong to 2 labels"):
        metric.statistics(np.zeros((3, 3)), [0, 1])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_intervals_of_every_metric_hold_the_score_and_are_paired(name: str) -> None:
    generator = np.random.default_rng(3)
    true = generator.integers(0, 3, 200)
    metric = CLASSIFICATION[name]
    answers = {
        model: Measured(metric, metric.statistics(np.eye(3)[true] * level + generator.normal(size=(200, 3)), true))
        for model, level in (("expert", 3.0), ("merged", 1.5))
    }
    bootstrap = Bootstrap({"a": answers}, samples=400, seed=0, confidence=0.95)
    for model, measured in answers.items():
        interval = bootstrap.score("a", model)
        assert interval.low < measured.score < interval.high
    assert bootstrap.difference("merged", "expert", "a").high < 0
    alone = Bootstrap({"a": {"merged": answers["merged"]}}, samples=400, seed=0, confidence=0.95)
    assert alone.score("a", "merged") == bootstrap.score("a", "merged")
