from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from bmm.errors import BMMError
from bmm.evaluation.calibration import (
    BINS,
    MEASURES,
    TEMPERATURES,
    compare,
    fit_temperature,
    from_means,
    log_softmax,
    pooled,
    reliability,
    row_terms,
    tempered,
)

seeds = st.integers(0, 2**31)


def draw(seed, rows=60, classes=4, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=scale, size=(rows, classes)), rng.integers(classes, size=rows)


def measures(log_probabilities, labels):
    return {name: float(value) for name, value in from_means(row_terms(log_probabilities, labels).mean(axis=0)).items()}


def ece_by_hand(probabilities, labels):
    """The definition, bin by bin, without any of the module's arithmetic."""
    total = 0.0
    for low, high in zip(np.arange(BINS) / BINS, (np.arange(BINS) + 1) / BINS, strict=True):
        inside = [row for row in range(len(labels)) if low < probabilities[row].max() <= high]
        if inside:
            right = np.mean([probabilities[row].argmax() == labels[row] for row in inside])
            sure = np.mean([probabilities[row].max() for row in inside])
            total += len(inside) / len(labels) * abs(right - sure)
    return total


@settings(deadline=None, max_examples=25)
@given(seed=seeds, rows=st.integers(1, 80), classes=st.integers(2, 6), scale=st.floats(0.01, 8))
def test_measures_follow_their_definitions(seed, rows, classes, scale):
    logits, labels = draw(seed, rows, classes, scale)
    probabilities = softmax(logits, axis=1)
    found = measures(log_softmax(logits), labels)
    assert found["accuracy"] == np.mean(probabilities.argmax(axis=1) == labels)
    assert found["nll"] == pytest.approx(-np.mean(np.log(probabilities[np.arange(rows), labels])))
    assert found["brier"] == pytest.approx(np.mean(((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1)))
    assert found["ece"] == pytest.approx(ece_by_hand(probabilities, labels), abs=1e-12)
    assert 0 <= found["ece"] <= 1
    assert 0 <= found["brier"] <= 2


def test_likelihood_and_brier_score_are_scikit_learns():
    for classes in (2, 5):
        logits, labels = draw(classes, classes=classes)
        probabilities, found = softmax(logits, axis=1), measures(log_softmax(logits), labels)
        assert found["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(classes)))
        brier = brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False)
        assert found["brier"] == pytest.approx(brier)


@pytest.mark.parametrize("confidence", [0.5, 0.6, 2 / 3, 1.0])
def test_one_confidence_gives_its_distance_from_the_accuracy(confidence):
    probabilities = np.tile([confidence, 1 - confidence], (10, 1))
    with np.errstate(divide="ignore"):
        logarithms = np.log(probabilities)
    # Eight of ten are right.
    assert measures(logarithms, [0] * 8 + [1] * 2)["ece"] == pytest.approx(abs(0.8 - confidence))


def test_what_is_sure_and_right_loses_nothing():
    logits = np.array([[2000.0, 0.0], [0.0, 2000.0]])
    assert measures(log_softmax(logits), [0, 1]) == {"accuracy": 1, "nll": 0, "brier": 0, "ece": 0}
    wrong = measures(log_softmax(logits), [1, 0])
    assert wrong == {"accuracy": 0, "nll": 2000, "brier": 2, "ece": 1}


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(1, 5))
def test_pooling_averages_probabilities(seed, count):
    members = [log_softmax(draw(seed + index)[0]) for index in range(count)]
    np.testing.assert_allclose(np.exp(pooled(members)), np.mean(np.exp(members), axis=0), rtol=1e-12)
    # Averages lose no more than their members do on average (Jensen).
    labels = draw(seed)[1]
    for name in ("nll", "brier"):
        each = [measures(member, labels)[name] for member in members]
        assert measures(pooled(members), labels)[name] <= np.mean(each) + 1e-12


def test_pooling_survives_certain_members():
    members = [log_softmax([[3000.0, 0.0]]), log_softmax([[0.0, 3000.0]])]
    np.testing.assert_allclose(pooled(members), np.log([[0.5, 0.5]]))
    assert np.isfinite(pooled([members[0]] * 2)).all()


@settings(deadline=None, max_examples=25)
@given(seed=seeds, temperature=st.floats(0.1, 10))
def test_a_temperature_divides_logits(seed, temperature):
    logits, _ = draw(seed)
    np.testing.assert_allclose(tempered(log_softmax(logits), temperature), log_softmax(logits / temperature))
    np.testing.assert_array_equal(tempered(log_softmax(logits), 2.0).argmax(axis=1), logits.argmax(axis=1))


@settings(deadline=None, max_examples=15)
@given(seed=seeds, factor=st.floats(0.3, 3))
def test_the_fitted_temperature_is_the_best_and_undoes_a_scale(seed, factor):
    rng = np.random.default_rng(seed)
    found, labels = {}, {}
    for task, rows in (("a", 100), ("b", 50)):
        logits = rng.normal(scale=2, size=(rows, 3))
        labels[task] = [rng.choice(3, p=softmax(row)) for row in logits]
        found[task] = log_softmax(logits)

    def loss(temperature):
        return np.mean([measures(tempered(found[task], temperature), labels[task])["nll"] for task in found])

    best = fit_temperature(found, labels)
    assert all(loss(best) <= loss(other) + 1e-9 for other in np.geomspace(0.2, 5, 200))
    scaled = {task: tempered(part, factor) for task, part in found.items()}
    assert fit_temperature(scaled, labels) == pytest.approx(best / factor, rel=1e-3)


def test_each_task_weighs_alike_whatever_its_rows():
    logits, labels = draw(0)
    other, theirs = draw(1, scale=0.5)
    found = {"a": log_softmax(logits), "b": log_softmax(other)}
    repeated = {"a": np.tile(found["a"], (5, 1)), "b": found["b"]}
    once = fit_temperature(found, {"a": labels, "b": theirs})
    assert fit_temperature(repeated, {"a": np.tile(labels, 5), "b": theirs}) == pytest.approx(once, rel=1e-4)


def test_a_temperature_stays_within_its_bounds():
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    sure = fit_temperature({"a": log_softmax(logits)}, {"a": [0, 1]})
    lost = fit_temperature({"a": log_softmax(logits)}, {"a": [1, 0]})
    assert (sure, lost) == (pytest.approx(TEMPERATURES[0], rel=1e-3), pytest.approx(TEMPERATURES[1], rel=1e-3))


def test_two_models_are_compared_on_the_same_resamples():
    rng = np.random.default_rng(0)
    terms, picked = {}, {}
    for task, rows in (("a", 40), ("b", 90)):
        logits, labels = draw(rows, rows)
        terms[task] = {
            name: row_terms(log_softmax(logits * scale), labels) for name, scale in (("one", 1), ("two", 0.3))
        }
        picked[task] = rng.integers(rows, size=(200, rows))

    def resampled(task, columns):
        return np.stack([columns[rows].mean(axis=0) for rows in picked[task]])

    found = compare(terms, resampled, first="one", second="two", confidence=0.9)
    replicates = {
        task: {
            name: [float(from_means(models[name][rows].mean(axis=0))["ece"]) for rows in picked[task]]
            for name in models
        }
        for task, models in terms.items()
    }
    for task, models in terms.items():
        entry = found["tasks"][task]
        for name in models:
            value = float(from_means(models[name].mean(axis=0))["ece"])
            low, high = np.quantile(replicates[task][name], [0.05, 0.95])
            assert entry[name]["ece"] == pytest.approx({"value": value, "low": low, "high": high})
        gap = np.subtract(replicates[task]["two"], replicates[task]["one"])
        assert entry["difference"]["ece"]["low"] == pytest.approx(np.quantile(gap, 0.05))
    for name in ("one", "two", "difference"):
        for what in MEASURES:
            each = [found["tasks"][task][name][what]["value"] for task in terms]
            assert found["mean"][name][what]["value"] == pytest.approx(np.mean(each))
    over = np.mean([replicates[task]["one"] for task in terms], axis=0)
    assert found["mean"]["one"]["ece"]["high"] == pytest.approx(np.quantile(over, 0.95))


@pytest.mark.parametrize("logits", [np.zeros((0, 2)), np.zeros((3, 1)), np.zeros(3), np.array([[np.nan, 1.0]])])
def test_what_is_no_classification_is_refused(logits):
    with pytest.raises(BMMError, match="classes"):
        log_softmax(logits)


def test_labels_of_other_rows_are_refused():
    with pytest.raises(BMMError, match="labels"):
        row_terms(log_softmax(np.zeros((3, 2))), [0, 1])


@settings(deadline=None, max_examples=20)
@given(seed=seeds, rows=st.integers(1, 60), more=st.integers(1, 60))
def test_a_reliability_diagram_holds_every_row_once_and_weighs_tasks_alike(seed, rows, more):
    (logits, labels), (others, wanted) = draw(seed, rows), draw(seed + 1, more, classes=3, scale=0.5)
    one, other = log_softmax(logits), log_softmax(others)
    alone = reliability({"one": one}, {"one": labels})
    assert [entry["bin"] for entry in alone] == sorted({entry["bin"] for entry in alone})
    assert all(entry["bin"] / BINS < entry["confidence"] <= (entry["bin"] + 1) / BINS + 1e-12 for entry in alone)
    gaps = sum(entry["share"] * abs(entry["accuracy"] - entry["confidence"]) for entry in alone)
    assert gaps == pytest.approx(measures(one, labels)["ece"])
    both = reliability({"one": one, "other": other}, {"one": labels, "other": wanted})
    assert sum(entry["share"] for entry in both) == pytest.approx(1)
    mean = (measures(one, labels)["accuracy"] + measures(other, wanted)["accuracy"]) / 2
    assert sum(entry["share"] * entry["accuracy"] for entry in both) == pytest.approx(mean)
