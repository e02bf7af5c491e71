"""The reliability diagram shows the numbers that it was given, each model's in both panels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.patches import StepPatch

from bmm.evaluation.calibration import log_softmax, reliability, row_terms, tempered
from bmm.report.reliability import reliability_figure, reliability_png

MODELS = ("posterior_mean", "sampled")


def measured(rows: int = 400, classes: int = 4) -> dict[str, Any]:
    """Return what `bmm eval --samples` knows, of random answers that are too sure."""
    generator = np.random.default_rng(0)
    truth = generator.normal(scale=1.5, size=(rows, classes))
    labels = {"one": [int(generator.choice(classes, p=row)) for row in np.exp(log_softmax(truth))]}
    scores = {"posterior_mean": log_softmax(2 * truth), "sampled": log_softmax(1.7 * truth + 0.2)}
    temperatures = {"posterior_mean": 2.0, "sampled": 1.7}
    found: dict[str, Any] = {"count": 8, "bins": 15, "temperature": temperatures, "reliability": {}}
    for when in ("before", "after"):
        said = {name: tempered(scores[name], temperatures[name] if when == "after" else 1.0) for name in MODELS}
        means = {name: row_terms(said[name], labels["one"]).mean(axis=0) for name in MODELS}
        found[when] = {
            "mean": {
                name: {"nll": {"value": float(row[1])}, "ece": {"value": float(np.abs(row[3:]).sum())}}
                for name, row in means.items()
            }
        }
        found["reliability"][when] = {name: reliability({"one": said[name]}, labels) for name in MODELS}
    return found


def test_each_panel_shows_both_models_with_their_numbers() -> None:
    samples = measured()
    figure = reliability_figure(samples, "test")
    upper = figure.axes[:2]
    for axes, when in zip(upper, ("before", "after"), strict=True):
        drawn = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        for line, name in zip(drawn, MODELS, strict=True):
            bins = samples["reliability"][when][name]
            assert list(line.get_xdata()) == pytest.approx([100 * entry["confidence"] for entry in bins])
            assert list(line.get_ydata()) == pytest.approx([100 * entry["accuracy"] for entry in bins])
            figures = samples[when]["mean"][name]
            assert f"NLL {figures['nll']['value']:.3f}, ECE {figures['ece']['value']:.3f}" in line.get_label()
        assert ("T = 2.00" in drawn[0].get_label()) is (when == "after")
    for axes in figure.axes[2:]:
        stairs = [patch.get_data().values for patch in axes.patches if isinstance(patch, StepPatch)]
        assert [len(shares) for shares in stairs] == [15, 15]
        assert [sum(shares) for shares in stairs] == pytest.approx([100, 100])
        assert axes.get_ylim()[1] >= max(map(max, stairs))


def test_the_same_numbers_give_the_same_picture() -> None:
    samples = measured(rows=40)
    first = reliability_png(samples, "validation")
    assert first.startswith(b"\x89PNG")
    assert reliability_png(samples, "validation") == first
