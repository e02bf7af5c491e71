"""Findings: formats, rankings, and above all the things that must be said when they are bad news."""

from __future__ import annotations

from math import prod

import pytest

from bmm.report import findings
from bmm.report.page import report_page
from bmm.report.takeaways import takeaways


def test_the_opening_says_what_was_kept(document):
    text = findings.opening(document)
    value, interval = findings.share(document, "merged")
    assert text.startswith("Four experts became one model: it keeps ")
    assert f"{100 * value:.1f} % ({100 * interval[0]:.1f}–{100 * interval[1]:.1f}) of their test accuracy" in text
    assert "the best anchor alone, WUDI, keeps 96.9 %" in text


def test_the_opening_without_methods_names_the_anchor_of_the_merge(document):
    document["methods"] = []
    del document["metrics"]["test"]["mean"]["intervals"]
    anchor = document["metrics"]["test"]["mean"]["share_of_experts"]["anchor"]
    assert f"the best anchor alone, TSV-M, keeps {100 * anchor:.1f} %" in findings.opening(document)


def test_the_opening_without_results_is_still_a_sentence(document):
    document["metrics"] = {}
    assert findings.opening(document) == f"Four experts became one model. {findings.UNMEASURED}"
    assert "the recipe names no test rows" in findings.UNMEASURED
    document["metrics"] = {"test": {"news": {"metric": "accuracy"}}}
    assert findings.opening(document) == "Four experts became one model."


def test_how_the_regression_was_made_is_said_in_words(document):
    assert findings.method(document) == (
        "the regression is on what the experts read on their calibration rows; the strength of the prior was searched "
        "on validation rows"
    )
    document["grams"] = {"source": "activations", "tokens": 16, "tokens_seed": 3}
    assert "on their calibration rows, 16 tokens of each sequence (seed 3); the" in findings.method(document)
    document["recipe"] = {"regression": {"mode": "propagated"}}
    assert "what the merged model itself reads on the calibration rows" in findings.method(document)
    document["recipe"] = {"regression": {"mode": "module-wise"}}
    document["grams"] = {"source": "task-vectors"}
    for rule, said in (("fixed", "as the recipe has it, without a search"), ("evidence", "most probable given the")):
        document["search"]["lambda"] = rule
        assert "task vectors, without any data; the strength" in findings.method(document)
        assert said in findings.method(document)


def test_fitted_heads_are_said_on_the_page_and_kept_ones_are_not_called_fitted(document):
    assert "with each expert's head." in report_page(document).replace("&#39;", "'")
    document["search"]["heads"] = {"lambda": 0.1, "layers": {"news": None, "mail": "classifier"}}
    assert "each task's last layer is fitted" in findings.method(document)
    assert "task's head, fitted to it" in report_page(document).replace("&#39;", "'")
    document["search"]["heads"]["layers"] = {"news": None, "mail": None}
    assert "fitted" not in findings.method(document)


def test_a_good_merge_has_no_warnings(document):
    assert findings.warnings(document) == []


def test_merged_below_its_anchor_is_said(document):
    document["metrics"]["test"]["mean"]["share_of_experts"] |= {"merged": 0.90, "anchor": 0.95}
    first, second = findings.warnings(document)
    assert "below its own anchor: it keeps 90.0 % of the experts' mean, the anchor 95.0 %" in first
    assert "best anchor of the comparison, WUDI, is above the merged model: 96.9 % against 90.0 %" in second


def test_merged_below_anchor_or_base_on_a_task_is_said(document):
    tweets = document["metrics"]["test"]["tweets"]
    tweets |= {"merged": 0.50, "anchor": 0.55, "base": 0.51}
    found = findings.warnings(document)
    assert "The merged model is below the anchor on this task: tweets (−5.0 points)." in found
    assert "The merged model is below the base on this task: tweets (−1.0 points)." in found


@pytest.mark.parametrize(("base", "words"), [(0.90, "does not beat"), (0.79, "does not clearly beat")])
def test_an_expert_no_better_than_the_base_is_said(document, base, words):
    document["metrics"]["test"]["movies"] |= {"base": base, "expert": 0.80, "merged": 0.95, "anchor": 0.92}
    document["metrics"]["test"]["movies"]["intervals"]["expert"] = [0.78, 0.82]
    said = f"The expert movies {words} the base with the same head: 80.0 % against {100 * base:.1f} %."
    assert findings.warnings(document) == [said]


def test_a_search_that_kept_the_anchor_is_said(document):
    document["search"]["best"]["index"] = 0
    assert any("nothing better than the anchor" in warning for warning in findings.warnings(document))


def test_treatments_add_up(document):
    totals = findings.treatments(document)
    assert [total.treatment for total in totals] == ["regressed", "anchored", "averaged", "copied"]
    assert sum(total.parameters for total in totals) == len(document["coverage"])
    assert sum(total.weights for total in totals) == sum(prod(entry["shape"]) for entry in document["coverage"])
    assert sum(total.share for total in totals) == pytest.approx(1)


def test_methods_are_sorted_by_share(document):
    shares = [row.share for row in findings.methods(document)]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == len(document["methods"])


def test_takeaways_are_computed_from_the_document(document):
    said = takeaways(document)
    assert set(said) == {"tasks", "methods", "search", "trades", "lambda"}
    best = max(document["search"]["trials"], key=lambda trial: trial["objective"])
    assert f"Trial {best['index']} ({best['origin']}) was taken of 24" in said["search"]
    assert "ranks first of 7" in said["methods"]
    assert "ahead of WUDI" in said["methods"]
    document["methods"][-1]["share_of_experts"] = {"mean": 0.95, "low": 0.945, "high": 0.955}
    assert (
        "ranks 4 of 7, 1.9 points of share behind WUDI (the intervals do not overlap)" in takeaways(document)["methods"]
    )


def test_takeaways_without_data_are_left_out(document):
    document |= {"methods": [], "coverage": [], "search": {"trials": [], "best": None}}
    assert set(takeaways(document)) == {"tasks"}


def test_one_lambda_for_all_reads_as_one(document):
    for entry in document["coverage"]:
        if entry["lambda"] is not None:
            entry["lambda"] = 0.1
    assert takeaways(document)["lambda"].startswith("Every regressed matrix uses λ = 0.1:")


def test_tasks_that_all_lose_more_than_a_point_are_said_in_words(document):
    for entry in document["metrics"]["test"].values():
        entry["merged"] = entry["expert"] - 0.02
    assert takeaways(document)["tasks"].startswith("On every task the merged model is more than one point below")
    next(iter(document["metrics"]["test"].values()))["merged"] += 0.01
    assert takeaways(document)["tasks"].startswith("On 1 of ")
